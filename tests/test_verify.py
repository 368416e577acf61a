"""Verification: a right engine passes, engines that are wrong in one thing fail, and reports decide."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.float_reference import MISTAKES
from engine.onnx_engine import OnnxEngine
from engine.open_engine import EngineOptions, open_engine
from engine.protocol import Engine, EngineDead, Row, StepPlan, StepResult
from engine.verify import VerifyOptions, verify
from engine.verify_figures import TOLERANCES, Tally, Tolerances, Verification
from engine.verify_report import (
    REPORT,
    NotVerified,
    Verified,
    check_verified,
    write_report,
)
from engine.verify_run import EngineFault, default_tokens, run_engine
from engine.window import SinkWindow
from engine_build.manifest import load_engine_spec, load_manifest, write_manifest
from engine_build.spec import EngineSpec, SpecError
from engine_build.stored_weights import checkpoint_weights, stored_weights
from tests.engine_fixtures import random_tokens
from tests.tiny_models import write_hf_folder

TOKENS = 192
TEXT = random_tokens(3, TOKENS)


def quiet(what: str, fraction: float) -> None:
    assert 0 <= fraction <= 1


@dataclasses.dataclass
class Wrong:
    """An engine that changes the plan before it runs it, or what came of it."""

    engine: Engine
    before: Callable[[Row], Row] = lambda row: row
    after: Callable[[StepResult], StepResult] = lambda result: result

    @property
    def spec(self) -> EngineSpec:
        return self.engine.spec

    @property
    def max_resident(self) -> int:
        return self.engine.max_resident

    def step(self, plan: StepPlan) -> StepResult:
        return self.after(self.engine.step(StepPlan(tuple(map(self.before, plan.rows)))))

    def close(self) -> None:
        self.engine.close()


@pytest.fixture(scope="module")
def engine(tiny_engine_dir: Path) -> OnnxEngine:
    return OnnxEngine(tiny_engine_dir, memory_budget_bytes=1 << 22)


def verified(engine: Engine, engine_dir: Path, **options: Any) -> Verification:
    weights = stored_weights(engine_dir, engine.spec)
    return verify(engine, weights, TEXT, VerifyOptions(TOKENS, **options), quiet)


def test_a_right_engine_passes(engine: OnnxEngine, tiny_engine_dir: Path) -> None:
    found = verified(engine, tiny_engine_dir)
    assert found.problems == ()
    assert [part.name for part in found.parts] == ["long", "pinned", "restored"]
    long, pinned, restored = found.parts
    assert long.figures.num_tokens == TOKENS // 2 + long.greedy_tokens
    assert pinned.figures.num_tokens == restored.figures.num_tokens == TOKENS // 4
    assert long.greedy_same is None
    assert [one.mistake for one in found.mistakes] == list(MISTAKES)
    assert all(one.ruled_out and one.effect > 0.01 for one in found.mistakes)


def narrower(row: Row) -> Row:
    window = row.window
    one_fewer = dataclasses.replace(window, window_tokens=window.window_tokens - 1)
    return dataclasses.replace(row, window=one_fewer)


def no_sinks(row: Row) -> Row:
    window = row.window
    if row.window_start:
        return row
    all_ring = SinkWindow(0, window.window_tokens, window.ring_tokens + window.sink_tokens)
    return dataclasses.replace(row, window=all_ring)


def one_late(row: Row) -> Row:
    return dataclasses.replace(row, start=row.start + 1) if row.start > 40 else row


def forgets_replay(row: Row) -> Row:
    return dataclasses.replace(row, window_start=0)


def another_token(result: StepResult) -> StepResult:
    rows = (
        row if row.token_id is None else dataclasses.replace(row, token_id=(row.token_id + 1) % 320)
        for row in result.rows
    )
    return StepResult(tuple(rows))


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (narrower, None, "one key too few"),
        (no_sinks, None, "no sinks"),
        (one_late, None, "long: relative_error"),
        (forgets_replay, None, "restored: relative_error"),
        (None, another_token, "a greedy token is not the likeliest"),
    ],
)
def test_a_wrong_engine_fails(
    before: Callable[[Row], Row] | None,
    after: Callable[[StepResult], StepResult] | None,
    problem: str,
    engine: OnnxEngine,
    tiny_engine_dir: Path,
) -> None:
    wrong = Wrong(engine, before or (lambda row: row), after or (lambda result: result))
    found = verified(wrong, tiny_engine_dir)
    assert any(problem in line for line in found.problems), found.problems


def test_a_window_wrong_by_one_is_seen_under_noise_that_hides_it(
    engine: OnnxEngine, tiny_engine_dir: Path
) -> None:
    """The tolerance lets all of it through; the trace of the mistake in the error does not."""
    rng = np.random.default_rng(5)

    def noisy(result: StepResult) -> StepResult:
        rows = []
        for row in result.rows:
            assert row.logits is not None
            noise = rng.normal(0, 2 * row.logits.std(), row.logits.shape).astype(np.float32)
            rows.append(dataclasses.replace(row, logits=row.logits + noise, token_id=0))
        return StepResult(tuple(rows))

    lax = Tolerances(relative_error=10.0, kl_mean=100.0, top1=0.0)
    for before, seen in ((narrower, ["one key too few"]), (lambda row: row, [])):
        found = verified(Wrong(engine, before, noisy), tiny_engine_dir, tolerances=lax)
        assert [one.mistake for one in found.mistakes if one.seen] == seen


def test_logits_that_are_not_finite_or_missing_are_a_fault(engine: OnnxEngine) -> None:
    def broken(value: Any) -> Callable[[StepResult], StepResult]:
        return lambda result: StepResult(
            tuple(dataclasses.replace(row, logits=value(row)) for row in result.rows)
        )

    for value, problem in (
        (lambda row: row.logits * np.nan, "not finite"),
        (lambda row: None, "no logits"),
    ):
        with pytest.raises(EngineFault, match=problem):
            run_engine(Wrong(engine, after=broken(value)), TEXT, TOKENS, quiet)


def test_too_few_tokens_slots_or_text_are_refused(
    engine: OnnxEngine, tiny_engine_dir: Path
) -> None:
    with pytest.raises(ValueError, match="Use at least 128"):
        run_engine(engine, TEXT, 127, quiet)
    with pytest.raises(ValueError, match="text: 10 tokens"):
        run_engine(engine, TEXT[:10], 128, quiet)
    one = OnnxEngine(tiny_engine_dir, memory_budget_bytes=engine.spec.slot_bytes)
    with pytest.raises(ValueError, match="2 kv_slots"):
        run_engine(one, TEXT, 128, quiet)
    assert default_tokens(engine.spec) == 6 * 32


def test_the_checkpoint_tells_what_rounding_the_weights_costs(tmp_path: Path) -> None:
    from engine_build.build import BuildOptions, build_engine

    model = write_hf_folder(tmp_path / "model", "llama")
    engine_dir = build_engine(model, tmp_path / "engine", BuildOptions(capacity=32, max_chunk=16))
    engine = open_engine(engine_dir, EngineOptions(1 << 22))
    spec = engine.spec
    assert spec.weight_format == "int8"
    found = verify(
        engine,
        stored_weights(engine_dir, spec),
        TEXT,
        VerifyOptions(TOKENS, mistakes=False, layers=True),
        quiet,
        checkpoint_weights(model, spec.model),
    )
    assert found.mistakes == ()
    assert found.quantisation is not None
    assert found.total is not None
    assert 0.001 < found.quantisation.relative_error < 0.5
    assert found.total.num_tokens == sum(part.figures.num_tokens for part in found.parts)
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    assert all(0.001 < layer.weight_error < 0.02 for layer in found.layers)
    assert found.layers[0].hidden_error < found.layers[-1].hidden_error
    other = write_hf_folder(tmp_path / "other", "qwen3")
    with pytest.raises(SpecError, match="not what this engine was built from"):
        checkpoint_weights(other, spec.model)


def test_a_tally_is_the_textbook_formula_and_splits_anywhere() -> None:
    rng = np.random.default_rng(1)
    got, wanted = rng.normal(0, 2, (2, 7, 50)).astype(np.float32)
    p = np.exp(wanted.astype(np.float64)) / np.exp(wanted.astype(np.float64)).sum(-1, keepdims=True)
    q = np.exp(got.astype(np.float64)) / np.exp(got.astype(np.float64)).sum(-1, keepdims=True)
    kl = (p * np.log(p / q)).sum(-1)
    whole, parts = Tally(), Tally()
    whole.add(got, wanted)
    parts.add(got[:3], wanted[:3])
    parts.add(got[3:] + 5, wanted[3:])  # a constant changes no probability
    for figures in (whole.figures(), parts.figures()):
        assert figures.kl_mean == pytest.approx(kl.mean())
        assert figures.kl_max == figures.kl_p99 == pytest.approx(kl.max())
        assert figures.top1 == (got.argmax(-1) == wanted.argmax(-1)).mean()
        assert figures.rms_error == pytest.approx(whole.figures().rms_error, rel=1e-5)


# The report.

PASSED = Verification((), (), TOLERANCES["float32"])
FAILED = dataclasses.replace(PASSED, failure="it broke")


@pytest.fixture
def gpu_engine(tiny_engine_dir: Path, tmp_path: Path) -> Path:
    """As far as its files tell, an engine for GPUs."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    for file in tiny_engine_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spec = json.loads((folder / "spec.json").read_text()) | {"target": "cuda"}
    (folder / "spec.json").write_text(json.dumps(spec))
    write_manifest(folder, load_manifest(tiny_engine_dir).model)
    return folder


