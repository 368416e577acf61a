"""Tensor-parallel ranks are real processes here: they compute what one does, and none outlives another.

Rank 0 runs in a process of its own (tests/tp_script.py), as MPI's launcher kills it when a rank dies.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import pytest

from engine.open_engine import open_engine
from engine.rank_watch import IDLE_S
from engine_build.build import BuildOptions, build_engine
from engine_build.manifest import load_manifest
from engine_build.spec import SpecError, WeightFormat
from tests.slot_copy_contract import CAPACITY, MAX_CHUNK
from tests.tiny_models import write_hf_folder
from tests.tp_rank import SLOW_S
from tests.tp_script import OPTIONS, conversations

pytestmark = pytest.mark.xdist_group("ranks")

MAX_ERROR = 1e-4
GONE_WITHIN_S = 5.0 + 15.0
"""What is promised on a machine that is free, and what a choked one may take beyond that."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sinkserve-tp-")


@functools.cache
def engine_dir(family: str, tp_size: int, weight_format: WeightFormat = "float32") -> Path:
    folder = Path(_folder().name) / f"{family}-{weight_format}"
    model = write_hf_folder(folder / "model", family)
    options = BuildOptions(40, 20, weight_format, tp_size=tp_size)
    return build_engine(model, folder / f"tp{tp_size}", options)


@functools.cache
def one_process(family: str, weight_format: WeightFormat = "float32") -> dict[str, Any]:
    engine = open_engine(engine_dir(family, 1, weight_format), OPTIONS)
    return conversations(engine)


