"""Tensor-parallel ranks: processes that run the same plans, each on its part of every weight.

The replica's process is rank 0. It starts the others through MPI, sends every StepPlan to all, samples.

    step    rank 0 checks the plan -> broadcast -> every rank's executor runs it -> rank 0 returns tokens
    idle    ranks wait for the next plan for as long as rank 0 lives

What ends a wait:

    a rank died              MPICH's launcher kills all of them, rank 0 too: the replica is gone at once, and
                             its conversations go on elsewhere
    a rank's process hangs   rank 0 sees its counter stand still (rank_watch.py) and kills it: see above
    a live rank lags         an all-reduce waits for it for `step_timeout_s`, then EngineDead: nothing tells
                             a live process that is stuck from one that is slow
    rank 0 is gone           the launcher kills the ranks; each also looks after rank 0's process itself

This is the only file that imports mpi4py. Its MPI cannot be started twice in a process, so neither can a
TensorParallelEngine: one in the life of a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mpi4py
import numpy as np
import psutil

from engine.collective import Floats
from engine.plan_check import check_plan
from engine.plan_codec import PlanDamaged, decode_plan, encode_plan
from engine.protocol import Engine, EngineDead, StepPlan, StepResult
from engine.rank_executors import RankOptions, open_executor
from engine.rank_watch import RANK_TIMEOUT_S, Beats, BeatThread, watcher
from engine_build.manifest import SPEC
from engine_build.shard import check_tp_size
from engine_build.spec import EngineSpec, SpecError

mpi4py.rc(finalize=False)  # at exit it would wait for ranks that are gone
from mpi4py import MPI  # noqa: E402

logger = logging.getLogger(__name__)

STOP = b"STOP"
_BLOCK_BYTES = 4096
_LENGTH_BYTES = 8
_REPORT_BYTES = 16384
_CLOSE_TIMEOUT_S = 5.0
_SPIN_S = 0.002
_SHORTEST_NAP_S, _LONGEST_NAP_S = 20e-6, 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class RankTimeouts:
    """Seconds. `start_s`: until every rank has loaded its weights. `rank_s`: a process that does not move
    hangs. `step_s`: the longest wait of one rank for another inside a step."""

    start_s: float = 600.0
    rank_s: float = RANK_TIMEOUT_S
    step_s: float = 120.0


class MpiCollective:
    """See `engine.collective.Collective`; ranks are those of `comm`, all on this machine.

    No call blocks inside MPI: requests are polled. Polling spins, yielding, for as long as each rank can
    have a core of its own, then naps.
    """

    def __init__(self, comm: MPI.Intracomm, timeout_s: float) -> None:
        self.failed: str | None = None
        self._comm = comm
        self._timeout_s = timeout_s
        self._spin_s = _SPIN_S if comm.size <= len(os.sched_getaffinity(0)) else 0.0

    @property
    def rank(self) -> int:
        return int(self._comm.rank)

    @property
    def size(self) -> int:
        return int(self._comm.size)

    def all_reduce(self, values: Floats) -> None:
        """See `Collective.all_reduce`."""
        self._wait(self._comm.Iallreduce(MPI.IN_PLACE, values), self._timeout_s)

    def gather(self, values: Floats) -> Floats | None:
        """See `Collective.gather`."""
        values = np.ascontiguousarray(values)
        every = np.empty((self.size, *values.shape), np.float32) if self.rank == 0 else None
        self._wait(self._comm.Igather(values, every, root=0), self._timeout_s)
        return every

    def broadcast(self, data: bytes) -> bytes:
        """See `Collective.broadcast`."""
        return self._broadcast(data, self._timeout_s)

    def next_message(self) -> bytes:
        """What rank 0 broadcasts next, however long that takes."""
        return self._broadcast(b"", None)

    def gather_text(self, text: str, timeout_s: float) -> list[str]:
        """The texts of all ranks (their last 16 KiB) on rank 0, nothing on the others."""
        mine = np.zeros(_REPORT_BYTES, np.uint8)
        data = text.encode()[-_REPORT_BYTES:]
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        every = np.empty((self.size, _REPORT_BYTES), np.uint8) if self.rank == 0 else None
        self._wait(self._comm.Igather(mine, every, root=0), timeout_s)
        if every is None:
            return []
        return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in every]

    def _broadcast(self, data: bytes, timeout_s: float | None) -> bytes:
        """Length and beginning in one block, what does not fit into it in a second message."""
        block = np.zeros(_BLOCK_BYTES, np.uint8)
        room = _BLOCK_BYTES - _LENGTH_BYTES
        if self.rank == 0:
            head = len(data).to_bytes(_LENGTH_BYTES, "little") + data[:room]
            block[: len(head)] = np.frombuffer(head, np.uint8)
        self._wait(self._comm.Ibcast(block, root=0), timeout_s)
        length = int.from_bytes(block[:_LENGTH_BYTES].tobytes(), "little")
        received = block[_LENGTH_BYTES : _LENGTH_BYTES + length].tobytes()
        if length <= room:
            return received
        rest = np.zeros(length - room, np.uint8)
        if self.rank == 0:
            rest[:] = np.frombuffer(data[room:], np.uint8)
        self._wait(self._comm.Ibcast(rest, root=0), self._timeout_s)
        return received + rest.tobytes()

    def _wait(self, request: MPI.Request, timeout_s: float | None) -> None:
        began_s = time.perf_counter()
        try:
            while not request.Test():
                if self.failed is not None:
                    raise EngineDead(self.failed)
                waited_s = time.perf_counter() - began_s
                if timeout_s is not None and waited_s > timeout_s:
                    raise EngineDead(f"the other ranks did not come for {timeout_s:.0f} s")
                if waited_s < self._spin_s:
                    os.sched_yield()
                else:
                    time.sleep(min(max(waited_s / 20, _SHORTEST_NAP_S), _LONGEST_NAP_S))
        except MPI.Exception as error:
            raise EngineDead(f"MPI: {error}") from error


class RankGroup:
    """Rank 0's hold on the others, from their start to their end.

    Raises SpecError where MPI's launcher is missing, EngineDead when a second group is started.
    """

    def __init__(self, size: int, options: RankOptions, timeouts: RankTimeouts) -> None:
        if MPI.Is_finalized():
            raise EngineDead("a process can start tensor-parallel ranks once. Start a new process")
        _leave_process_group()
        self._thread: BeatThread | None = None
        self._timeouts = timeouts
        with tempfile.TemporaryDirectory(prefix="sinkserve-ranks-") as folder:
            beats_file = Path(folder) / "beats"
            beats = Beats(beats_file, size, rank=0)
            told = {
                "options": dataclasses.asdict(options),
                "timeouts": dataclasses.asdict(timeouts),
                "beats": str(beats_file),
                "rank0": os.getpid(),
            }
            arguments = ["-m", __name__, json.dumps(told)]
            try:
                with _launcher_environment():
                    self._ranks = MPI.COMM_SELF.Spawn(sys.executable, arguments, size - 1)
                comm = self._ranks.Merge(high=False)
            except MPI.Exception as error:
                raise EngineDead(f"the ranks could not be started: {error}") from error
            self._comm = comm
            self.collective = MpiCollective(comm, timeouts.step_s)
            pids = self.collective.gather_text(str(os.getpid()), timeouts.start_s)
        self._beats = beats
        self._pids = [int(pid) for pid in pids]

    def ready(self, max_resident: int) -> int:
        """Wait until every rank has its executor; the kv_slots that all of them have.

        Raises EngineDead with what a rank that could not start said.
        """
        mine = json.dumps({"max_resident": max_resident})
        reports = self.collective.gather_text(mine, self._timeouts.start_s)
        found: list[dict[str, Any]] = [json.loads(report) for report in reports]
        for rank, report in enumerate(found):
            if "failed" in report:
                raise EngineDead(f"rank {rank} could not start:\n{report['failed']}")
        tick = watcher(self._beats, len(found), self._timeouts.rank_s, self._hung)
        self._thread = BeatThread(tick)
        return min(int(report["max_resident"]) for report in found)

    def send(self, data: bytes) -> None:
        """Tell all ranks."""
        self.collective.broadcast(data)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Let the ranks end, and MPI with them; kill those that do not come."""
        try:
            if self.collective.failed is not None:
                raise EngineDead(self.collective.failed)
            self.send(STOP)
            self.collective.gather_text("", timeout_s)
        except EngineDead:
            self._kill()
            return
        finally:
            if self._thread is not None:
                self._thread.stop()
        self._comm.Free()
        self._ranks.Disconnect()
        MPI.Finalize()  # the launcher takes an end without it for a crash, and would kill this process

    def kill(self, reason: str) -> None:
        """No step can work any more: end the ranks, and with them, most likely, this process."""
        self.collective.failed = reason
        self._kill()

    def _hung(self, rank: int) -> None:
        pid = self._pids[rank]
        reason = f"rank {rank} (process {pid}) has not moved for {self._timeouts.rank_s} s"
        if self.collective.failed is None:
            logger.error("%s: it is killed, and the replica with it", reason)
        self.kill(reason)

    def _kill(self) -> None:
        for pid in self._pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class TensorParallelEngine:
    """See `engine.protocol.Engine`: the ranks of an engine directory, this process being rank 0.

    `max_resident` is what the rank with the least memory has. Raises SpecError for a `tp_size` that does
    not fit or a missing launcher, what rank 0's executor raises, and EngineDead for a rank that does not
    start. The death of a rank ends this process (see the module).
    """

    def __init__(self, options: RankOptions, timeouts: RankTimeouts | None = None) -> None:
        text = (Path(options.engine_dir) / SPEC).read_text(encoding="utf-8")
        size = EngineSpec.from_json(text).tp_size
        check_tp_size(EngineSpec.from_json(text).model, size)
        self._closed = False
        self._group = RankGroup(size, options, timeouts or RankTimeouts())
        self._executor: Engine | None = None
        try:
            self._executor = open_executor(options, self._group.collective)
            self._max_resident = self._group.ready(self._executor.max_resident)
            self._spec = self._executor.spec
        except BaseException as error:
            if self._executor is None:
                self._refuse(error)
            self.close()
            raise

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def max_resident(self) -> int:
        return self._max_resident

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`. Raises ValueError naming the field of a plan that no rank was told of."""
        if self._closed or self._executor is None:
            raise EngineDead("the engine is closed")
        check_plan(plan, self._spec, self._max_resident)
        if not plan.rows:
            return StepResult(())
        try:
            self._group.send(encode_plan(plan))
            return self._executor.step(plan)
        except EngineDead as error:
            self._group.collective.failed = str(error)
            raise

    def close(self) -> None:
        """See `Engine.close`."""
        if self._closed:
            return
        self._closed = True
        if self._executor is not None:
            self._executor.close()
        self._group.close()

    def _refuse(self, error: BaseException) -> None:
        """Rank 0 could not start: the others still have to be heard before they can be told to stop."""
        with contextlib.suppress(EngineDead):
            self._group.collective.gather_text("{}", RankTimeouts().start_s)
        logger.error("rank 0 could not start: %s", error)


def _leave_process_group() -> None:
    """The launcher kills rank 0's whole process group, and a Ray worker shares the one of its node."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


@contextlib.contextmanager
def _launcher_environment() -> Iterator[None]:
    """`mpiexec` of this environment first on PATH, and this code importable in the ranks."""
    beside, code = str(Path(sys.executable).parent), str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [beside, os.environ.get("PATH", "")]))
    if shutil.which("mpiexec", path=path) is None:
        raise SpecError(
            "tp_size",
            "there is no mpiexec to start tensor-parallel ranks with",
            "Install the `mpich` package into this environment",
        )
    imports = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH", "")]))
    before = {name: os.environ.get(name) for name in ("PATH", "PYTHONPATH")}
    os.environ.update(PATH=path, PYTHONPATH=imports)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_rank(told: dict[str, Any]) -> None:
    """A rank other than 0, from its start to its end."""
    timeouts = RankTimeouts(**told["timeouts"])
    parent = MPI.Comm.Get_parent()
    comm = parent.Merge(high=True)
    collective = MpiCollective(comm, timeouts.step_s)
    rank0 = psutil.Process(told["rank0"])
    beats = Beats(Path(told["beats"]), comm.size, comm.rank)

    def tick() -> None:
        beats.beat()
        if not rank0.is_running() or rank0.status() == psutil.STATUS_ZOMBIE:
            os._exit(1)

    thread = BeatThread(tick)
    collective.gather_text(str(os.getpid()), timeouts.start_s)
    executor: Engine | None = None
    report: dict[str, Any]
    try:
        executor = open_executor(RankOptions(**told["options"]), collective)
        report = {"max_resident": executor.max_resident}
    except Exception:
        report = {"failed": traceback.format_exc()[-2000:]}
    collective.gather_text(json.dumps(report), timeouts.start_s)
    while (message := collective.next_message()) != STOP:
        if executor is not None:
            _run_plan(executor, message)
    if executor is not None:
        executor.close()
    collective.gather_text("", _CLOSE_TIMEOUT_S)
    thread.stop()
    comm.Free()
    parent.Disconnect()
    MPI.Finalize()


def _run_plan(executor: Engine, message: bytes) -> None:
    try:
        plan = decode_plan(message)
    except PlanDamaged as error:
        raise EngineDead(str(error)) from error
    with contextlib.suppress(ValueError):  # refused by every rank alike, and told by rank 0
        executor.step(plan)


if __name__ == "__main__":
    try:
        run_rank(json.loads(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # no waiting for others at exit: the launcher ends them all
