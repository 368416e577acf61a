"""One turn on its replica, from its claim to its end, in a task of its own: readers come and go.

    begin -> submit -> TurnStarted -> tokens ... -> TurnEnded -> commit -> settle -> TurnDone
      |         |            |            |             |          |
      +---------+------------+------------+-------------+----------+-> discard -> TurnRefused

Whatever ends a turn early takes the same way out: the slot is put back, then the claim is given up,
so that the next `begin` meets neither. Or the claim is left in the store, for another replica to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.conversation import CommittedTurn, Conversation, Ownership, TurnCommit
from cluster.store import Fenced, NotFound, RolledBack, StoreError, StoreUnavailable
from deployments.output_gate import Lane, LaneEvent
from deployments.turn_begin import TurnBegin, TurnSignals
from deployments.turn_call import TurnCall, TurnDone, TurnItem, TurnRefused
from deployments.turn_claim import TurnClaim
from deployments.turn_ending import (
    CANCELLED,
    INTERNAL,
    TIMED_OUT,
    Claim,
    Ending,
    TurnStopped,
    ending_of,
    lost_claim,
    refused,
)
from deployments.turn_host import TurnHost
from deployments.turn_log import TurnLog
from deployments.turn_progress import TurnProgress
from engine.loop_types import LoopStopped, Overloaded, TurnRunning
from engine.turn import TurnRequest

log = logging.getLogger(__name__)

HANDOVER_S = 5.0
"""How long a turn waits for this replica's previous turn of the conversation to be cleared away."""

_COMMIT_PAUSE_S = 0.05
_MAX_COMMIT_PAUSE_S = 1.0


class TurnTask:
    """Run it once; `read` it once for every call."""

    def __init__(self, host: TurnHost, call: TurnCall) -> None:
        self.call = call
        self.over = asyncio.Event()
        self._host = host
        self._log = TurnLog()
        self._signals = TurnSignals()
        self._begin = TurnBegin(host, call, self._log, self._signals)
        self._num_readers = 0
        self._must_finish = False
        self._owned: OwnedTurn | None = None

    @property
    def conversation_id(self) -> str:
        return self.call.conversation_id

    @property
    def is_ending(self) -> bool:
        """Whether it is clear that the turn will not be committed here."""
        return self._signals.ending is not None

    async def read(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """The turn's items for one more call. The last reader to leave cancels the turn, unless one has
        asked for it to be finished."""
        self._must_finish |= call.on_disconnect == "finish"
        if call.steal:
            self._begin.steal(call.blameless)
        try:
            async with aclosing(self.follow(call.shown_ids)) as items:
                async for item in items:
                    yield item
        finally:
            if self._log.end is None and not self._num_readers and not self._must_finish:
                self.stop(CANCELLED)
                await self.over.wait()

    async def follow(self, shown_ids: Sequence[int] = ()) -> AsyncGenerator[TurnItem, None]:
        """The same for somebody whose leaving cancels nothing."""
        self._num_readers += 1
        try:
            async with aclosing(self._log.items(shown_ids)) as items:
                async for item in items:
                    yield item
        finally:
            self._num_readers -= 1

    def stop(self, ending: Ending) -> None:
        """End the turn like this, unless it has ended or is being committed."""
        self._signals.tell_end(ending)

    def lose(self, error: StoreError) -> None:
        """The store says that the turn belongs to another owner, or to nobody."""
        self.stop(lost_claim(error, self.conversation_id))

    async def repair(self) -> bool:
        """Put the turn back as far as the store has acknowledged it; False while it is not claimed yet.
        Raises StoreError."""
        if self._owned is None:
            return False
        await self._owned.repair()
        return True

    async def run(self) -> None:
        """The whole turn. Raises nothing."""
        loop, figures = asyncio.get_running_loop(), self._host.figures
        limit_s = self._host.tunables().limits.turn_timeout_s
        deadline = loop.call_later(min(self.call.timeout_s, limit_s), self.stop, TIMED_OUT)
        end: TurnDone | TurnRefused = INTERNAL.refusal()
        try:
            end = await self._live()
        except Exception as error:
            ending = ending_of(error)
            if ending is INTERNAL:
                log.exception("turn of %s failed", self.conversation_id)
            end = ending.refusal()
            figures.cancelled_turns += ending is CANCELLED
            figures.refused_turns += ending is not CANCELLED
            figures.fenced_turns += ending.claim == "lost"
            figures.handed_over_turns += ending.claim == "keep"
        finally:
            deadline.cancel()
            self._begin.resume_next()
            self._log.finish(end)
            self.over.set()

    async def _live(self) -> TurnDone:
        began_s = time.perf_counter()
        begun = await self._begin.begin()
        if isinstance(begun, CommittedTurn):
            return self._begin.done_again(begun)
        try:
            claim = self._begin.claim(begun)
            progress = TurnProgress(claim, self._host.parts.codec, self._log, began_s)
            self._owned = OwnedTurn(self._host, claim, progress, self._signals, self._begin)
            await self._make_way()
            try:
                done = await self._owned.run()
            finally:
                self._owned.shut()
        except Exception as error:
            await self._undo(begun, ending_of(error))
            raise
        finally:
            if self._host.claims.get(self.conversation_id) is self:
                del self._host.claims[self.conversation_id]
        self._host.figures.committed_turns += 1
        return done

    async def _make_way(self) -> None:
        """The store says that this replica's previous turn of the conversation is over: wait until it
        is cleared away, not leaving that to who reads it. Raises TurnStopped."""
        claims, name = self._host.claims, self.conversation_id
        while (previous := claims.get(name)) is not None:
            previous.lose(Fenced(name))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HANDOVER_S):
                    await previous.over.wait()
            if not previous.over.is_set():
                raise refused("conversation_busy", "Another turn of the conversation is ending.")
        claims[name] = self

    async def _undo(self, ownership: Ownership, ending: Ending) -> None:
        """The slot first: see the top of this file."""
        call, parts = self.call, self._host.parts
        if self._host.claims.get(call.conversation_id) is self:
            parts.loop.discard(call.conversation_id)
        if ending.claim != "give up":
            return
        try:
            await parts.store.abort(call.tenant, call.conversation_id, ownership.fence)
        except (Fenced, NotFound):
            pass
        except StoreError as error:
            log.warning("claim of %s left to its lease: %s", call.conversation_id, error)


