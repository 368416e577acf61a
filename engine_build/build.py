"""The one entry point of a build: a model becomes an engine directory.

Steps: checkpoint -> text files -> graph and weights -> plan (for TensorRT) -> spec -> manifest. They run
in a folder beside the target, which takes the target's name only when it is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine_build.chat_template import derive_chat_pieces
from engine_build.checkpoint import read_checkpoint
from engine_build.engine_names import GRAPH_FILE
from engine_build.files import locked, sha256_of, sync
from engine_build.graph import export_graph
from engine_build.libraries import missing_library
from engine_build.manifest import (
    CHAT,
    MANIFEST,
    SPEC,
    TOKENIZER,
    TOKENIZER_CONFIG,
    ManifestError,
    ModelCard,
    check_capacity,
    load_manifest,
    write_manifest,
)
from engine_build.plan import (
    PLAN_TARGETS,
    PlanOptions,
    build_plan,
    check_library,
    plan_file,
)
from engine_build.plan_inputs import holds_weights
from engine_build.shard import check_tp_size, rank_folder
from engine_build.spec import (
    TARGET_FORMATS,
    EngineSpec,
    SpecError,
    Target,
    WeightFormat,
    kv_dtype_for,
)
from engine_build.tensors import Checkpoint

LOCK = ".sinkserve-build.lock"
TIMING_CACHE = ".sinkserve-timing.cache"
SOURCE_SUFFIXES = (".json", ".jinja", ".safetensors")

Progress = Callable[[str, float], None]
"""Called with a step's name and the fraction of it that is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build. Another `capacity` or `max_chunk` reuses the weights of an earlier build, unless a plan
    holds them.

    `tp_size` tensor-parallel ranks share each step; each has graph and weights of its own, in `rank0`, ...
    `weight_format` None is what suits the target (`stored_format`). `compute_capabilities` such as ("8.9",)
    are those that a TensorRT-RTX plan is for; none: its own choice.
    """

    capacity: int = 512
    max_chunk: int = 64
    weight_format: WeightFormat | None = None
    target: Target = "cpu"
    tp_size: int = 1
    compute_capabilities: tuple[str, ...] = ()

    @property
    def stored_format(self) -> WeightFormat:
        """The weights' format: the one asked for, else the target's first."""
        return self.weight_format or TARGET_FORMATS[self.target][0]


DEFAULT_OPTIONS = BuildOptions()


def no_progress(step: str, fraction: float) -> None:
    """The progress callback that tells nobody."""


def build_engine(
    source: Path,
    out: Path,
    options: BuildOptions = DEFAULT_OPTIONS,
    progress: Progress = no_progress,
) -> Path:
    """Build the engine of the model at `source` in the folder `out`, and return `out`.

    An engine already there that was built from the same files with the same options is left as it is;
    an older one is replaced. One here or beside it that differs in its window only lends its files.
    Builds beside one another wait for each other. Raises SpecError for a model or option that is not
    supported; `out` is then what it was before.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(LOCK)):
        _check_replaceable(out)
        progress("read the model", 0.0)
        build_key = _build_key(source, options)
        earlier = _earlier_build(out, build_key)
        if earlier == out and _spec_of(out) == _respecified(out, options):
            progress("read the model", 1.0)
            return out
        with _folder_beside(out) as folder:
            if earlier is not None:
                card = load_manifest(earlier).model
                spec = _respecified(earlier, options)
                check_capacity(spec.capacity, card.trained_tokens)
                _link_files(earlier, folder)
            else:
                spec, card = _convert(source, options, folder, progress)
                card = dataclasses.replace(card, build_key=build_key)
            (folder / SPEC).write_text(spec.to_json(), encoding="utf-8")
            write_manifest(folder, card, lambda fraction: progress("checksums", fraction))
            _replace(out, folder)
    return out


