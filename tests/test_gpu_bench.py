"""The GPU benchmark on a machine without a GPU: its arithmetic, its plans, its report. No torch needed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.bars import evaluate
from benchmarks.gpu.budget import MOST_PATIENCE_S, SAVING_S, Budget, Task, fitting, in_order
from benchmarks.gpu.options import chosen_options
from benchmarks.gpu.process import WorkerFailed, WorkerProcess, breaks_cuda, describe
from benchmarks.gpu.results_file import Results, WrongResults, read_document
from benchmarks.gpu.roofline import (
    Limits,
    decode_work,
    fit,
    kv_token_bytes,
    largest_batch,
    prefill_work,
    resident_weight_bytes,
    weight_bytes,
)
from benchmarks.gpu.run import Run, main
from benchmarks.gpu.shapes import (
    BATCHES,
    FULL,
    LLAMA_2_7B,
    LLAMA_3_8B,
    MODELS,
    QUICK,
    QWEN2_5_0_5B,
    TINY_GRID,
    linear_parameters,
    spec_for,
)
from benchmarks.gpu.tasks import SECTIONS, tasks_for
from benchmarks.gpu.versus import measure_versus
from tests.gpu_sample import sample_document

ROOT = Path(__file__).resolve().parents[1]
H200 = Limits(bandwidth=4.0e12, matmul=8.0e14, l2_bytes=60 << 20)
GIB = 1 << 30


def test_shapes_have_the_parameters_of_their_models() -> None:
    """Billions, from the models' own descriptions: 6.74, 8.03 and 0.494."""
    for shape, billions in ((LLAMA_2_7B, 6.738), (LLAMA_3_8B, 8.030), (QWEN2_5_0_5B, 0.494)):
        embedding = 0 if shape.tied_head else shape.vocab_size * shape.hidden_size
        assert (linear_parameters(shape) + embedding) / 1e9 == pytest.approx(billions, abs=0.001)


def test_a_decode_step_reads_every_weight_once_and_every_visible_key() -> None:
    spec = spec_for(LLAMA_3_8B, 2048, 512, "bfloat16")
    assert kv_token_bytes(spec) == 128 * 1024
    one, many = decode_work(spec, 1, H200), decode_work(spec, 64, H200)
    assert one.weight_bytes == many.weight_bytes == weight_bytes(spec)
    assert one.kv_read_bytes == 2048 * 128 * 1024
    assert many.kv_read_bytes == 64 * one.kv_read_bytes
    assert one.operations == 2 * linear_parameters(LLAMA_3_8B) + 4 * 32 * 32 * 128 * 2048
    assert one.activation_bytes == 0
    assert one.bound(H200) == "bandwidth"
    assert one.seconds(H200) == pytest.approx(one.bytes_moved / 4.0e12)
    # 15 GB of weights and 0.27 GB of keys and values.
    assert 1e3 * one.seconds(H200) == pytest.approx(3.82, abs=0.01)


def test_eight_bit_weights_halve_what_is_read_but_for_the_head() -> None:
    wide = weight_bytes(spec_for(LLAMA_3_8B, 512, 512, "bfloat16"))
    narrow = weight_bytes(spec_for(LLAMA_3_8B, 512, 512, "float8"))
    head = LLAMA_3_8B.vocab_size * LLAMA_3_8B.hidden_size
    assert narrow == (wide - 2 * head) // 2 + 2 * head


def test_prefill_is_bound_by_matrix_products_and_computes_one_row_of_logits() -> None:
    spec = spec_for(LLAMA_2_7B, 1024, 512, "bfloat16")
    work = prefill_work(spec, 512, H200)
    head = LLAMA_2_7B.vocab_size * LLAMA_2_7B.hidden_size
    layers = linear_parameters(LLAMA_2_7B) - head
    assert work.linear_operations == 2 * (512 * layers + head)
    assert work.kv_read_bytes == (1024 + 511) * kv_token_bytes(spec)
    assert work.kv_write_bytes == 512 * kv_token_bytes(spec)
    assert work.bound(H200) == "matmul"