def report(engine_dir: Path, found: Verification, **changes: Any) -> None:
    of = Verified.of(engine_dir, load_engine_spec(engine_dir), ("H100",))
    write_report(engine_dir / REPORT, dataclasses.replace(of, **changes), found, {"date": "now"})


def check(engine_dir: Path, capacity: int | None = None) -> None:
    spec = load_engine_spec(engine_dir, capacity)
    check_verified(engine_dir, spec, Verified.of(engine_dir, spec, ("H100",)))


def test_an_engine_for_gpus_needs_a_report_that_passed(gpu_engine: Path) -> None:
    with pytest.raises(
        NotVerified, match=r"no verify.json.*Run: sinkserve verify .* --capacity 32"
    ):
        check(gpu_engine)
    report(gpu_engine, FAILED)
    with pytest.raises(NotVerified, match="the engine failed: it broke"):
        check(gpu_engine)
    report(gpu_engine, PASSED)
    check(gpu_engine)
    check_verified(gpu_engine, load_engine_spec(gpu_engine))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"manifest_sha256": "0"}, "another build"),
        ({"fingerprint": "0"}, "another capacity"),
        ({"libraries": {"torch": "1.0"}}, "torch 1.0, this machine has"),
        ({"gpus": ("A100",)}, "A100, this machine has H100"),
        ({"gpus": ()}, "no GPU, this machine has H100"),
    ],
)
def test_a_report_of_anything_else_is_stale(
    changes: dict[str, Any], problem: str, gpu_engine: Path
) -> None:
    report(gpu_engine, PASSED, **changes)
    with pytest.raises(NotVerified, match=problem):
        check(gpu_engine)


