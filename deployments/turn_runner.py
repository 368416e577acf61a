"""One replica's turns, without Ray: claim, restore, run, stream, commit.

    begin -> submit -> TurnStarted -> tokens ... -> TurnEnded -> commit -> settle -> TurnDone
      |         |            |            |             |          |
      +---------+------------+------------+-------------+----------+-> discard -> abort -> TurnRefused

Whatever ends a turn early (client gone, deadline, fence lost, engine error) takes the same way out:
first the slot is put back, then the claim is given up, so that the next `begin` meets neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cluster.conversation import BeginTurn, Conversation, TurnCommit
from cluster.store import ConversationStore, Fenced, NotFound, StoreError, StoreUnavailable
from deployments.config import Tunables
from deployments.errors import ErrorInfo, ServiceError
from deployments.store_errors import store_errors
from deployments.turn_call import ReplicaStats, TurnCall, TurnDone, TurnItem, TurnRefused
from deployments.turn_claim import ClaimLost, TurnClaim
from deployments.turn_progress import ReplyCodec, TurnProgress
from engine.loop import EngineLoop
from engine.loop_types import LoopStopped, Overloaded, TurnRunning
from engine_build.spec import EngineSpec

log = logging.getLogger(__name__)

T = TypeVar("T")

HANDOVER_S = 5.0
"""How long a turn waits for this replica's previous turn of the conversation to be cleared away."""

_COMMIT_PAUSE_S = 0.05
_MAX_COMMIT_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class ReplicaParts:
    """What a replica is made of. `fingerprint` names model, tokenizer and window."""

    replica: str
    spec: EngineSpec
    fingerprint: str
    loop: EngineLoop
    store: ConversationStore
    codec: ReplyCodec