def test_activations_count_only_where_they_outgrow_the_cache() -> None:
    spec = spec_for(LLAMA_3_8B, 512, 512, "bfloat16")
    large = decode_work(spec, 256, H200)
    assert large.activation_bytes == 2 * 256 * 128_256 * 4
    assert decode_work(spec, 64, H200).activation_bytes == 0


@pytest.mark.parametrize(
    ("model", "capacity", "h100", "h200"),
    [
        ("llama-3-8b", 512, 256, 256),
        ("llama-3-8b", 4096, 64, 64),
        ("llama-2-7b", 512, 64, 64),
        ("llama-2-7b", 4096, 8, 8),
        ("qwen2.5-0.5b", 4096, 256, 256),
    ],
)
def test_which_batches_fit_a_card(model: str, capacity: int, h100: int, h200: int) -> None:
    spec = spec_for(MODELS[model], capacity, 512, "bfloat16")
    assert largest_batch(spec, BATCHES, 78 * GIB) == h100
    assert largest_batch(spec, BATCHES, 139 * GIB) == h200


def test_a_point_that_does_not_fit_says_what_is_missing() -> None:
    spec = spec_for(LLAMA_3_8B, 4096, 512, "bfloat16")
    assert resident_weight_bytes(spec) == pytest.approx(2 * 8.03e9, rel=1e-3)
    refused = fit(spec, 256, 139 * GIB)
    assert not refused.fits
    assert "256 kv_slots" in refused.reason
    assert "139" in refused.reason
    assert fit(spec, 1, 78 * GIB).fits


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def task(name: str, importance: int, estimate_s: float) -> Task:
    return Task("decode", name, importance, estimate_s)


def test_a_budget_lets_pass_what_still_fits() -> None:
    clock = Clock()
    budget = Budget(60.0, clock)
    assert budget.allows(task("a", 0, 60.0 - SAVING_S))
    clock.now += 30
    assert not budget.allows(task("a", 0, 30.0))
    assert budget.allows(task("b", 1, 20.0))
    assert budget.timeout_s(task("c", 1, 2.0)) == 8.0
    assert budget.timeout_s(task("d", 1, 20.0)) == pytest.approx(25.0)
    assert Budget(9000.0, clock).timeout_s(task("e", 1, 240.0)) == 240.0 + MOST_PATIENCE_S
    clock.now += 100
    assert budget.remaining_s == 0.0
    assert not budget.allows(task("b", 1, 0.1))


def test_the_plan_goes_by_importance_and_fills_what_is_left() -> None:
    tasks = [task("late", 9, 10), task("first", 0, 30), task("long", 5, 40)]
    ordered = in_order(tasks)
    assert [t.model for t in ordered] == ["first", "long", "late"]
    chosen, left = fitting(ordered, 50)
    assert [t.model for t in chosen] == ["first", "late"]
    assert [t.model for t in left] == ["long"]
    assert in_order(tasks, done={"decode/first"}, only=["decode"])[0].model == "long"
    assert in_order(tasks, only=["age"]) == []


def test_what_failed_before_is_tried_last() -> None:
    tasks = [task("hangs", 0, 10), task("works", 5, 10)]
    assert [t.model for t in in_order(tasks, failed_before={"decode/hangs"})] == ["works", "hangs"]


def test_tensorrt_is_a_call_of_its_own_that_begins_with_the_probe() -> None:
    tasks = [t for t in tasks_for(FULL) if t.engine == "tensorrt"]
    chosen, _ = fitting(in_order(tasks), 540)
    sections = [t.section for t in chosen]
    assert sections[0] == "tensorrt_sm90"
    assert sections[1] == "correctness"
    assert {"decode", "prefill", "age"} <= set(sections)
    cuda = [t for t in in_order(tasks_for(FULL)) if t.engine == "cuda"]
    assert max(t.importance for t in cuda if t.section == "decode") < tasks[-1].importance


