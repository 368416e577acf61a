from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_build.hf_config import shape_from_config
from engine_build.manifest import (
    MANIFEST,
    SPEC,
    ManifestError,
    ModelCard,
    load_engine_spec,
    load_manifest,
    write_manifest,
)
from engine_build.spec import EngineSpec, SpecError
from tests.tiny_models import tiny_config

CARD = ModelCard(name="tiny", trained_tokens=4096, generation={"top_p": 0.9}, build_key="k")


def tiny_spec(capacity: int = 32) -> EngineSpec:
    return EngineSpec(shape_from_config(tiny_config("llama")), capacity=capacity, max_chunk=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of an engine, of stand-in contents, and their manifest."""
    (tmp_path / SPEC).write_text(tiny_spec().to_json())
    for name in ("weights.safetensors", "tokenizer.json", "chat.json"):
        (tmp_path / name).write_text(f"contents of {name}")
    write_manifest(tmp_path, CARD)
    return tmp_path


def test_a_manifest_reads_back_as_it_was_written(folder: Path) -> None:
    manifest = load_manifest(folder, verify="sha256")
    assert manifest.model == CARD
    assert set(manifest.files) == {SPEC, "weights.safetensors", "tokenizer.json", "chat.json"}
    entry = manifest.files["chat.json"]
    assert entry.size == 21
    # printf 'contents of chat.json' | sha256sum
    assert entry.sha256 == "f5a946aa327a2324a9475005b0bb8faf9a35ad1ecbb05abb064a103f9e613cde"
    assert write_manifest(folder, CARD) == manifest


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[7] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize("verify", ["sizes", "sha256"])
@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize("name", [SPEC, "weights.safetensors", "tokenizer.json", "chat.json"])
def test_a_missing_or_cut_file_is_found_by_either_check(
    name: str, damage: Callable[[Path], None], verify: str, folder: Path
) -> None:
    damage(folder / name)
    with pytest.raises(ManifestError, match=rf"{name}.*sinkserve build"):
        load_manifest(folder, verify="sizes" if verify == "sizes" else "sha256")


def test_a_flipped_bit_is_found_by_the_hash(folder: Path) -> None:
    flip_a_bit(folder / "weights.safetensors")
    load_manifest(folder, verify="sizes")
    with pytest.raises(ManifestError, match=r"weights\.safetensors was altered"):
        load_manifest(folder, verify="sha256")


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        fields = json.loads(file.read_text())
        change(fields)
        file.write_text(json.dumps(fields))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        cut,
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text("{}"),
        edit(lambda fields: fields.update(version=2)),
        edit(lambda fields: fields.pop("files")),
        edit(lambda fields: fields.update(files=["spec.json"])),
        edit(lambda fields: fields.update(files={"spec.json": {"size": 1}})),
        edit(lambda fields: fields.update(files={"../spec.json": {"size": 1, "sha256": ""}})),
        edit(lambda fields: fields.update(model=None)),
        edit(lambda fields: fields.update(model={"name": "tiny"})),
    ],
)
def test_a_folder_without_a_whole_manifest_is_no_engine(
    damage: Callable[[Path], None], folder: Path
) -> None:
    damage(folder / MANIFEST)
    with pytest.raises(ManifestError, match="sinkserve build"):
        load_manifest(folder)


def test_a_folder_that_is_not_there_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such folder"):
        load_manifest(tmp_path / "gone")


def test_the_manifest_appears_only_when_all_else_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / MANIFEST).unlink()

    def crash(self: Path, target: Path) -> Path:
        raise OSError("the machine went away")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="went away"):
        write_manifest(folder, CARD)
    with pytest.raises(ManifestError, match="half-built"):
        load_manifest(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json", "chat.json"])
def test_the_fingerprint_depends_on_every_file(name: str, folder: Path) -> None:
    before = load_manifest(folder).fingerprint(tiny_spec())
    flip_a_bit(folder / name)
    assert write_manifest(folder, CARD).fingerprint(tiny_spec()) != before


def test_the_fingerprint_depends_on_the_spec_as_far_as_it_changes_results(folder: Path) -> None:
    manifest, spec = load_manifest(folder), tiny_spec()
    before = manifest.fingerprint(spec)
    assert len(before) == 64
    assert manifest.fingerprint(dataclasses.replace(spec, max_chunk=3, rewind_tokens=5)) == before
    changed = [
        dataclasses.replace(spec, capacity=33),
        dataclasses.replace(spec, weight_format="float32"),
        dataclasses.replace(spec, model=dataclasses.replace(spec.model, rms_norm_eps=1e-6)),
    ]
    assert len({before, *(manifest.fingerprint(other) for other in changed)}) == 4


def test_the_spec_is_loaded_with_another_window(folder: Path) -> None:
    assert load_engine_spec(folder) == tiny_spec()
    assert load_engine_spec(folder, capacity=4096) == tiny_spec(4096)
    assert load_engine_spec(folder, max_chunk=5).max_chunk == 5


@pytest.mark.parametrize(("capacity", "word"), [(4097, "4096"), (7, "small")])
def test_a_window_the_model_cannot_have_is_refused(capacity: int, word: str, folder: Path) -> None:
    with pytest.raises(SpecError, match=word) as refused:
        load_engine_spec(folder, capacity=capacity)
    assert refused.value.field == "capacity"