class TurnRunner:
    """Runs turns on one engine loop. Use it from one event loop."""

    def __init__(self, parts: ReplicaParts, tunables: Tunables) -> None:
        self.tunables = tunables
        self._parts = parts
        self._claims: dict[str, TurnClaim] = {}
        self._chores: set[asyncio.Task[Any]] = set()
        self._counts = {"committed_turns": 0, "refused_turns": 0, "cancelled_turns": 0}
        self._closing = False

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """TurnAccepted, TurnTokens..., TurnDone; or TurnRefused at any point, which is then the last.

        Closing the generator, or cancelling who awaits it, ends the turn as if it had never begun.
        """
        claim: TurnClaim | None = None
        refusal: ErrorInfo | None = None
        try:
            self._check(call)
            began_s = time.perf_counter()
            deadline_s = asyncio.get_running_loop().time() + self._timeout_s(call)
            claim = await self._begin(call)
            progress = TurnProgress(claim, self._parts.codec, began_s)
            self._submit(claim)
            while not progress.has_ended:
                for item in progress.read(await claim.mailbox.take(deadline_s)):
                    yield item
            yield await self._sheltered(self._commit(claim, progress))
        except ServiceError as error:
            refusal = error.info
        except TimeoutError:
            refusal = ErrorInfo("timeout", "The turn took too long and was cancelled.")
        except Exception:
            log.exception("turn of %s failed", call.conversation_id)
            refusal = ErrorInfo("internal_error", "The replica failed; its log says why.")
        finally:
            if claim is not None and not claim.ending:
                self._counts["refused_turns" if refusal else "cancelled_turns"] += 1
                await self._sheltered(self._undo(claim))
        if refusal is not None:
            yield TurnRefused(refusal)

    def routing_stats(self) -> dict[str, int | bool]:
        """What `cluster.placement.ReplicaView` is made from."""
        stats = self._parts.loop.stats(0)
        return {
            "free_slots": stats.free_slots,
            "clean_slots": stats.clean_slots,
            "running": stats.running,
            "waiting": stats.waiting,
            "draining": self._closing,
        }

    def stats(self) -> ReplicaStats:
        """Figures for health and metrics."""
        stats = self._parts.loop.stats(0)
        values = {
            "running_turns": stats.running,
            "waiting_turns": stats.waiting,
            "resident_conversations": stats.clean_slots,
            "kv_slots": stats.num_slots,
            "free_slots": stats.free_slots,
            "evicted_slots": stats.evicted_slots,
            "engine_steps": stats.num_steps,
            "prefilled_tokens": stats.prefilled_tokens,
            "generated_tokens": stats.generated_tokens,
            **self._counts,
        }
        return ReplicaStats(self._parts.replica, {k: float(v) for k, v in values.items()})

    def check_health(self, step_timeout_s: float) -> None:
        """Raises RuntimeError when the engine loop is dead or one step lasts longer than that."""
        stats = self._parts.loop.stats(0)
        if stats.dead is not None:
            raise RuntimeError(f"the engine loop is dead: {stats.dead}")
        if stats.step_running_s > step_timeout_s:
            raise RuntimeError(f"an engine step has been running for {stats.step_running_s:.0f} s")

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new turns, let running ones end for `drain_s`, stop the loop, wait for clean-up."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._claims:
                    await next(iter(self._claims.values())).over.wait()
        await asyncio.to_thread(self._parts.loop.stop, drain=False, timeout_s=30.0)
        for claim in [claim for claim in self._claims.values() if not claim.ending]:
            await self._undo(claim)
        while self._chores:
            await asyncio.gather(*self._chores, return_exceptions=True)

    # The steps of a turn.

    def _check(self, call: TurnCall) -> None:
        """Raises ServiceError for what would harm the engine or breaks a limit."""
        ids, limits = call.input_ids, self.tunables.limits
        given: object = ids
        if self._closing:
            raise _refused("replica_lost", "The replica is stopping; send the turn again.")
        if not isinstance(given, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 1:
            raise _refused("invalid_type", "input_ids must be int32 of one dimension.", "input_ids")
        if not len(ids) or ids.min() < 0 or ids.max() >= self._parts.spec.model.vocab_size:
            raise _refused("invalid_value", "input_ids must be ids of the vocabulary.", "input_ids")
        if len(ids) > limits.max_input_tokens:
            message = f"The input takes {len(ids)} tokens, at most {limits.max_input_tokens} may."
            raise _refused("input_too_long", message, "messages")
        if not 1 <= call.max_tokens <= limits.max_output_tokens:
            message = f"max_tokens must be 1 to {limits.max_output_tokens}."
            raise _refused("invalid_value", message, "max_tokens")

    def _timeout_s(self, call: TurnCall) -> float:
        return min(call.timeout_s, self.tunables.limits.turn_timeout_s)

    async def _begin(self, call: TurnCall) -> TurnClaim:
        """Claim the turn. Raises ServiceError. Who is cancelled here leaves no claim behind."""
        task = self._chore(self._claim(call))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._abandon)
            raise

    def _abandon(self, task: asyncio.Task[TurnClaim]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._chore(self._undo(task.result()))

    async def _claim(self, call: TurnCall) -> TurnClaim:
        turn = BeginTurn(
            conversation_id=call.conversation_id,
            tenant=call.tenant,
            replica=self._parts.replica,
            input_ids=call.input_ids,
            fingerprint=self._parts.fingerprint,
            lease_s=self.tunables.lease_s,
            expect_turn=call.expect_turn,
            expect_head=call.expect_head,
        )
        async with store_errors(call.conversation_id):
            ownership = await self._parts.store.begin(turn)
        claim = TurnClaim(call, ownership, self._parts.replica, self._parts.spec.slot_tokens)
        while (previous := self._claims.get(call.conversation_id)) is not None:
            if not await self._handed_over(previous):
                await self._give_back(claim)
                raise _refused("conversation_busy", "Another turn of the conversation is ending.")
        self._claims[call.conversation_id] = claim
        claim.keep_alive(self._parts.store, lambda: self.tunables.lease_s)
        return claim

    async def _handed_over(self, previous: TurnClaim) -> bool:
        """The store says that this replica's previous turn is over: clear it away."""
        previous.mailbox.put(ClaimLost(Fenced(previous.call.conversation_id)))
        if not previous.ending:
            # Not left to who reads its items: perhaps nobody does.
            await self._undo(previous)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANDOVER_S):
                await previous.over.wait()
        return previous.over.is_set()

    def _submit(self, claim: TurnClaim) -> None:
        _check_goes_on(claim)
        codec = self._parts.codec
        request = claim.request(codec.eos_ids, codec.stop_check(claim.call.stop))
        try:
            self._parts.loop.submit(request, claim.mailbox.put)
        except Overloaded as error:
            raise _refused("overloaded", f"The replica is busy: {error}.") from error
        except TurnRunning as error:
            raise _refused("conversation_busy", "Another turn is still ending.") from error
        except LoopStopped as error:
            raise _refused("replica_lost", f"The replica is stopping: {error}.") from error

    async def _commit(self, claim: TurnClaim, progress: TurnProgress) -> TurnDone:
        """End the turn for good, or undo it and raise ServiceError."""
        _check_goes_on(claim)
        claim.ending = True
        try:
            outcome = progress.outcome()
            start_s = time.perf_counter()
            async with store_errors(claim.call.conversation_id):
                committed = await self._send_commit(outcome.commit)
            commit_s = time.perf_counter() - start_s
            self._parts.loop.settle(
                claim.call.conversation_id, committed.head, outcome.cached_tokens
            )
        except BaseException:
            self._counts["refused_turns"] += 1
            await self._undo(claim)
            raise
        await claim.release()
        self._finish(claim)
        self._counts["committed_turns"] += 1
        return outcome.done(committed, commit_s)

    async def _send_commit(self, commit: TurnCommit) -> Conversation:
        """Send it again while the store is away, for as long as a lease: the client has read the
        reply, and the fence makes repeating safe. Raises StoreError."""
        until_s = time.monotonic() + self.tunables.lease_s
        pause_s = _COMMIT_PAUSE_S
        while True:
            try:
                return await self._parts.store.commit(commit)
            except StoreUnavailable as error:
                if time.monotonic() + pause_s > until_s:
                    raise
                log.warning("commit of %s is sent again: %s", commit.conversation_id, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_COMMIT_PAUSE_S)

    async def _undo(self, claim: TurnClaim) -> None:
        """As if the turn had never begun. The slot first: see the top of this file."""
        claim.ending = True
        try:
            self._parts.loop.discard(claim.call.conversation_id)
            await self._give_back(claim)
        finally:
            self._finish(claim)

    async def _give_back(self, claim: TurnClaim) -> None:
        call = claim.call
        await claim.release()
        try:
            await self._parts.store.abort(call.tenant, call.conversation_id, claim.ownership.fence)
        except (Fenced, NotFound):
            pass
        except StoreError as error:
            log.warning("claim of %s left to its lease: %s", call.conversation_id, error)

    def _finish(self, claim: TurnClaim) -> None:
        if self._claims.get(claim.call.conversation_id) is claim:
            del self._claims[claim.call.conversation_id]
        claim.over.set()

    async def _sheltered(self, step: Coroutine[Any, Any, T]) -> T:
        """Run `step` to its end even if the caller is cancelled meanwhile."""
        return await asyncio.shield(self._chore(step))

    def _chore(self, step: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(step)
        self._chores.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._chores.discard(task)
        # Its caller may be gone: look at the error, lest asyncio reports it as unseen.
        if not task.cancelled():
            task.exception()


def _check_goes_on(claim: TurnClaim) -> None:
    """Raises ServiceError for a claim that this replica is clearing away, unknown to who reads it."""
    if claim.ending:
        raise _refused("replica_lost", "The replica has ended the turn; send it again.")


def _refused(code: str, message: str, param: str | None = None) -> ServiceError:
    return ServiceError(ErrorInfo(code, message, param))
