"""No token is shown before it is stored.

    engine thread   sampled, sampled, ...  | one wake-up a step
    event loop      all that has come --> one store.checkpoint --> each turn is handed its events
                    what comes meanwhile is the next batch

The engine never waits for the store. While the store is away output is held, for `store_hold_s` at
most; a turn without output has its lease renewed instead. With `durability: turn` nothing is stored
before the commit, and events pass at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.conversation import Checkpoint, Fence
from cluster.store import (
    ConversationStore,
    Fenced,
    NotFound,
    RolledBack,
    StoreError,
    StoreUnavailable,
)
from deployments.config import Tunables
from deployments.task_ending import end_tasks
from engine.turn import TokenSampled, TurnEvent

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class ClaimLost:
    """The turn cannot go on here: another owner exists, the conversation is gone (Fenced, NotFound), or
    its output could not be stored (any other error)."""

    error: StoreError


LaneEvent = TurnEvent | ClaimLost


@dataclass(slots=True, eq=False)
class Lane:
    """One turn's way through the gate. Of `token_ids`, all that is known of the reply up to here, the
    first `num_stored` are in the store. On the event loop, `deliver` gets the events in order, and
    `repair` puts back what the store has lost (raises StoreError)."""

    tenant: str
    conversation_id: str
    fence: Fence
    deliver: Callable[[Sequence[LaneEvent]], None]
    repair: Callable[[], Awaitable[None]]
    durable: bool
    token_ids: list[int]
    num_stored: int
    queue: deque[TurnEvent] = field(default_factory=deque)
    is_open: bool = True
    renewed: bool = True
    asked_s: float | None = None
    held: bool = False


@dataclass(slots=True)
class GateFigures:
    """Round trips, tokens stored before they were shown, and seconds for which output was held."""

    checkpoints: int = 0
    checkpointed_tokens: int = 0
    held_s: float = 0.0


class OutputGate:
    """Of one replica. Use it from one event loop; `put` and `wake` are for the engine's thread."""

    def __init__(self, store: ConversationStore, tunables: Callable[[], Tunables]) -> None:
        self.figures = GateFigures()
        self._store = store
        self._tunables = tunables
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._signalled = False
        self._inbox: deque[tuple[Lane, TurnEvent]] = deque()
        self._lanes: dict[Lane, None] = {}
        # With events to pass, and with a lease to renew; a dict keeps their order.
        self._ready: dict[Lane, None] = {}
        self._due: dict[Lane, None] = {}
        self._tasks = (asyncio.create_task(self._run()), asyncio.create_task(self._renew()))

    def open(self, lane: Lane) -> None:
        """From now on the turn's lease is kept alive."""
        self._lanes[lane] = None

    def shut(self, lane: Lane) -> None:
        """Let nothing of the turn through any more; idempotent."""
        lane.is_open = False
        lane.queue.clear()
        for lanes in (self._lanes, self._ready, self._due):
            lanes.pop(lane, None)

    def put(self, lane: Lane, event: TurnEvent) -> None:
        """From the engine's thread; `wake` follows."""
        self._inbox.append((lane, event))

    def wake(self) -> None:
        """From any thread: there are new events."""
        if not self._signalled:
            self._signalled = True
            # The loop may be gone when the engine's thread outlives it.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._woken.set)

    async def close(self) -> None:
        """Stop; nothing gets through any more. Idempotent."""
        await end_tasks(self._tasks)

    async def _run(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            # Before the inbox is read: an event put after this wakes the loop again.
            self._signalled = False
            self._sort()
            while self._ready or self._due:
                try:
                    await self._pass(self._batch())
                except Exception as error:
                    log.exception("the output gate failed")
                    for lane in list(self._ready):
                        self._lose(lane, StoreError(f"the output gate failed: {error}"))
                self._sort()

    async def _renew(self) -> None:
        """Lanes that were not heard of for a third of the lease are due."""
        while True:
            await asyncio.sleep(self._tunables().lease_s / 3)
            for lane in self._lanes:
                if not lane.renewed:
                    self._due[lane] = None
                lane.renewed = False
            if self._due:
                self.wake()

    def _sort(self) -> None:
        while self._inbox:
            lane, event = self._inbox.popleft()
            if lane.is_open:
                lane.queue.append(event)
                self._ready[lane] = None

    def _batch(self) -> list[tuple[Lane, int, Checkpoint | None]]:
        """For each lane how many of its events pass, and what must be stored for that."""
        lease_s = self._tunables().lease_s
        batch: list[tuple[Lane, int, Checkpoint | None]] = []
        for lane in {**self._ready, **self._due}:
            fresh = [event.token_id for event in lane.queue if isinstance(event, TokenSampled)]
            ids = [*lane.token_ids[lane.num_stored :], *fresh] if lane.durable and fresh else []
            checkpoint: Checkpoint | None = None
            if ids and lane.asked_s is None:
                lane.asked_s = self._loop.time()
            if ids or lane in self._due:
                checkpoint = Checkpoint(
                    lane.conversation_id,
                    lane.tenant,
                    lane.fence,
                    lane.num_stored,
                    np.array(ids, np.int32),
                    lease_s,
                )
            batch.append((lane, len(lane.queue), checkpoint))
        self._due.clear()
        return batch

    async def _pass(self, batch: list[tuple[Lane, int, Checkpoint | None]]) -> None:
        wanted = [checkpoint for _, _, checkpoint in batch if checkpoint is not None]
        answers = iter(await self._ask(wanted) if wanted else ())
        pause = False
        for lane, count, checkpoint in batch:
            error = next(answers) if checkpoint is not None else None
            if not lane.is_open:
                continue
            if checkpoint is None or error is None:
                self._let_through(lane, count, checkpoint)
                continue
            if isinstance(error, RolledBack):
                error = await self._put_back(lane, error)
            pause |= self._refused(lane, checkpoint, error)
        if pause:
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _ask(self, wanted: list[Checkpoint]) -> Sequence[StoreError | None]:
        figures = self.figures
        try:
            async with asyncio.timeout(max(self._left_s(self._ready), RETRY_PAUSE_S)):
                answers = await self._store.checkpoint(wanted)
        except TimeoutError:
            return [StoreUnavailable("no answer in time")] * len(wanted)
        except StoreError as error:
            return [error] * len(wanted)
        figures.checkpoints += 1
        stored = zip(wanted, answers, strict=True)
        figures.checkpointed_tokens += sum(len(c.token_ids) for c, error in stored if error is None)
        return answers

    def _let_through(self, lane: Lane, count: int, checkpoint: Checkpoint | None) -> None:
        events = [lane.queue.popleft() for _ in range(count)]
        lane.token_ids += [e.token_id for e in events if isinstance(e, TokenSampled)]
        if checkpoint is not None:
            lane.num_stored += len(checkpoint.token_ids)
            lane.renewed = True
            self._no_longer_held(lane)
        if not lane.queue:
            self._ready.pop(lane, None)
        if events:
            lane.deliver(events)

    async def _put_back(self, lane: Lane, error: RolledBack) -> StoreError:
        """The store lost what it had acknowledged: the reason to try again, or not to."""
        try:
            await lane.repair()
        except StoreError as refusal:
            return refusal
        return error

    def _refused(self, lane: Lane, checkpoint: Checkpoint, error: StoreError) -> bool:
        """Whether output is held, for the store to come back."""
        if isinstance(error, Fenced | NotFound):
            self._lose(lane, error)
            return False
        if not len(checkpoint.token_ids):
            # Safety is the fence's: a claim that was lost meanwhile is noticed at the next write.
            log.warning("lease of %s not renewed: %s", lane.conversation_id, error)
            return False
        lane.held = True
        if self._left_s([lane]) > 0:
            return True
        self._lose(lane, error)
        return False

    def _left_s(self, lanes: Iterable[Lane]) -> float:
        """Until the output of one of them has been held for too long."""
        asked_s = [lane.asked_s for lane in lanes if lane.asked_s is not None]
        now_s = self._loop.time()
        return self._tunables().store_hold_s - (now_s - min(asked_s, default=now_s))

    def _no_longer_held(self, lane: Lane) -> None:
        if lane.held and lane.asked_s is not None:
            self.figures.held_s += self._loop.time() - lane.asked_s
        lane.held, lane.asked_s = False, None

    def _lose(self, lane: Lane, error: StoreError) -> None:
        self._no_longer_held(lane)
        self.shut(lane)
        lane.deliver([ClaimLost(error)])
