"""TensorRT-RTX for a machine without network: what is packed is found there again; and the probe, whose
process may crash or hang. No test downloads anything."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import carried, tensorrt_sm90
from benchmarks.gpu.budget import Task
from benchmarks.gpu.carried import LIBS, NotCarried, bindings_archive, this_python, unpacked
from benchmarks.gpu.options import plan_capabilities
from benchmarks.gpu.pack_tensorrt import Member, graph_members, pack, pinned_version, wheel_members
from benchmarks.gpu.process import WorkerFailed
from benchmarks.gpu.results_file import Results
from benchmarks.gpu.run import Run, _capabilities_in, _check_runnable
from benchmarks.gpu.shapes import MODELS, Grid, spec_for
from benchmarks.gpu.tensorrt_sm90 import Way, probe, ways

ROOT = Path(__file__).resolve().parents[1]
SMALL = Grid(models=("qwen2.5-0.5b",), capacities=(512,))


@pytest.fixture
def carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with archives of a library that is a stub; temporary files lie elsewhere than usual."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(carried.LIBRARY_VARIABLE, raising=False)
    folder = tmp_path / "carry"
    code = b"__version__ = 'a stub'\n"
    pack([Member("tensorrt_rtx_libs/__init__.py", b"")], folder / LIBS)
    bindings = [Member("tensorrt_rtx_bindings/__init__.py", code), *graph_members(SMALL)]
    bindings.append(Member("tensorrt_rtx/__init__.py", b"from tensorrt_rtx_bindings import *\n"))
    pack(bindings, folder / bindings_archive(this_python()))
    return folder


def test_what_was_packed_is_unpacked_once_and_imported(carry: Path, tmp_path: Path) -> None:
    first = unpacked(carry)
    (first / "mark").touch()
    assert unpacked(carry) == first
    assert (first / "mark").exists()
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import carried\n"
        f"print(carried.ensure_library(Path({str(carry)!r})))\n"
        "import tensorrt_rtx_bindings; print(tensorrt_rtx_bindings.__version__)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-S", "-c", code]  # -S: what is installed here is not there
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["carried", "a stub"], done.stderr


def test_graphs_are_found_by_the_spec_they_are_of(carry: Path) -> None:
    spec = spec_for(MODELS["qwen2.5-0.5b"], 512, SMALL.max_chunk, "bfloat16", "tensorrt-rtx")
    graph = carried.carried_graph(spec.fingerprint, carry)
    assert graph is not None
    assert b"RotaryEmbedding" in graph.read_bytes()
    assert carried.carried_graph("0" * 64, carry) is None


def test_what_is_missing_or_damaged_is_said(carry: Path, tmp_path: Path) -> None:
    with pytest.raises(NotCarried, match=r"no tensorrt-rtx-cp399.tar.xz: run .*--python 3.99"):
        unpacked(carry, "3.99")
    (carry / LIBS).write_bytes((carry / LIBS).read_bytes()[:-20])
    with pytest.raises(NotCarried, match="cannot be unpacked"):
        unpacked(carry)
    assert not list(tmp_path.glob("sinkserve-tensorrt-*"))


def test_a_wheel_gives_one_package_and_its_licence(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        for name in ("lib/__init__.py", "a.dist-info/licenses/LICENSE.txt", "a.dist-info/RECORD"):
            zipped.writestr(name, name)
    names = [member.name for member in wheel_members(wheel, "lib")]
    assert names == ["a.dist-info/licenses/LICENSE.txt", "lib/__init__.py"]


def test_the_packed_release_is_the_one_that_is_tested(tmp_path: Path) -> None:
    assert pinned_version().count(".") == 3


PROBED = """
import sys, time
from benchmarks.gpu.process import serve
def library():
    return {"library": {"version": "1", "names": ["8.0", "8.9"]}, "gpu": {"name": "x"}}
def attempt(way):
    if way["name"] == "8.0 alone":
        print("the library says goodbye", file=sys.stderr, flush=True)
        sys.exit(7)
    if way["name"] == "8.9 alone":
        time.sleep(60)
    right = way["capabilities"] == [] or bool(way["compatibility"])
    return {"plan_bytes": 5, "opens": True, "right": right, "said": []}