@pytest.mark.parametrize("grid", [FULL, QUICK, TINY_GRID])
def test_every_task_has_a_key_of_its_own_and_a_known_section(grid: object) -> None:
    assert isinstance(grid, type(FULL))
    tasks = tasks_for(grid, profile=True)
    assert len({t.key for t in tasks}) == len(tasks)
    assert {t.section for t in tasks} <= set(SECTIONS)
    assert tasks[0].section == "limits"


def test_the_first_call_holds_what_the_bars_need() -> None:
    chosen, _ = fitting(in_order(tasks_for(FULL)), 540)
    assert {t.section for t in chosen} >= {
        "limits",
        "correctness",
        "versus",
        "decode",
        "prefill",
        "age",
        "restore",
        "overheads",
    }
    assert any(t.parameters.get("peer") == "streaming_llm" for t in chosen)


def test_the_bars_of_a_sample() -> None:
    bars = evaluate(sample_document()["sections"])
    verdicts = {(bar.name, bar.point): bar.passed for bar in bars}
    assert len(bars) == 8
    at = "llama-3-8b at capacity 2048"
    assert verdicts["speed over StreamingLLM as published", f"{at}, batch 1"]
    assert verdicts["decode, share of the roofline", f"{at}, batch 1"]
    assert not verdicts["decode, share of the roofline", f"{at}, batch 64"]
    assert verdicts["prefill, share of the matmul rate", at]
    assert not verdicts["ms per token over age, largest gap", at]
    assert not verdicts["decode, share of the roofline", f"{at} on TensorRT-RTX, batch 1"]
    assert sum(not passed for passed in verdicts.values()) == 3
    assert "FAIL" in str(bars[2])
    assert evaluate({}) == []


def test_the_fastest_variant_is_used_from_then_on() -> None:
    sections = sample_document()["sections"]
    chosen = chosen_options(sections, "llama-3-8b")
    assert chosen == {"overlap": False, "choices": {"a": "library"}}
    assert chosen_options(sections, "llama-2-7b") == chosen
    sections["variant/llama-3-8b/tune=False/overlap=True"]["mean_ms"] = 3.0
    assert chosen_options(sections, "llama-3-8b") == {"overlap": True, "choices": {}}
    assert chosen_options({}, "llama-3-8b") == {}


def test_nan_passes_no_bar() -> None:
    document = sample_document()
    for result in document["sections"].values():
        for name in ("ratio", "spread", "of_matmul_rate"):
            if name in result:
                result[name] = float("nan")
    failed = [bar for bar in evaluate(document["sections"]) if not bar.passed]
    assert len(failed) == 5


def test_results_are_saved_whole_and_resumed(tmp_path: Path) -> None:
    device = {"name": "Imaginary Card", "l2_bytes": 1}
    results = Results.new(tmp_path, device)
    results.document["sections"]["age/x"] = {"spread": 0.0}
    results.document["failed"]["decode/x"] = "it broke"
    results.save()
    again = Results.resumed(
        read_document(results.path), tmp_path / "other" / "x.json", device, ["--only", "age"]
    )
    assert again.done == {"age/x"}
    assert again.failed_before == {"decode/x"}
    assert again.document["failed"] == {}
    assert [call["arguments"] for call in again.document["calls"]] == [[], ["--only", "age"]]
    again.save()
    assert (tmp_path / "other" / "x.json").is_file()
    Results.new(tmp_path, device).save()
    (kept,) = tmp_path.glob("before-*.json")
    assert read_document(kept)["sections"] == {"age/x": {"spread": 0.0}}
    results.path.write_text("{")
    with pytest.raises(WrongResults, match="--resume"):
        read_document(results.path)
    results.path.write_text("{}")
    with pytest.raises(WrongResults, match="no result of this version"):
        read_document(results.path)