def _convert(
    source: Path, options: BuildOptions, folder: Path, progress: Progress
) -> tuple[EngineSpec, ModelCard]:
    """Write text files, graph and weights of the model at `source`; its card lacks the build key."""
    if options.target in PLAN_TARGETS:
        check_library(options.target)
    checkpoint = read_checkpoint(source)
    check_capacity(options.capacity, checkpoint.trained_tokens)
    spec = EngineSpec(
        model=checkpoint.shape,
        capacity=options.capacity,
        max_chunk=options.max_chunk,
        weight_format=options.stored_format,
        kv_dtype=kv_dtype_for(options.stored_format),
        target=options.target,
        tp_size=options.tp_size,
    )
    check_tp_size(spec.model, spec.tp_size)
    progress("read the model", 1.0)
    _write_text_files(checkpoint, folder, progress)
    try:
        export_graph(
            spec,
            checkpoint.tensors,
            folder,
            lambda fraction: progress("write graph and weights", fraction),
        )
    except ModuleNotFoundError as error:
        missing = missing_library(f"building for {spec.target}", error)
        if missing is None:
            raise
        raise missing from error
    if spec.target in PLAN_TARGETS:
        timing_cache = folder.parent / TIMING_CACHE if spec.target == "tensorrt" else None
        plan_options = PlanOptions(options.compute_capabilities, timing_cache)
        num_plans = spec.tp_size if holds_weights(spec) else 1
        for rank in range(num_plans):
            graph = rank_folder(folder, rank, spec.tp_size) / GRAPH_FILE
            plan = plan_file(spec, folder, rank)
            one = functools.partial(_part_of, progress, rank, num_plans)
            build_plan(spec, graph, plan, one, plan_options)
    card = ModelCard(
        name=checkpoint.name,
        trained_tokens=checkpoint.trained_tokens,
        generation=dict(checkpoint.generation),
        build_key="",
    )
    return spec, card


def _part_of(progress: Progress, done: int, plans: int, fraction: float) -> None:
    progress("build the plan", (done + fraction) / plans)


def _build_key(source: Path, options: BuildOptions) -> str:
    """SHA-256 over what decides the weights, graph and text files: model, options, this package."""
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in SOURCE_SUFFIXES)
    else:
        files = [source] if source.is_file() else []
    files += sorted(Path(__file__).parent.glob("*.py"))
    parts: list[str] = [options.stored_format, options.target, str(options.tp_size)]
    if options.target in PLAN_TARGETS:
        parts += [f"{options.capacity} {options.max_chunk}", *options.compute_capabilities]
    parts += [f"{file.name} {sha256_of(file)}" for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _earlier_build(out: Path, build_key: str) -> Path | None:
    """A whole engine made from the same files: `out` itself, or one beside it."""
    beside = sorted(path.parent for path in out.parent.glob(f"[!.]*/{MANIFEST}"))
    for folder in [out, *beside]:
        try:
            if load_manifest(folder).model.build_key == build_key:
                load_manifest(folder, verify="sha256")
                return folder
        except (ManifestError, OSError):
            continue
    return None


def _spec_of(folder: Path) -> EngineSpec:
    return EngineSpec.from_json((folder / SPEC).read_text(encoding="utf-8"))


def _respecified(folder: Path, options: BuildOptions) -> EngineSpec:
    return dataclasses.replace(
        _spec_of(folder), capacity=options.capacity, max_chunk=options.max_chunk
    )


def _link_files(earlier: Path, folder: Path) -> None:
    """Everything but the spec, without copying the weights where the file system can."""
    for name in load_manifest(earlier).files:
        if name != SPEC:
            (folder / name).parent.mkdir(exist_ok=True)
            try:
                os.link(earlier / name, folder / name)
            except OSError:
                shutil.copyfile(earlier / name, folder / name)


def _write_text_files(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    progress("tokenizer and chat template", 0.0)
    text = checkpoint.text
    vocabulary = text.tokenizer.get_vocab(with_added_tokens=True)
    largest = max([*vocabulary.values(), *text.eos_ids])
    if largest >= checkpoint.shape.vocab_size:
        raise SpecError(
            "vocab_size",
            f"the tokenizer has token {largest}, the model only {checkpoint.shape.vocab_size}",
            "Take tokenizer and weights from the same model",
        )
    (folder / TOKENIZER).write_text(text.tokenizer.to_str(), encoding="utf-8")
    (folder / TOKENIZER_CONFIG).write_text(text.config_json(), encoding="utf-8")
    (folder / CHAT).write_text(derive_chat_pieces(text).to_json(), encoding="utf-8")
    progress("tokenizer and chat template", 1.0)


def _check_replaceable(out: Path) -> None:
    """Refuse a target that could be somebody's own folder."""
    if not out.exists() and not out.is_symlink():
        return
    folder = out.is_dir() and not out.is_symlink()
    engine = folder and ((out / MANIFEST).is_file() or (out / SPEC).is_file())
    if not engine and not (folder and not any(out.iterdir())):
        raise SpecError("out", f"{out} exists and is not an engine", "Name another folder")


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A fresh folder on the same file system, removed again unless it was renamed away."""
    for left_over in out.parent.glob(f".{out.name}.building-*"):  # we hold the lock: nobody's
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.building-", dir=out.parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(out: Path, folder: Path) -> None:
    """Give `folder` the name `out`. Engines that run on the old files keep them open."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.building-", dir=out.parent))
        out.rename(old / out.name)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)
    sync(out.parent)
