"""An engine directory is opened by the executor it was built for, or refused with what to do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import open_engine as module
from engine.open_engine import CPU_BUDGET_BYTES, EngineOptions, open_engine
from engine.protocol import Engine, EngineDead
from engine.rank_executors import RankOptions, SlotCounts, agreed, failed_start
from engine_build.libraries import LIBRARIES
from engine_build.manifest import ManifestError, load_manifest, write_manifest
from engine_build.spec import EngineSpec, SpecError

ROOT = Path(__file__).resolve().parent.parent


def changed(engine_dir: Path, folder: Path, **fields: object) -> Path:
    """A copy of an engine with other fields in its spec."""
    folder.mkdir()
    for file in engine_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spec = json.loads((folder / "spec.json").read_text()) | fields
    (folder / "spec.json").write_text(json.dumps(spec))
    write_manifest(folder, load_manifest(engine_dir).model)
    return folder


def test_a_cpu_engine_opens_with_its_own_capacity_or_another(tiny_engine_dir: Path) -> None:
    for capacity in (32, 24):
        engine = open_engine(tiny_engine_dir, EngineOptions(1 << 22, capacity=capacity))
        assert engine.spec.capacity == capacity
        assert engine.max_resident == (1 << 22) // engine.spec.slot_bytes
        engine.close()


def test_a_cpu_engine_without_a_budget_gets_the_default(
    tiny_engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_BUDGET_BYTES", 1 << 22)
    engine = open_engine(tiny_engine_dir)
    assert engine.max_resident == (1 << 22) // engine.spec.slot_bytes
    engine.close()
    assert CPU_BUDGET_BYTES == 1 << 30
    assert EngineOptions().host_memory_bytes == 0


def test_a_capacity_beyond_training_and_no_engine_are_refused(
    tiny_engine_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="capacity"):
        open_engine(tiny_engine_dir, EngineOptions(capacity=1 << 20))
    with pytest.raises(ManifestError, match="sinkserve build"):
        open_engine(tmp_path)


def test_an_executor_that_this_release_lacks_is_refused(
    tiny_engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OPENERS", {})
    with pytest.raises(SpecError, match="target: this release has no engine for cpu"):
        open_engine(tiny_engine_dir)


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_missing_library_is_named_with_how_to_install_it(
    library: str, tiny_engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opener(folder: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
        raise ModuleNotFoundError(f"No module named {library!r}", name=f"{library}.nn")

    monkeypatch.setattr(module, "_OPENERS", {"cpu": opener})
    with pytest.raises(SpecError, match=rf"needs {library}, .*pip install"):
        open_engine(tiny_engine_dir)


def test_an_error_of_our_own_is_not_taken_for_a_missing_library(
    tiny_engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opener(folder: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
        raise ModuleNotFoundError("No module named 'engine.misspelt'", name="engine.misspelt")

    monkeypatch.setattr(module, "_OPENERS", {"cpu": opener})
    with pytest.raises(ModuleNotFoundError):
        open_engine(tiny_engine_dir)


def test_a_group_of_ranks_is_an_executor_of_its_own(tiny_engine_dir: Path) -> None:
    spec = EngineSpec.from_json((tiny_engine_dir / "spec.json").read_text())
    assert module.executor_of(spec) == "cpu"
    assert module.executor_of(dataclasses.replace(spec, tp_size=2)) == "cpu ranks"


@pytest.mark.parametrize(("target", "share", "threads"), [("cpu", 2, 3), ("cuda", 1, 1)])
def test_what_a_group_gets_is_dealt_out_to_its_ranks(
    target: str,
    share: int,
    threads: int,
    tiny_engine_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But the memory of a GPU is each rank's own."""
    opened: list[tuple[RankOptions, dict[str, float]]] = []
    ranks = SimpleNamespace(
        TensorParallelEngine=lambda options, timeouts: opened.append((options, timeouts)),
        RankTimeouts=dict,
    )
    monkeypatch.setitem(sys.modules, "engine.ranks", ranks)
    folder = changed(tiny_engine_dir, tmp_path / "e", tp_size=2, target=target)
    options = EngineOptions(
        1 << 22, threads=7, max_running=5, host_memory_bytes=1 << 20, step_timeout_s=9.0
    )
    open_engine(folder, options)
    ((told, timeouts),) = opened
    assert told.memory_budget_bytes == (1 << 22) // share
    assert told.host_memory_bytes == (1 << 20) // 2
    assert (told.threads, told.max_running) == (threads, 5)
    assert timeouts == {"step_s": 9.0}


def test_slots_are_those_that_every_rank_has() -> None:
    reports = [SlotCounts(5, 2), SlotCounts(3, 7), SlotCounts(4, 9)]
    assert agreed([one.to_json() for one in reports]) == SlotCounts(3, 2)
    with pytest.raises(EngineDead, match="rank 1 could not start:\nno room"):
        agreed([SlotCounts(5).to_json(), failed_start("no room")])


def test_opening_a_cpu_engine_loads_no_library_of_gpus(tiny_engine_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.open_engine import open_engine\n"
        f"open_engine(Path({str(tiny_engine_dir)!r})).close()\n"
        "found = {'torch', 'triton', 'tensorrt', 'tensorrt_rtx', 'mpi4py'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
