"""The manifest: what makes a folder an engine.

`manifest.json` names every other file with its size and SHA-256. It is written last, by an atomic
rename after everything else is on disk, so a half-built engine never has one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine_build.files import sha256_of, sync, write_atomically
from engine_build.spec import EngineSpec, SpecError

MANIFEST = "manifest.json"
SPEC = "spec.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT = "chat.json"

MANIFEST_VERSION = 1

_INSIDE = re.compile(r"(rank\d+/)?(?!\.\.?$)[^/\\]+")
"""Names that a manifest may hold: files of the folder, or of a rank's."""

Verify = Literal["sizes", "sha256"]


class ManifestError(ValueError):
    """The folder is not a whole, unaltered engine. `folder` is where; the message says what to do."""

    def __init__(self, folder: Path, problem: str) -> None:
        fix = "Build the engine again with `sinkserve build MODEL --out DIR`"
        super().__init__(f"{folder}: {problem}. {fix}")
        self.folder = folder
        self.problem = problem


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a build knows of the model beside its spec.

    `trained_tokens` is the longest context that it was trained for; `generation` its own sampling
    defaults; `build_key` what its weights, graph and text files were made from.
    """

    name: str
    trained_tokens: int
    generation: Mapping[str, float]
    build_key: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of an engine directory by name, and the model they came from."""

    files: Mapping[str, FileEntry]
    model: ModelCard

    def fingerprint(self, spec: EngineSpec) -> str:
        """SHA-256 (hex) over everything that gives a conversation's tokens their meaning.

        Weights, graph, tokenizer, chat pieces, and `spec` (with any override of capacity) without
        `max_chunk` and `rewind_tokens`, which change no result.
        """
        meaning = dataclasses.replace(spec, max_chunk=1, rewind_tokens=0)
        lines = [f"{name} {self.files[name].sha256}" for name in sorted(self.files) if name != SPEC]
        return hashlib.sha256("\n".join([meaning.fingerprint, *lines]).encode()).hexdigest()

    def to_json(self) -> str:
        fields = {
            "version": MANIFEST_VERSION,
            "files": {name: dataclasses.asdict(entry) for name, entry in self.files.items()},
            "model": dataclasses.asdict(self.model),
        }
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def write_manifest(
    folder: Path, model: ModelCard, progress: Callable[[float], None] = lambda fraction: None
) -> Manifest:
    """Hash every file of `folder`, force all to disk, then write `manifest.json` by atomic rename.

    `progress` gets the fraction of bytes hashed.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    )
    total = sum((folder / name).stat().st_size for name in names) or 1
    done = 0
    files: dict[str, FileEntry] = {}
    for name in names:
        path = folder / name
        sync(path)
        files[name] = FileEntry(size=path.stat().st_size, sha256=sha256_of(path))
        done += files[name].size
        progress(done / total)
    for inner in folder.glob("*/"):
        sync(inner)
    manifest = Manifest(files=files, model=model)
    write_atomically(folder / MANIFEST, manifest.to_json())
    return manifest


def load_manifest(folder: Path, verify: Verify = "sizes") -> Manifest:
    """Read and check the manifest of an engine directory.

    `sizes` checks that every file is there with its size; `sha256` also reads every byte. Raises
    ManifestError when the folder is missing, half-built, of another release, or altered.
    """
    if not folder.is_dir():
        raise ManifestError(folder, "there is no such folder")
    path = folder / MANIFEST
    if not path.is_file():
        raise ManifestError(folder, f"it has no {MANIFEST}: not an engine, or one half-built")
    manifest = _parse(folder, path.read_bytes())
    for name, entry in manifest.files.items():
        _verify(folder, name, entry, verify)
    return manifest


def load_engine_spec(
    folder: Path, capacity: int | None = None, max_chunk: int | None = None
) -> EngineSpec:
    """The spec of an engine directory, with another capacity or max_chunk if given.

    Neither is part of the weights or the graph. Raises ManifestError for a bad folder, SpecError for a
    capacity beyond what the model was trained for.
    """
    manifest = load_manifest(folder)
    spec = EngineSpec.from_json((folder / SPEC).read_text(encoding="utf-8"))
    spec = dataclasses.replace(
        spec,
        capacity=spec.capacity if capacity is None else capacity,
        max_chunk=spec.max_chunk if max_chunk is None else max_chunk,
    )
    check_capacity(spec.capacity, manifest.model.trained_tokens)
    return spec


def check_capacity(capacity: int, trained_tokens: int) -> None:
    """Raises SpecError when a cache position would be one that the model never saw."""
    if capacity > trained_tokens:
        raise SpecError(
            "capacity",
            f"{capacity} is more than the {trained_tokens} positions the model was trained for",
            f"Use at most {trained_tokens}; conversations are endless at any capacity",
        )


def _parse(folder: Path, text: bytes) -> Manifest:
    try:
        fields: dict[str, Any] = json.loads(text)
        if fields["version"] != MANIFEST_VERSION:
            raise ManifestError(folder, f"{MANIFEST} is of version {fields['version']!r}")
        files = {str(name): FileEntry(**entry) for name, entry in fields["files"].items()}
        return Manifest(files=files, model=ModelCard(**fields["model"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(folder, f"{MANIFEST} is damaged ({error})") from error


def _verify(folder: Path, name: str, entry: FileEntry, verify: Verify) -> None:
    path = folder / name
    if not _INSIDE.fullmatch(name) or not path.is_file():
        raise ManifestError(folder, f"{name} is missing")
    size = path.stat().st_size
    if size != entry.size:
        raise ManifestError(folder, f"{name} has {size} bytes, the manifest says {entry.size}")
    if verify == "sha256" and sha256_of(path) != entry.sha256:
        raise ManifestError(folder, f"{name} was altered after the build")