def test_a_file_that_cannot_be_resumed_costs_no_start_of_a_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--resume", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.log"))


def test_another_card_begins_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine that is lent next may have another card: its time is not spent on refusing."""
    monkeypatch.setattr(Run, "device", lambda run, engine: {"name": "Another Card", "l2_bytes": 1})
    first = Results.new(tmp_path, {"name": "Imaginary Card", "l2_bytes": 1})
    first.document["sections"]["age/x"] = {"spread": 0.0}
    first.save()
    out = ["--out", str(tmp_path / "out"), "--budget-s", "1"]
    assert main([*out, "--resume", str(first.path)]) == 0
    assert "begun anew" in capsys.readouterr().err
    (path,) = (tmp_path / "out").glob("gpu-another-card-*.json")
    assert read_document(path)["sections"] == {}


def test_the_page_says_that_nothing_was_measured_on_a_gpu(tmp_path: Path) -> None:
    text = report.page(tmp_path, {})
    assert "No GPU number has been measured yet" in text
    assert "TB/s" not in text


def test_the_page_of_a_sample_has_every_table(tmp_path: Path) -> None:
    path = tmp_path / "gpu-imaginary-card-2026-11-27.json"
    path.write_text(json.dumps(sample_document()))
    text = report.page(tmp_path, {"gpu-imaginary-card": ["a.png"]})
    assert "No GPU number" not in text
    for title in (
        "Bars",
        "Decode",
        "Prefill",
        "Against",
        "Restoring",
        "Variants",
        "attention",
        "Whether TensorRT-RTX runs",
        "TensorRT plans",
        "Not measured",
    ):
        assert title in text
    assert "256 kv_slots do not fit" in text
    assert "not / supported; in capability" in text
    assert "the process ended with code -6" in text
    assert "llama-3-8b on TensorRT-RTX" in text
    assert "compile / broke" in text
    assert "![a.png](a.png)" in text
    assert "**missed**" in text


def test_the_newest_result_counts(tmp_path: Path) -> None:
    for day, age in (("2026-11-26", 1), ("2026-11-27", 2)):
        (tmp_path / f"x-{day}.json").write_text(json.dumps({"benchmark": "x", "age": age}))
    assert report.newest(tmp_path)["x"]["age"] == 2


def test_plots_are_drawn_from_a_sample(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    document = json.dumps(sample_document())
    (results / "gpu-imaginary-card-2026-11-27.json").write_text(document)
    where = ["--results", str(results), "--docs", str(docs)]
    assert report.main([*where, "--check"]) == 1
    assert report.main(where) == 0
    assert {path.name for path in docs.glob("*.png")} == {
        f"gpu-imaginary-card-{name}.png"
        for name in ("decode", "prefill", "age", "versus", "restore", "overheads")
    }
    assert report.main([*where, "--check"]) == 0


def test_the_committed_page_is_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0, "run python -m benchmarks.gpu.report"


def test_the_parent_and_the_report_need_no_torch() -> None:
    """Nothing that a GPU machine or this one may lack is imported before a process of its own needs it."""
    absent = (
        "torch",
        "triton",
        "rich",
        "ray",
        "redis",
        "onnxruntime",
        "matplotlib",
        "transformers",
    )
    code = (
        "import sys, benchmarks.gpu.run, benchmarks.gpu.report\n"
        f"print([name for name in {absent!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


CHILD = """
import sys, time
from benchmarks.gpu.process import serve
def add(a, b):
    print("noise of a library")
    return {"sum": a + b}
def fail(fatal):
    raise ValueError("fatal" if fatal else "refused")
def sleep():
    time.sleep(600)
def leave():
    print("last words")
    sys.exit(3)
handlers = {"add": add, "fail": fail, "sleep": sleep, "leave": leave}
serve(handlers, lambda error: str(error) == "fatal")
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerProcess:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return WorkerProcess("a_child", [], tmp_path / "child.log")


