"""Production's replica in virtual time: TurnRunner, its gate, watch and log, EngineLoop, ToyEngine.

All of it is the code that ships, but for the engine loop's thread: its crank is turned by a task of the
simulated process, so that one thread interleaves everything. What a pause stops is what waits for the
store, the engine or a client; a timer inside the runner still goes off while its process is paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from deployments import turn_task
from deployments.config import Limits, Tunables
from deployments.turn_call import TurnCall, TurnItem
from deployments.turn_progress import ClosedReply
from deployments.turn_runner import ReplicaParts, TurnRunner
from engine.loop import EngineLoop
from engine.loop_types import LoopConfig
from engine.protocol import StepPlan, StepResult
from engine.toy_engine import ToyEngine, ToyModel, ToyText, toy_reply, toy_spec
from engine.turn import StopCheck
from engine.window import SinkWindow
from tests.sim.replica import LEASE_S, Host
from tests.sim.toy import CAPACITY, EOS, FIRST_WORD, MODEL, POISON, STOP_PERIOD, VOCAB
from tests.sim.virtual import VirtualLoop
from tests.sim.world import Cast

SPEC = toy_spec(VOCAB, CAPACITY, max_chunk=8)
TEXT = ToyText(tuple(range(FIRST_WORD, VOCAB)), EOS, STOP_PERIOD)
TUNABLES = Tunables(limits=Limits(), lease_s=LEASE_S)


class Idle(Exception):
    """The engine loop has nothing to do."""


class IdleCondition(threading.Condition):
    """In place of the one that the loop's thread sleeps on."""

    def __init__(self, lock: Any, work: asyncio.Event) -> None:
        super().__init__(lock)
        self._work = work

    def wait(self, timeout: float | None = None) -> bool:
        raise Idle

    def notify_all(self) -> None:
        self._work.set()


class SteppedLoop(EngineLoop):
    """An engine loop without a thread of its own."""

    def __init__(self, engine: ToyEngine) -> None:
        super().__init__(engine, LoopConfig(max_running=3))
        self._thread.join()
        self.work = asyncio.Event()
        self._wake = IdleCondition(self._lock, self.work)

    def _run(self) -> None:
        """The thread ends at once."""

    def step(self) -> bool:
        """One step; False when there is nothing to do."""
        try:
            return self._turn_the_crank()
        except Idle:
            return False


class PoisonedEngine(ToyEngine):
    """Dies, and its process with it, of a token."""

    def __init__(self, host: Host) -> None:
        super().__init__(SPEC, host.max_slots, TEXT, salt=host.salt)
        self._process = host.process

    def step(self, plan: StepPlan) -> StepResult:
        if any(POISON in row.tokens for row in plan.rows):
            self._process.crash()
            raise Idle
        return super().step(plan)


class BareCodec:
    """Ids are all the text there is."""

    eos_ids = frozenset({EOS})

    def stop_check(self, stop: Sequence[str]) -> StopCheck | None:
        return None

    def close_reply(self, sampled: Sequence[int], stop: Sequence[str]) -> ClosedReply:
        ids = [token for token in sampled if token != EOS]
        closing = np.array([EOS], np.int32)
        return ClosedReply(np.array(ids, np.int32), closing, " ".join(map(str, ids)))


class RealReplica:
    """`tests.sim.client.Runner` over production's TurnRunner."""

    tunables = TUNABLES

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = SteppedLoop(PoisonedEngine(host))
        parts = ReplicaParts(host.process.name, SPEC, MODEL, self._loop, host.store, BareCodec())
        self._runner = TurnRunner(parts, self.tunables)
        host.process.spawn(self._turn_crank())

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        async with contextlib.aclosing(self._runner.turn(call)) as items:
            async for item in items:
                yield item

    async def _turn_crank(self) -> None:
        process = self._host.process
        while True:
            await self._loop.work.wait()
            await process.sleep(self._host.random.uniform(0.002, 0.1))
            if not self._loop.step():
                self._loop.work.clear()
            if process.died.is_set():
                for task in self._runner._turns.values():
                    if POISON in task.call.input_ids:
                        self._host.on_poison(task.call)
                await process.gate()


class HastyReplica(RealReplica):
    """Stores nothing before the commit."""

    tunables = TUNABLES.model_copy(update={"durability": "turn"})


@contextlib.contextmanager
def virtual_clock(loop: VirtualLoop) -> Iterator[None]:
    """The runner's only look at another clock than the event loop's."""
    clock = SimpleNamespace(monotonic=loop.time, perf_counter=time.perf_counter)
    with patch.object(turn_task, "time", clock):
        yield


def real_oracle(
    window: tuple[int, int], context: Sequence[int], call: TurnCall, turn: int
) -> list[int]:
    """What the salt-free engine must sample after `context`; slow and obvious."""
    sinks, recent = window
    places = SinkWindow(sinks, recent, SPEC.slot_tokens - sinks)
    request = (call.sampling, turn)
    model = ToyModel(VOCAB, TEXT)
    return toy_reply(model, places, context, request, call.max_tokens, frozenset({EOS}))


REAL = Cast(RealReplica, real_oracle, virtual_clock)
HASTY = Cast(HastyReplica, real_oracle, virtual_clock, durable=False)