class OwnedTurn:
    """A claimed turn: through the engine and the gate to its commit. Its lease is kept alive from the
    start until `shut`."""

    def __init__(
        self,
        host: TurnHost,
        claim: TurnClaim,
        progress: TurnProgress,
        signals: TurnSignals,
        begin: TurnBegin,
    ) -> None:
        self._host = host
        self._claim = claim
        self._progress = progress
        self._signals = signals
        self._begin = begin
        self._num_repairs = 0
        self._lane = Lane(
            tenant=claim.call.tenant,
            conversation_id=claim.call.conversation_id,
            fence=claim.ownership.fence,
            deliver=self._deliver,
            repair=self.repair,
            durable=host.tunables().durability == "token",
            token_ids=list(claim.sampled),
            num_stored=len(claim.ownership.output_ids),
        )
        host.gate.open(self._lane)

    async def run(self) -> TurnDone:
        """Raises TurnStopped."""
        claim, codec = self._claim, self._host.parts.codec
        stop = codec.stop_check(claim.call.stop)
        reason = claim.ended(codec.eos_ids, stop)
        if reason is not None:
            self._progress.end(reason)
        else:
            if claim.ownership.resumed:
                await self._begin.wait_to_resume()
            self._signals.check()
            self._submit(claim.request(codec.eos_ids, stop))
            await self._signals.ended()
        return await self._commit()

    def shut(self) -> None:
        """Nothing more of the turn is shown or kept alive."""
        self._host.gate.shut(self._lane)

    async def repair(self) -> None:
        """Raises StoreError."""
        claim, lease_s = self._claim, self._host.tunables().lease_s
        self._num_repairs += 1
        stored = self._lane.token_ids[: self._lane.num_stored]
        try:
            await self._host.watch.repair_running(claim, stored, lease_s)
        except Fenced:
            # Newer than what was put back: perhaps by a checkpoint of ours that is under way.
            call, fence = claim.call, claim.ownership.fence
            await self._host.parts.store.renew(call.tenant, call.conversation_id, fence, lease_s)

    def _submit(self, request: TurnRequest) -> None:
        # Another replica may have room for a turn that somebody has seen already.
        claim: Claim = "keep" if self._claim.sampled else "give up"
        gate, lane = self._host.gate, self._lane
        try:
            self._host.parts.loop.submit(request, lambda event: gate.put(lane, event))
        except Overloaded as error:
            raise refused("overloaded", f"The replica is busy: {error}.", claim) from error
        except TurnRunning as error:
            raise refused("conversation_busy", "Another turn is still ending.", claim) from error
        except LoopStopped as error:
            raise refused("replica_lost", f"The replica is stopping: {error}.", "keep") from error

    def _deliver(self, events: Sequence[LaneEvent]) -> None:
        """These have passed the gate."""
        try:
            end = self._progress.take(events)
        except Exception:
            log.exception("events of %s were not understood", self._claim.call.conversation_id)
            end = INTERNAL
        if self._progress.has_new_tokens:
            self._begin.resume_next()
        if end is not None:
            self._signals.tell_end(end)

    async def _commit(self) -> TurnDone:
        """Raises TurnStopped."""
        host, outcome = self._host, self._progress.outcome()
        start_s = time.perf_counter()
        committed = await self._send(outcome.commit)
        commit_s = time.perf_counter() - start_s
        host.parts.loop.settle(committed.conversation_id, committed.head, outcome.cached_tokens)
        host.watch.committed(self._claim, outcome.commit, committed)
        return outcome.done(committed, commit_s)

    async def _send(self, commit: TurnCommit) -> Conversation:
        """Send it again while the store is away, for as long as a lease: the client has read the
        reply, and the fence makes repeating safe. Raises TurnStopped."""
        until_s = time.monotonic() + self._host.tunables().lease_s
        pause_s = _COMMIT_PAUSE_S
        if not self._lane.is_open:
            # The gate has heard of a later owner, whom a store that went back since may not know.
            fenced = Fenced(commit.conversation_id)
            raise TurnStopped(lost_claim(fenced, commit.conversation_id))
        while True:
            num_repairs = self._num_repairs
            try:
                committed = await self._host.parts.store.commit(commit)
                if num_repairs == self._num_repairs:
                    return committed
                # The answer may be of a life of the store that has ended: the turn was put back as running.
                continue
            except (StoreUnavailable, RolledBack) as error:
                reason = error
            except StoreError as error:
                raise TurnStopped(lost_claim(error, commit.conversation_id)) from error
            log.warning("commit of %s is sent again: %s", commit.conversation_id, reason)
            if time.monotonic() + pause_s > until_s:
                raise TurnStopped(lost_claim(reason, commit.conversation_id))
            await self._put_back(reason)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_COMMIT_PAUSE_S)

    async def _put_back(self, reason: StoreError) -> None:
        if isinstance(reason, RolledBack):
            try:
                await self.repair()
            except (Fenced, NotFound) as error:
                raise TurnStopped(lost_claim(error, self._claim.call.conversation_id)) from error
            except StoreError as error:
                log.warning("%s is not repaired yet: %s", self._claim.call.conversation_id, error)