def test_another_machine_judges_the_files_alone(gpu_engine: Path) -> None:
    report(gpu_engine, PASSED, libraries={"torch": "1.0"}, gpus=("A100",))
    check_verified(gpu_engine, load_engine_spec(gpu_engine))
    with pytest.raises(NotVerified, match=r"another capacity.*--capacity 16"):
        check_verified(gpu_engine, load_engine_spec(gpu_engine, 16))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 0}', "{"])
def test_a_damaged_report_is_refused(text: str, gpu_engine: Path) -> None:
    (gpu_engine / REPORT).write_text(text)
    with pytest.raises(NotVerified, match=r"damaged|another release"):
        check(gpu_engine)


def test_a_cpu_engine_is_stopped_by_a_failed_report_alone(
    tiny_engine_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cpu"
    folder.mkdir()
    for file in tiny_engine_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    check(folder)
    report(folder, PASSED)
    check(folder)
    report(folder, FAILED, manifest_sha256="of an earlier build")
    check(folder)
    report(folder, FAILED)
    with pytest.raises(NotVerified, match="verification failed"):
        check(folder)


# The command.


def test_the_command_writes_a_report_that_decides_whether_the_engine_serves(
    tiny_engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from deployments.cli import app
    from deployments.config import ConfigError, load_config
    from deployments.engine_files import locate_engine

    folder = tmp_path / "engine"
    folder.mkdir()
    for file in tiny_engine_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    command = ["verify", str(folder), "--threads", "1", "--tokens", "128"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "passed" in done.output
    written = json.loads((folder / REPORT).read_text())
    assert written["passed"] is True
    assert written["engine"]["capacity"] == 32
    assert len(written["findings"]["parts"]) == 3
    config = load_config({"model": str(folder)})
    locate_engine(config)

    def dies(engine: OnnxEngine, plan: StepPlan) -> StepResult:
        raise EngineDead("no more")

    monkeypatch.setattr(OnnxEngine, "step", dies)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "the engine failed: no more" in done.output
    with pytest.raises(ConfigError, match="no more"):
        locate_engine(config)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--layers",), "--model"),
        (("--tokens", "5"), "Use at least 128"),
        (("--capacity", "100000"), "capacity"),
        (("--model", "no/such/model"), "does not exist"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    arguments: tuple[str, ...], problem: str, tiny_engine_dir: Path
) -> None:
    from typer.testing import CliRunner

    from deployments.cli import app

    done = CliRunner().invoke(app, ["verify", str(tiny_engine_dir), *arguments])
    assert done.exit_code == 1
    assert problem in done.output
    assert not (tiny_engine_dir / REPORT).exists()


def test_the_command_refuses_files_that_are_not_what_was_built(
    tiny_engine_dir: Path, tmp_path: Path
) -> None:
    """Of the same size: the reference takes its weights from them, and would agree with the engine."""
    from typer.testing import CliRunner

    from deployments.cli import app

    folder = shutil.copytree(tiny_engine_dir, tmp_path / "engine")
    with (folder / "weights.safetensors").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\x3f")
    done = CliRunner().invoke(app, ["verify", str(folder), "--tokens", "128"])
    assert done.exit_code == 1
    assert "weights.safetensors" in done.output
    assert not (folder / REPORT).exists()