class Rank0:
    """The script, and what it told so far."""

    def __init__(
        self, arguments: tuple[object, ...], environ: Mapping[str, str], log: IO[str]
    ) -> None:
        # A shell of the same process group stands for the others of a node, which must live on.
        shell = ["sh", "-c", '"$@"; echo "{\\"bystander\\": true}"', "sh"]
        command = [*shell, sys.executable, "-m", "tests.tp_script", *map(str, arguments)]
        code = str(Path(__file__).resolve().parent.parent)
        self._log = log
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": code, **environ},
            cwd=code,
            start_new_session=True,
        )
        self.told: dict[str, Any] = {}

    def until(self, *keys: str) -> dict[str, Any]:
        """Read what it tells until it told all of `keys`, or ends."""
        assert self.process.stdout is not None
        while not self.told.keys() >= set(keys) and (line := self.process.stdout.readline()):
            self.told |= json.loads(line)
        return self.told

    @property
    def ranks(self) -> list[int]:
        pids: list[int] = self.until("ranks")["ranks"]
        return pids

    @property
    def pid(self) -> int:
        pid: int = self.until("pid")["pid"]
        return pid

    def log(self) -> str:
        """What it and its ranks said on stderr so far. They write where this reads: the offset is theirs."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def is_over(self) -> bool:
        """It ended, or its engine did, and no rank is left; nobody else was hurt."""
        over = "dead" in self.told or not alive(self.pid)
        return over and not any(map(alive, self.ranks))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(check: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + GONE_WITHIN_S
    while not check():
        assert time.monotonic() < deadline_s, "it did not end"
        time.sleep(0.05)


@contextmanager
def rank0(*arguments: object, **environ: str) -> Iterator[Rank0]:
    with tempfile.TemporaryFile("w+", prefix="sinkserve-tp-") as log:
        one = Rank0(arguments, environ, log)
        try:
            yield one
        finally:
            for pid in filter(alive, [one.pid, *one.ranks] if "ranks" in one.told else []):
                os.kill(pid, signal.SIGKILL)
            assert one.until("bystander").get("bystander"), "the launcher killed a bystander"
            one.process.wait()


def computed(folder: Path, tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / "logits.npz"
    with rank0(folder, "compute", out) as one:
        told = one.until("lived")
        assert told.get("lived"), "the launcher killed a process that had closed its engine"
        assert "kv_slot" in told["refused"]
        wait_for(lambda: not any(map(alive, one.ranks)))
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("family", "tp_size"), [("llama", 2), ("llama", 4), ("qwen2", 2), ("llama-bias", 2)]
)
def test_ranks_compute_what_one_process_does(family: str, tp_size: int, tmp_path: Path) -> None:
    """Ring wraps, mixed rows, bounded replay, a stay in host memory; key/value heads on one rank each,
    or on two."""
    got, wanted = computed(engine_dir(family, tp_size), tmp_path), one_process(family)
    assert got.keys() == wanted.keys()
    for name, logits in wanted.items():
        assert got[name].shape == logits.shape
        assert np.abs(got[name] - logits).max() < MAX_ERROR, name
    assert (got["sampled"] == wanted["sampled"]).all()


def test_8_bit_ranks_are_as_good_as_8_bits_are(tmp_path: Path) -> None:
    """Blocks of 64 weights are cut at other places, so rounding differs; no error is larger for it."""
    exact, eight = one_process("llama"), one_process("llama", "int8")
    got = computed(engine_dir("llama", 2, "int8"), tmp_path)
    for name in ("chunks", "mixed0", "mixed1", "replay"):
        error = np.abs(got[name] - exact[name]).mean()
        assert error < 1.2 * np.abs(eight[name] - exact[name]).mean(), name


def test_ranks_copy_their_parts_of_a_kv_slot(tmp_path: Path) -> None:
    """The suite of slot_copy_contract.py, on one group."""
    model = write_hf_folder(tmp_path / "model")
    options = BuildOptions(CAPACITY, MAX_CHUNK, "float32", tp_size=2)
    with rank0(build_engine(model, tmp_path / "e", options), "copies") as one:
        assert len(one.until("passed").get("passed", ())) >= 4, one.log()


def test_an_engine_directory_of_ranks_is_whole_and_lends_its_files(tmp_path: Path) -> None:
    model = write_hf_folder(tmp_path / "model")
    built = build_engine(model, tmp_path / "a", BuildOptions(40, 20, "float32", tp_size=2))
    files = load_manifest(built, verify="sha256").files
    assert {"rank0/graph.onnx", "rank1/weights.safetensors"} <= files.keys()
    assert (built / "rank0/graph.onnx").read_bytes() == (built / "rank1/graph.onnx").read_bytes()
    wider = build_engine(model, tmp_path / "b", BuildOptions(64, 20, "float32", tp_size=2))
    assert os.path.samefile(
        built / "rank1/weights.safetensors", wider / "rank1/weights.safetensors"
    )
    alone = build_engine(model, tmp_path / "c", BuildOptions(40, 20, "float32"))
    assert not (alone / "rank0").exists()
    with pytest.raises(SpecError, match=r"tp_size.*Use one of 1, 2, 4$"):
        build_engine(model, tmp_path / "d", BuildOptions(40, 20, "float32", tp_size=3))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("scenario", ["run", pytest.param("idle", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_takes_all_down(scenario: str, sent: signal.Signals) -> None:
    with rank0(engine_dir("llama", 2), scenario, 600) as one:
        one.until("running" if scenario == "run" else "ranks")
        os.kill(one.ranks[-1], sent)
        wait_for(one.is_over)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_one_of_four_ranks_hangs(victim: int) -> None:
    with rank0(engine_dir("llama", 4), "run") as one:
        one.until("running")
        os.kill(one.ranks[victim], signal.SIGSTOP)
        wait_for(one.is_over)


@pytest.mark.parametrize("scenario", ["run", pytest.param("idle", marks=pytest.mark.slow)])
def test_no_rank_outlives_rank_0(scenario: str) -> None:
    with rank0(engine_dir("llama", 4), scenario, 600) as one:
        one.until("running" if scenario == "run" else "ranks")
        assert all(map(alive, one.ranks))
        os.kill(one.pid, signal.SIGKILL)
        wait_for(one.is_over)


def test_neither_rest_nor_a_short_pause_is_a_hang() -> None:
    """Idle for longer than a process may stand still; then a rank is stopped for less than that."""
    with rank0(engine_dir("llama", 2), "idle", 4.5) as one:
        assert one.until("running").get("running")
        (rank,) = one.ranks
        os.kill(rank, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(rank, signal.SIGCONT)
        time.sleep(1.0)
        assert alive(rank)
        assert alive(one.pid)


def test_a_live_rank_that_lags_is_given_up() -> None:
    with rank0(engine_dir("llama", 2), "deadline") as one:
        one.until("running")
        os.kill(one.ranks[0], signal.SIGSTOP)
        assert "did not come for 1 s" in one.until("dead")["dead"]
        wait_for(one.is_over)


@contextmanager
def troubled(trouble: str, **timeouts_s: float) -> Iterator[Rank0]:
    """Two ranks that decode; see tp_rank.py. They would wait for each other for ever."""
    timeouts = json.dumps({"step_s": 600.0, **timeouts_s})
    with rank0(engine_dir("llama", 2), "trouble", timeouts, TP_TROUBLE=trouble) as one:
        assert one.until("running").get("running"), one.log()
        yield one


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_beats_but_is_stuck_takes_all_down(victim: int) -> None:
    with troubled(f"lock:{victim}") as one:
        wait_for(one.is_over)
        assert f"rank {victim} (process" in one.log()
        assert "is stuck in a step: it did nothing for 3." in one.log()
        assert "went_on" not in one.told


def test_a_rank_that_computes_for_long_is_waited_for() -> None:
    """Longer than a stuck one lives; the next step is as fast as ever."""
    assert SLOW_S > 2 * IDLE_S
    with troubled("slow:1") as one:
        assert one.until("went_on").get("went_on"), one.log()
        assert not one.is_over()


@pytest.mark.slow
def test_a_rank_in_an_endless_loop_is_given_up_when_it_has_used_its_time() -> None:
    with troubled("loop:1", busy_s=2.0) as one:
        wait_for(one.is_over)
        assert "others waited for it while it computed for 2." in one.log()


def test_a_rank_that_cannot_start_says_why(tmp_path: Path) -> None:
    model = write_hf_folder(tmp_path / "model")
    folder = build_engine(model, tmp_path / "e", BuildOptions(40, 20, "float32", tp_size=2))
    graph = folder / "rank1" / "graph.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    with rank0(folder, "run") as one:
        assert "rank 1 could not start" in one.until("refused")["refused"]
        assert "graph.onnx" in one.told["refused"]