def test_a_worker_answers_and_outlives_an_error(child: WorkerProcess) -> None:
    with child:
        assert child.call("add", 60, a=1, b=2) == {"sum": 3}
        with pytest.raises(WorkerFailed, match="ValueError: refused") as failure:
            child.call("fail", 60, fatal=False)
        assert failure.value.alive
        assert child.call("add", 60, a=2, b=2) == {"sum": 4}
        assert "noise" in child.log.read_text()
        with pytest.raises(WorkerFailed) as failure:
            child.call("fail", 60, fatal=True)
        assert not failure.value.alive
        assert not child.alive


@pytest.mark.parametrize(("op", "said"), [("sleep", "no answer within"), ("leave", "code 3")])
def test_a_worker_that_hangs_or_dies_is_reported_and_gone(
    child: WorkerProcess, op: str, said: str
) -> None:
    with child:
        child.call("add", 60, a=0, b=0)
        with pytest.raises(WorkerFailed, match=said) as failure:
            child.call(op, 0.2 if op == "sleep" else 60)
        assert not child.alive
        assert ("in sleep" if op == "sleep" else "last words") in str(failure.value)
        with pytest.raises(WorkerFailed, match="gone"):
            child.call("add", 1, a=0, b=0)


def test_the_plan_can_be_read_without_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "decode", "--models", "llama-3-8b", "--engine", "cuda"]
    assert main(["--list", *only]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all("decode/llama-3-8b" in line for line in lines)
    assert main(["--only", "decode"]) == 2


def test_eight_bit_formats_are_specs_of_the_cuda_target() -> None:
    spec = spec_for(LLAMA_3_8B, 512, 512, "float8")
    assert spec.target == "cuda"
    assert dataclasses.replace(spec, weight_format="float16").kv_bytes == 2


def test_a_worker_goes_with_its_parent(tmp_path: Path) -> None:
    """Also when nothing could be tidied: it would go on holding the card."""
    (tmp_path / "a_child.py").write_text(CHILD)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from benchmarks.gpu.process import WorkerProcess\n"
        f"child = WorkerProcess('a_child', [], Path({str(tmp_path)!r}) / 'log')\n"
        "child.call('add', 60, a=1, b=1)\n"
        'child._process.stdin.write(b\'{"op": "sleep"}\\n\'); child._process.stdin.flush()\n'
        "print(child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    status = Path(f"/proc/{int(done.stdout)}/status")
    deadline = time.monotonic() + 60
    while _runs(status):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(status: Path) -> bool:
    try:
        return "(zombie)" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


class Scripted:
    """A worker that writes down what it is asked."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self._name, self._asked = name, asked

    def call(self, op: str, timeout_s: float, **arguments: object) -> dict[str, object]:
        self._asked.append(f"{self._name} {op}")
        return {"dtype": "float16"} if op == "open" else {"seconds": [1.0, 2.0]}


def test_our_engine_makes_room_before_a_peer_is_opened() -> None:
    asked: list[str] = []
    task = Task("versus", "tiny", 0, 30, {"peer": "streaming_llm", "capacity": 16})
    found = measure_versus(
        Scripted("subject", asked),  # type: ignore[arg-type]
        Scripted("peer", asked),  # type: ignore[arg-type]
        task,
        60.0,
        {},
        TINY_GRID.effort,
    )
    assert asked[:2] == ["subject rounds", "peer open"]
    assert found["ratio"] == 1.0


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried", "CUDA error: unspecified launch failure"]
)
def test_a_process_that_ran_out_of_memory_is_replaced(words: str) -> None:
    assert breaks_cuda(RuntimeError(words))
    assert not breaks_cuda(ValueError("batch 0"))


def test_an_error_is_kept_whole() -> None:
    assert describe(ValueError("x" * 3000)).endswith("x" * 3000)