serve({"library": library, "attempt": attempt}, lambda error: False)
"""


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_probed_child.py").write_text(PROBED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(tensorrt_sm90, "_STARTED", "a_probed_child")
    monkeypatch.setattr(tensorrt_sm90, "WAY_S", 0.5)


@pytest.mark.usefixtures("fake_library")
def test_a_crash_and_a_hang_are_answers_and_the_other_ways_are_tried(tmp_path: Path) -> None:
    found = probe(60.0, tmp_path / "log")
    by_name = {plan["way"]: plan for plan in found["plans"]}
    assert len(by_name) == len(ways(["8.0", "8.9"]))
    assert "code 7" in by_name["8.0 alone"]["ended"]
    assert "the library says goodbye" in by_name["8.0 alone"]["ended"]
    assert "no answer" in by_name["8.9 alone"]["ended"]
    assert "in attempt" in by_name["8.9 alone"]["ended"]  # its stacks
    assert found["runs"][0] == "the library's choice"
    assert found["capabilities"] == []
    assert plan_capabilities({"tensorrt_sm90/all": found}) == []


def test_a_way_that_only_the_probe_knows_is_none_for_an_engine() -> None:
    assert Way("x", ("current",)).plain
    assert not Way("x", (), "AMPERE_PLUS").plain
    with pytest.raises(WorkerFailed, match="not measured yet") as failure:
        _capabilities_in({})
    assert failure.value.absent
    with pytest.raises(WorkerFailed, match="runs no plan on this card") as failure:
        _capabilities_in({"tensorrt_sm90/all": {"capabilities": None}})
    assert failure.value.absent
    assert _capabilities_in({"tensorrt_sm90/all": {"capabilities": ["current"]}}) == ["current"]


def test_an_engine_that_could_not_be_checked_costs_no_more_time() -> None:
    decode, check = (
        Task(s, "tiny", 0, 1, {"engine": "tensorrt"}) for s in ("decode", "correctness")
    )
    failed = {"correctness/tiny/engine=tensorrt/capacity=64": "it crashed"}
    with pytest.raises(WorkerFailed, match=r"see correctness/tiny.*--only decode") as failure:
        _check_runnable(decode, failed)
    assert failure.value.absent
    _check_runnable(check, failed)
    _check_runnable(decode, {"correctness/tiny/capacity=64": "the CUDA engine's"})


def test_a_library_that_is_not_there_is_absent_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(carried.LIBRARY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "executable", _without_packages(tmp_path))
    with pytest.raises(WorkerFailed, match="holds no tensorrt_rtx") as failure:
        probe(60.0, tmp_path / "log")
    assert failure.value.absent


def _without_packages(folder: Path) -> str:
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_the_library_itself_is_asked_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("what it says with a GPU is what the probe is for")
    found = probe(300.0, tmp_path / "log")
    by_name = {plan["way"]: plan for plan in found["plans"]}
    assert found["runs"] == []
    assert found["capabilities"] is None
    assert by_name["the library's choice"]["plan_bytes"] > 1000
    refused = by_name["9.0, asked for by number"]
    assert refused["plan_bytes"] is None
    assert "not supported" in refused["said"][0]


def test_the_parent_has_a_plan_built_in_a_process_that_then_wants_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of a task but its last step, with the library itself: what it says comes back."""
    pytest.importorskip("tensorrt_rtx")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("with a GPU it would be measured")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = Results.new(tmp_path, {"name": "cpu", "l2_bytes": 1 << 20})
    task = Task("age", "tiny", 0, 60, {"engine": "tensorrt", "capacity": 16, "format": "float32"})
    run = Run("cpu", "tiny", tmp_path)
    try:
        with pytest.raises(WorkerFailed, match="needs the section tensorrt_sm90"):
            run.execute(task, results, 120.0)
        probed = results.document["sections"]
        probed["tensorrt_sm90/all"] = {"capabilities": []}
        with pytest.raises(WorkerFailed, match="tensorrt-rtx needs a GPU that torch can use"):
            run.execute(task, results, 300.0)
        assert len(list(tmp_path.rglob("*-default/decoder.plan"))) == 1
        probed["tensorrt_sm90/all"] = {"capabilities": ["current"]}
        with pytest.raises(WorkerFailed, match=r"built no plan.*generateForCurrent"):
            run.execute(task, results, 300.0)
    finally:
        run.close()
