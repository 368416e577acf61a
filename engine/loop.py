"""The thread that runs turns: `plan = schedule(); result = engine.step(plan); apply(result)`.

    submit -> waiting -> running -> ended -> settle | discard
                 |          |         ^
                 +--cancel--+---------+      (TurnError ends a turn and gives its slot back)

A turn waits, first come first served, for room in the step and for a kv_slot. Its events are handed to
its callback on the loop's thread, in order and outside the lock, so a callback may call the loop.
A callback that raises loses its turn, nothing else does. After all events of a step one more callback
(`notify`) tells that they have come, so that their owner wakes up once a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from engine.loop_types import (
    LoopConfig,
    LoopStats,
    LoopStopped,
    Overloaded,
    TurnHandle,
    TurnRunning,
)
from engine.protocol import (
    Engine,
    FinishReason,
    RowResult,
    SlotCopy,
    StepPlan,
    StepResult,
    num_host_slots,
)
from engine.residency import Lease, Residency
from engine.running_turn import OnEvent, RunningTurn, check_request, checked_counts, run_plan
from engine.scheduler import Scheduler, SchedulerConfig, Share
from engine.turn import TokenSampled, TurnEnded, TurnError, TurnEvent, TurnRequest, TurnStarted

logger = logging.getLogger(__name__)


class EngineLoop:
    """Owns `engine` and its thread, which starts at once. All methods may be called from any thread.

    Raises ValueError for a configuration that does not fit the engine.
    """

    def __init__(
        self,
        engine: Engine,
        config: LoopConfig | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = config or LoopConfig()
        max_running = min(config.max_running, engine.max_resident)
        max_chunk = engine.spec.max_chunk
        self._engine = engine
        self._max_waiting = config.max_waiting
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_running=max_running,
                token_budget=max_running + (config.prefill_tokens or max_chunk),
                max_chunk=max_chunk,
            )
        )
        self._residency = Residency(engine.max_resident, num_host_slots(engine))
        # In order, for the next step that has rows: nothing overwrites a slot in between.
        self._copies: list[SlotCopy] = []
        self._clock = clock
        self._waiting: deque[RunningTurn] = deque()
        self._running: dict[int, RunningTurn] = {}
        self._turns: dict[str, RunningTurn] = {}
        self._outbox: list[tuple[RunningTurn, TurnEvent]] = []
        self._next_number = 0
        self._num_steps = 0
        self._prefilled_tokens = 0
        self._generated_tokens = 0
        self._step_began_s: float | None = None
        self._stopping: Literal["no", "drain", "now"] = "no"
        self._dead: str | None = None
        # Re-entrant: `TurnRequest.prefill` and `StopCheck` run under it and may ask for stats.
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._after_events: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    # What the owner of the loop calls.

    def submit(self, request: TurnRequest, on_event: OnEvent) -> TurnHandle:
        """Queue a turn. Its events go to `on_event`; the last one is TurnEnded or TurnError.

        Raises Overloaded, TurnRunning, LoopStopped; ValueError unless `max_tokens` leaves a token to
        sample and the window fits the engine.
        """
        check_request(request, self._engine.spec)
        with self._lock:
            if self._dead is not None or self._stopping != "no":
                raise LoopStopped(self._dead or "the engine is stopping")
            if request.conversation_id in self._turns:
                raise TurnRunning(f"{request.conversation_id} has a turn already")
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(f"{len(self._waiting)} turns are waiting already")
            turn = RunningTurn(self._next_number, request, on_event, self._clock())
            self._next_number += 1
            self._turns[request.conversation_id] = turn
            self._waiting.append(turn)
            self._wake.notify_all()
        return TurnHandle(lambda: self._cancel(turn))

    def notify(self, after_events: Callable[[], None]) -> None:
        """Call this on the loop's thread whenever a batch of events has been handed out."""
        self._after_events = after_events

    def cancel(self, conversation_id: str) -> None:
        """End the conversation's turn before the next step; no effect if it has none running."""
        with self._lock:
            turn = self._turns.get(conversation_id)
            if turn is not None:
                self._cancel(turn)

    def settle(self, conversation_id: str, head: str, length: int) -> None:
        """The ended turn is committed as `head`; its slot becomes clean and may serve the next turn.

        At most the first `length` cached tokens are part of the commit; surplus ones are rewound, or
        the slot is given up where that is not exact. No effect if there is no slot to settle.
        Raises TurnRunning before TurnEnded.
        """
        with self._lock:
            turn = self._turns.get(conversation_id)
            if turn is None:
                return
            if turn.phase != "ended":
                raise TurnRunning(f"{conversation_id} has not ended its turn")
            del self._turns[conversation_id]
            self._residency.settle(conversation_id, head, length)
            self._wake.notify_all()

    def discard(self, conversation_id: str) -> None:
        """The turn never was: cancel it if it runs, and free its slot or take it back to where the
        turn began. A turn that still runs is told nothing more. No effect if there is none."""
        with self._lock:
            turn = self._turns.get(conversation_id)
            if turn is not None:
                self._forget(turn)

    def stats(self, max_residents: int = 1000) -> LoopStats:
        with self._lock:
            began_s = self._step_began_s
            return LoopStats(
                running=len(self._running),
                waiting=len(self._waiting),
                unsettled=sum(turn.phase == "ended" for turn in self._turns.values()),
                num_slots=self._residency.num_slots,
                free_slots=self._residency.num_free,
                clean_slots=self._residency.num_clean,
                num_steps=self._num_steps,
                prefilled_tokens=self._prefilled_tokens,
                generated_tokens=self._generated_tokens,
                evicted_slots=self._residency.num_evicted,
                host_slots=self._residency.num_host_slots,
                host_slots_used=self._residency.num_host_used,
                host_hits=self._residency.num_host_hits,
                step_running_s=0.0 if began_s is None else self._clock() - began_s,
                dead=self._dead,
                residents=self._residency.residents(max_residents),
            )

    def stop(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more turns, end the running ones (`drain`) or fail them, close the engine.

        Returns whether the thread has ended within `timeout_s`. Idempotent; `drain=False` overrules.
        """
        with self._lock:
            if not (drain and self._stopping == "now"):
                self._stopping = "drain" if drain else "now"
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def check_integrity(self) -> None:
        """Raises RuntimeError if scheduler, residency and turns contradict each other."""
        with self._lock:
            self._scheduler.check_integrity()
            self._residency.check_integrity()
            if self._dead is None and self._scheduler.num_running != len(self._running):
                raise RuntimeError("the scheduler runs other turns than the loop")
            for turn in self._running.values():
                if not self._residency.is_dirty(turn.request.conversation_id):
                    raise RuntimeError(f"{turn.request.conversation_id} runs without a slot")

    # The thread.

    def _run(self) -> None:
        try:
            while self._turn_the_crank():
                pass
            reason = "the engine has stopped"
        except BaseException as error:
            logger.exception("the engine loop died")
            reason = f"{type(error).__name__}: {error}"
        self._die(reason)

    def _turn_the_crank(self) -> bool:
        """One step; waits while there is nothing to do. False once the loop is to end."""
        with self._lock:
            plan, batch = self._schedule()
            while not plan.rows and not self._outbox:
                if self._stopping == "now" or (
                    self._stopping == "drain" and not self._turns_left()
                ):
                    return False
                self._wake.wait()
                plan, batch = self._schedule()
            if self._stopping == "now":
                return False
            self._step_began_s = self._clock() if plan.rows else None
        self._emit()
        if plan.rows:
            result = run_plan(self._engine, plan)
            with self._lock:
                self._step_began_s = None
                self._apply(plan, batch, result)
            self._emit()
        return True

    def _turns_left(self) -> bool:
        return bool(self._running or self._waiting)

    def _emit(self) -> None:
        """Deliver the outbox. Only this thread fills and empties it."""
        events, self._outbox = self._outbox, []
        for turn, event in events:
            if turn.forgotten:
                continue
            try:
                turn.on_event(event)
            except Exception:
                logger.exception("the callback of %s raised", turn.request.conversation_id)
                with self._lock:
                    self._forget(turn)
        if events:
            try:
                self._after_events()
            except Exception:
                logger.exception("the callback after events raised")

    def _die(self, reason: str) -> None:
        with self._lock:
            self._dead = reason
            self._step_began_s = None
            for turn in (*self._running.values(), *self._waiting):
                turn.phase = "ended"
                self._turns.pop(turn.request.conversation_id, None)
                self._outbox.append((turn, TurnError(reason, fatal=True)))
            self._running.clear()
            self._waiting.clear()
        self._emit()
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine did not close")

    # Under the lock.

    def _cancel(self, turn: RunningTurn) -> None:
        with self._lock:
            turn.cancelled = True
            self._wake.notify_all()

    def _forget(self, turn: RunningTurn) -> None:
        conversation_id = turn.request.conversation_id
        turn.forgotten = turn.cancelled = True
        if self._turns.get(conversation_id) is turn:
            del self._turns[conversation_id]
            if turn.phase == "ended":
                self._residency.discard(conversation_id)
        self._wake.notify_all()

    def _schedule(self) -> tuple[StepPlan, list[tuple[RunningTurn, Share]]]:
        """Drop cancelled turns, start waiting ones, lay out the next step."""
        for turn in [turn for turn in self._running.values() if turn.cancelled]:
            self._end(turn, "cancelled")
        for turn in [turn for turn in self._waiting if turn.cancelled]:
            self._waiting.remove(turn)
            turn.phase = "ended"
            if self._turns.get(turn.request.conversation_id) is turn:
                del self._turns[turn.request.conversation_id]
            self._outbox.append((turn, TurnEnded("cancelled", 0, turn.timings(self._clock()))))
        while self._waiting and self._scheduler.has_room:
            turn = self._waiting[0]
            request = turn.request
            # Turns further down the queue should still find their slots when they get there.
            lease = self._residency.acquire(
                request.conversation_id, request.head, request.window, expected=self._turns
            )
            if lease is None:
                break
            self._waiting.popleft()
            self._copies += lease.copies
            self._start(turn, lease)
        batch = [(self._running[share.turn], share) for share in self._scheduler.schedule()]
        if not batch:
            return StepPlan(()), []
        plan = StepPlan(tuple(turn.row(share) for turn, share in batch), tuple(self._copies))
        self._copies.clear()
        return plan, batch

    def _start(self, turn: RunningTurn, lease: Lease) -> None:
        request = turn.request
        turn.phase = "running"
        turn.started_s = self._clock()
        turn.kv_slot = lease.kv_slot
        self._running[turn.number] = turn
        try:
            prefill = request.prefill(lease.resident_length)
            counts = checked_counts(prefill, request, self._engine.spec.model.vocab_size)
        except Exception as error:
            logger.exception("the prefill of %s cannot be planned", request.conversation_id)
            self._fail(turn, f"the prefill cannot be planned: {error}")
            return
        start = prefill.segments[0].start
        turn.begin(prefill)
        turn.window_start = self._residency.begin(
            request.conversation_id, start, prefill.window_start, request.token_count
        )
        self._scheduler.add(turn.number, counts)
        in_window = min(request.token_count, request.window.capacity)
        cached = min(lease.resident_length or 0, start, in_window)
        self._outbox.append((turn, TurnStarted(prefill.recovery, cached, sum(counts))))

    def _apply(
        self, plan: StepPlan, batch: list[tuple[RunningTurn, Share]], result: StepResult
    ) -> None:
        self._num_steps += 1
        for row, (turn, share), row_result in zip(plan.rows, batch, result.rows, strict=True):
            if share.segment >= 0:
                self._prefilled_tokens += share.count
            turn.length = row.start + share.count
            self._residency.grow(turn.request.conversation_id, turn.length)
            if row_result.failed is not None:
                self._fail(turn, row_result.failed)
            elif share.samples and not turn.cancelled:
                self._take(turn, row_result)

    def _take(self, turn: RunningTurn, result: RowResult) -> None:
        """Report the sampled token and end the turn if it was the last one."""
        token = result.token_id
        if token is None:
            self._fail(turn, "the engine sampled no token")
            return
        request = turn.request
        if turn.first_token_s is None:
            turn.first_token_s = self._clock()
        sampled = TokenSampled(turn.num_sampled, token, result.logprob, result.top)
        self._outbox.append((turn, sampled))
        turn.append(token)
        self._generated_tokens += 1
        if token in request.eos_ids:
            self._end(turn, "stop")
            return
        try:
            stop = request.stop is not None and request.stop.push(token)
        except Exception as error:
            logger.exception("the stop check of %s raised", request.conversation_id)
            self._fail(turn, f"the stop check raised: {error}")
            return
        if stop:
            self._end(turn, "stop")
        elif turn.num_sampled >= request.max_tokens:
            self._end(turn, "length")

    def _end(self, turn: RunningTurn, reason: FinishReason) -> None:
        self._leave_step(turn)
        self._outbox.append((turn, TurnEnded(reason, turn.length, turn.timings(self._clock()))))
        if turn.forgotten:
            self._residency.discard(turn.request.conversation_id)

    def _fail(self, turn: RunningTurn, message: str) -> None:
        """End a turn whose cache cannot be trusted any more."""
        conversation_id = turn.request.conversation_id
        if turn.segments:
            self._leave_step(turn)
        else:
            turn.phase = "ended"
            del self._running[turn.number]
        self._residency.drop(conversation_id)
        if self._turns.get(conversation_id) is turn:
            del self._turns[conversation_id]
        self._outbox.append((turn, TurnError(message, fatal=False)))

    def _leave_step(self, turn: RunningTurn) -> None:
        turn.phase = "ended"
        del self._running[turn.number]
        self._scheduler.remove(turn.number)
