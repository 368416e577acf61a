from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from engine_build.build import BuildOptions, build_engine
from engine_build.chat import ChatPieces
from engine_build.checkpoint import read_checkpoint
from engine_build.manifest import MANIFEST, load_engine_spec, load_manifest
from engine_build.spec import TARGET_FORMATS, SpecError, Target, WeightFormat
from tests.tiny_models import tiny_tensors, tiny_tokenizer, write_gguf, write_hf_folder

OPTIONS = BuildOptions(capacity=32, max_chunk=16, weight_format="float32")
FILES = {
    "spec.json",
    "graph.onnx",
    "weights.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat.json",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_hf_folder(tmp_path / "model", "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "tiny"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file on disk each name is, and when it was written."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def left_overs(out: Path) -> list[Path]:
    return list(out.parent.glob(".*.building-*"))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_build_writes_a_whole_engine(kind: str, tmp_path: Path, out: Path) -> None:
    if kind == "folder":
        source = write_hf_folder(tmp_path / "model", "qwen3")
    else:
        source = write_gguf(tmp_path / "model.gguf", "qwen3")
    seen: dict[str, list[float]] = {}
    built = build_engine(
        source, out, OPTIONS, lambda step, done: seen.setdefault(step, []).append(done)
    )
    assert built == out
    assert set(load_manifest(out, verify="sha256").files) == FILES
    assert not left_overs(out)
    spec = load_engine_spec(out)
    assert spec.model == read_checkpoint(source).shape
    assert (spec.capacity, spec.max_chunk, spec.weight_format) == (32, 16, "float32")
    text = "the window <|im_end|> ü"
    written = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert written.encode(text).ids == tiny_tokenizer().encode(text).ids
    pieces = ChatPieces.from_json((out / "chat.json").read_text())
    assert "".join(run.text for run in pieces.runs([("user", "hi")], generate=True)) == (
        "<|im_start|>system\nYou are tiny.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(seen) >= 4
    for step, fractions in seen.items():
        assert fractions == sorted(fractions), step
        assert fractions[-1] == 1.0, step


def test_the_same_build_again_touches_nothing(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    before = stamps(out)
    assert build_engine(model, out, OPTIONS) == out
    assert stamps(out) == before


def test_another_window_reuses_weights_and_graph(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    before = stamps(out)
    build_engine(model, out, BuildOptions(capacity=48, max_chunk=8, weight_format="float32"))
    after = stamps(out)
    assert {name for name in FILES if after[name] != before[name]} == {"spec.json"}
    load_manifest(out, verify="sha256")
    assert (load_engine_spec(out).capacity, load_engine_spec(out).max_chunk) == (48, 8)
    with pytest.raises(SpecError, match="capacity"):
        build_engine(model, out, BuildOptions(capacity=8192, weight_format="float32"))
    assert stamps(out) == after


def test_an_engine_beside_it_lends_its_files(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    wider = build_engine(
        model, out.with_name("wider"), BuildOptions(capacity=48, weight_format="float32")
    )
    assert stamps(wider)["weights.safetensors"] == stamps(out)["weights.safetensors"]
    assert load_engine_spec(wider).capacity == 48
    assert load_engine_spec(out).capacity == 32
    load_manifest(wider, "sha256")


@pytest.mark.parametrize("damage", ["altered", "half-built"])
def test_a_broken_engine_beside_it_lends_nothing(damage: str, model: Path, out: Path) -> None:
    broken = build_engine(model, out.with_name("broken"), OPTIONS)
    if damage == "altered":
        whole = (broken / "chat.json").read_bytes()
        (broken / "chat.json").write_bytes(whole[::-1])
    else:
        (broken / MANIFEST).unlink()
    build_engine(model, out, OPTIONS)
    assert stamps(out)["weights.safetensors"] != stamps(broken)["weights.safetensors"]
    ChatPieces.from_json((out / "chat.json").read_text())


def test_another_weight_format_is_another_engine(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    exact = load_manifest(out).fingerprint(load_engine_spec(out))
    build_engine(model, out, BuildOptions(capacity=32, max_chunk=16, weight_format="int8"))
    assert load_engine_spec(out).weight_format == "int8"
    assert load_manifest(out, "sha256").fingerprint(load_engine_spec(out)) != exact


def test_changed_weights_are_built_anew(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    before = load_manifest(out).fingerprint(load_engine_spec(out))
    tensors = tiny_tensors("llama")
    tensors["model.norm.weight"][0] += 1
    write_hf_folder(model, "llama", tensors=tensors)
    build_engine(model, out, OPTIONS)
    assert load_manifest(out, "sha256").fingerprint(load_engine_spec(out)) != before


def test_an_altered_engine_is_built_anew(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    whole = (out / "weights.safetensors").read_bytes()
    (out / "weights.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    build_engine(model, out, OPTIONS)
    assert (out / "weights.safetensors").read_bytes() == whole
    load_manifest(out, "sha256")


def test_a_half_built_engine_is_built_anew(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    (out / MANIFEST).unlink()
    build_engine(model, out, OPTIONS)
    load_manifest(out, "sha256")


def test_a_failed_build_leaves_the_earlier_engine(model: Path, out: Path) -> None:
    build_engine(model, out, OPTIONS)
    before = stamps(out)
    tensors = tiny_tensors("llama")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = np.nan
    write_hf_folder(model, "llama", tensors=tensors)
    with pytest.raises(SpecError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        build_engine(model, out, OPTIONS)
    assert stamps(out) == before
    load_manifest(out, "sha256")
    assert not left_overs(out)


def test_what_a_killed_build_left_is_cleared_away(model: Path, out: Path) -> None:
    left = build_engine(model, out.parent / ".tiny.building-abc", OPTIONS)  # whole, not yet renamed
    assert left_overs(out) == [left]
    build_engine(model, out, OPTIONS)
    load_manifest(out, "sha256")
    assert not left_overs(out)


def test_a_folder_of_somebody_elses_is_never_replaced(model: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("three years of work")
    with pytest.raises(SpecError) as refused:
        build_engine(model, out, OPTIONS)
    assert refused.value.field == "out"
    assert (out / "thesis.txt").read_text() == "three years of work"
    linked = out.with_name("linked")
    linked.symlink_to(out)
    with pytest.raises(SpecError, match="not an engine"):
        build_engine(model, linked, OPTIONS)


def test_an_empty_folder_is_filled(model: Path, out: Path) -> None:
    out.mkdir(parents=True)
    build_engine(model, out, OPTIONS)
    load_manifest(out, "sha256")


def test_a_tokenizer_of_another_model_is_refused(model: Path, out: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|one too many|>"])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(SpecError, match="token 320") as refused:
        build_engine(model, out, OPTIONS)
    assert refused.value.field == "vocab_size"
    assert not out.exists()


def test_a_capacity_beyond_the_trained_length_is_refused(model: Path, out: Path) -> None:
    with pytest.raises(SpecError, match="4096") as refused:
        build_engine(model, out, BuildOptions(capacity=4097, weight_format="float32"))
    assert refused.value.field == "capacity"
    assert not out.exists()


BUILD_SCRIPT = """
import sys
from pathlib import Path
from engine_build.build import BuildOptions, build_engine
steps = set()
build_engine(Path(sys.argv[1]), Path(sys.argv[2]),
    BuildOptions(capacity=32, max_chunk=16, weight_format="float32"),
    lambda step, done: steps.add(step))
print("checksums" in steps)
"""


def test_two_builds_at_once_make_one_engine(model: Path, out: Path) -> None:
    command = [sys.executable, "-c", BUILD_SCRIPT, str(model), str(out)]
    root = Path(__file__).resolve().parent.parent
    builds = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = sorted(build.communicate()[0].strip() for build in builds)
    assert [build.returncode for build in builds] == [0, 0]
    assert said == ["False", "True"]
    load_manifest(out, "sha256")
    assert json.loads((out / MANIFEST).read_text())["model"]["name"] == "model"


@pytest.mark.parametrize(("target", "formats"), TARGET_FORMATS.items())
def test_the_default_weight_format_is_the_targets_first(
    target: Target, formats: tuple[WeightFormat, ...]
) -> None:
    assert BuildOptions(target=target).stored_format == formats[0]
    assert BuildOptions(target=target, weight_format="float32").stored_format == "float32"


def test_a_library_that_the_build_lacks_is_named_with_how_to_install_it(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")

    monkeypatch.setattr("engine_build.build.export_graph", export)
    with pytest.raises(SpecError, match=r"needs tensorrt, .*pip install tensorrt"):
        build_engine(model, out, OPTIONS)
    assert not out.exists()
