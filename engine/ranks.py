"""Tensor-parallel ranks: processes that run the same plans, each on its part of every weight.

The replica's process is rank 0. It starts the others through MPI, sends every StepPlan to all, samples.

    step    rank 0 checks the plan -> broadcast -> every rank's executor runs it -> rank 0 returns tokens
    idle    ranks wait for the next plan for as long as rank 0 lives

What ends a wait:

    a rank died              MPICH's launcher kills all of them, rank 0 too: the replica is gone at once, and
                             its conversations go on elsewhere
    a rank's process hangs   rank 0 sees its beats stand still for `rank_s`, and kills it: see above
    a live rank is stuck     rank 0 sees that it does nothing for `idle_s`, or computes for `busy_s` without
                             getting on, while others wait for it (rank_watch.py), and kills it: see above
    nobody is to blame       ranks wait for each other inside a step for `step_s`, then EngineDead
    rank 0 is gone           the launcher kills the ranks; each also looks after rank 0's process itself

MPI cannot be started twice in a process, so neither can a TensorParallelEngine: one in the life of a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import psutil

from engine.mpi_group import MpiGroup
from engine.plan_check import check_plan
from engine.plan_codec import PlanDamaged, decode_plan, encode_plan
from engine.protocol import Engine, EngineDead, StepPlan, StepResult
from engine.rank_activity import step_activity
from engine.rank_executors import (
    OpenExecutor,
    RankOptions,
    SlotCounts,
    agreed,
    failed_start,
    open_executor,
    returns_early,
    slot_counts,
)
from engine.rank_watch import (
    BUSY_S,
    IDLE_S,
    RANK_TIMEOUT_S,
    Beater,
    BeatThread,
    ProgressLimits,
    SharedSigns,
    Watcher,
)
from engine_build.manifest import SPEC
from engine_build.shard import check_tp_size
from engine_build.spec import EngineSpec

logger = logging.getLogger(__name__)

STOP = b"STOP"
_CLOSE_TIMEOUT_S = 5.0
_FAILED_START_S = 60.0
"""A start that failed on one rank is over for all after this, even where others wait for that rank."""


@dataclasses.dataclass(frozen=True, slots=True)
class RankTimeouts:
    """Seconds. `start_s`: until every rank has loaded its weights. `rank_s`: a process that does not move
    hangs. `idle_s`, `busy_s`: a rank that others wait for is stuck, see rank_watch.py. `step_s`: the longest
    wait of one rank for another inside a step."""

    start_s: float = 600.0
    rank_s: float = RANK_TIMEOUT_S
    idle_s: float = IDLE_S
    busy_s: float = BUSY_S
    step_s: float = 120.0


class RankGroup:
    """Rank 0's hold on the others, from their start to their end.

    `module` is what the other ranks run: it calls `main`. Raises SpecError where MPI's launcher is missing,
    EngineDead when a second group is started.
    """

    def __init__(
        self, size: int, options: RankOptions, timeouts: RankTimeouts, module: str = __name__
    ) -> None:
        self._thread: BeatThread | None = None
        self._watcher: Watcher | None = None
        self._timeouts = timeouts
        with tempfile.TemporaryDirectory(prefix="sinkserve-ranks-") as folder:
            file = Path(folder) / "signs"
            self._signs = SharedSigns(file, size, rank=0)
            told = {
                "options": dataclasses.asdict(options),
                "timeouts": dataclasses.asdict(timeouts),
                "signs": str(file),
                "rank0": os.getpid(),
            }
            arguments = ["-m", module, json.dumps(told)]
            self._group = MpiGroup.spawn(arguments, size - 1, timeouts.start_s)
            self.collective = self._group.collective
            self.collective.reached = self._signs.reached
            pids = self.collective.gather_text(str(os.getpid()), timeouts.start_s)
        self._pids = [int(pid) for pid in pids]

    def ready(self, mine: SlotCounts, early: bool = False) -> SlotCounts:
        """Wait until every rank has its executor; the slots that all of them have. `early`: see
        `rank_executors.returns_early`; such ranks are not taken for stuck before `warm`.

        Raises EngineDead with what a rank that could not start said.
        """
        timeouts = self._timeouts
        counts = agreed(self.collective.gather_text(mine.to_json(), timeouts.start_s))
        self.collective.timeout_s = timeouts.step_s
        # What a host that only launches may do for long is compile.
        busy_s = timeouts.step_s if early else min(timeouts.busy_s, timeouts.step_s)
        limits = ProgressLimits(timeouts.idle_s, busy_s, timeouts.step_s)
        beater = Beater(self._signs, step_activity)
        watcher = Watcher(self._signs, timeouts.rank_s, limits, self._hung)
        watcher.watches_progress = not early

        def tick() -> None:
            beater.beat()
            watcher.look()

        self._watcher = watcher
        self._thread = BeatThread(tick)
        return counts

    def launched(self) -> None:
        """Rank 0's of ranks that return early: the others now have to launch the plan that was sent."""
        self._signs.reached()

    def warm(self) -> None:
        """A step is over: connections are made, kernels compiled."""
        if self._watcher is not None:
            self._watcher.watches_progress = True

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
        self._group.leave()

    def kill(self, reason: str) -> None:
        """No step can work any more: end the ranks, and with them, most likely, this process."""
        self.collective.failed = reason
        self._kill()

    def _hung(self, rank: int, what: str) -> None:
        reason = f"rank {rank} (process {self._pids[rank]}) {what}"
        if self.collective.failed is None:
            logger.error("%s: it is killed, and the replica with it", reason)
        self.kill(reason)

    def _kill(self) -> None:
        for pid in self._pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class TensorParallelEngine:
    """See `engine.protocol.Engine`: the ranks of an engine directory, this process being rank 0.

    `max_resident` and `host_slots` are what the rank with the least memory has. Raises SpecError for a
    `tp_size` that does not fit or a missing launcher, what rank 0's executor raises, and EngineDead for a
    rank that does not start. The death of a rank ends this process (see the module).
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
            self._spec = self._executor.spec
            self._early = returns_early(self._spec)
            self._slots = self._group.ready(slot_counts(self._executor), self._early)
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
        return self._slots.max_resident

    @property
    def host_slots(self) -> int:
        """See `HasHostSlots`. A rank's host slot holds its part of a kv_slot."""
        return self._slots.host_slots

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`. Raises ValueError naming the field of a plan that no rank was told of."""
        if self._closed or self._executor is None:
            raise EngineDead("the engine is closed")
        check_plan(plan, self._spec, self._slots.max_resident, self._slots.host_slots)
        if not plan.rows and not plan.copies:
            return StepResult(())
        try:
            self._group.send(encode_plan(plan))
            if self._early:
                self._group.launched()
            result = self._executor.step(plan)
            self._group.warm()
            return result
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
        logger.error("rank 0 could not start: %s", error)
        try:
            self._group.collective.gather_text("{}", _FAILED_START_S)
        except EngineDead as late:
            self._group.collective.failed = str(late)


def run_rank(told: dict[str, Any], open_mine: OpenExecutor) -> None:
    """A rank other than 0, from its start to its end."""
    timeouts = RankTimeouts(**told["timeouts"])
    group = MpiGroup.join(timeouts.start_s)
    collective = group.collective
    rank0 = psutil.Process(told["rank0"])
    signs = SharedSigns(Path(told["signs"]), collective.size, collective.rank)
    beater = Beater(signs, step_activity)
    collective.reached = signs.reached

    def tick() -> None:
        beater.beat()
        if _is_gone(rank0):
            os._exit(1)

    thread = BeatThread(tick)
    collective.gather_text(str(os.getpid()), timeouts.start_s)
    executor: Engine | None = None
    try:
        executor = open_mine(RankOptions(**told["options"]), collective)
        report = slot_counts(executor).to_json()
    except Exception:
        traceback.print_exc()
        report = failed_start(traceback.format_exc())
    collective.gather_text(report, timeouts.start_s)
    collective.timeout_s = timeouts.step_s
    if executor is None:
        collective.next_message(_FAILED_START_S)
    else:
        early = returns_early(executor.spec)
        while (message := collective.next_message()) != STOP:
            _run_plan(executor, message)
            if early:
                signs.reached()
        executor.close()
    collective.gather_text("", _CLOSE_TIMEOUT_S)
    thread.stop()
    group.leave()


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _run_plan(executor: Engine, message: bytes) -> None:
    try:
        plan = decode_plan(message)
    except PlanDamaged as error:
        raise EngineDead(str(error)) from error
    with contextlib.suppress(ValueError):  # refused by every rank alike, and told by rank 0
        executor.step(plan)


def main(open_mine: OpenExecutor) -> None:
    """The program of a rank other than 0."""
    try:
        run_rank(json.loads(sys.argv[1]), open_mine)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # no waiting for others at exit: the launcher ends them all


if __name__ == "__main__":
    main(open_executor)
