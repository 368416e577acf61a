"""Getting hold of a turn: `begin` in the store, and what to do with its answers.

begin -> committed before                   its result once more
      -> busy at another replica            show what is stored, ask again -> ...
      -> busy here, of which we know nothing   the answer to an earlier begin was lost: take it over
      -> ours: new, or resumed with its tokens so far
      -> no answer                          refused; if it had begun, that is undone later
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

from cluster.conversation import (
    BeginTurn,
    Begun,
    BusyTurn,
    CommittedTurn,
    Fence,
    Ownership,
    new_nonce,
)
from cluster.store import Recovering, StoreError, StoreUnavailable
from deployments.store_errors import store_errors
from deployments.turn_call import TurnAccepted, TurnCall, TurnDone, TurnUsage
from deployments.turn_claim import TurnClaim
from deployments.turn_ending import Ending, TurnStopped
from deployments.turn_host import TurnHost
from deployments.turn_log import CONTRADICTED, TurnLog
from engine.turn import TurnEnded

log = logging.getLogger(__name__)

FOLLOW_PAUSE_S = 0.1
_LEASE_ENDS_S = 1.0
_WITHDRAW_PAUSE_S = 0.5


class TurnSignals:
    """What a turn waits for besides the store: its end, told once, and news for its `begin`."""

    def __init__(self) -> None:
        self._end: asyncio.Future[TurnEnded | Ending] = asyncio.get_running_loop().create_future()
        self._nudged = asyncio.Event()

    @property
    def ending(self) -> Ending | None:
        """Set when it is clear that the turn will not be committed here."""
        end = self._end.result() if self._end.done() else None
        return end if isinstance(end, Ending) else None

    def tell_end(self, end: TurnEnded | Ending) -> None:
        """The first end counts."""
        if not self._end.done():
            self._end.set_result(end)
            self._nudged.set()

    def nudge(self) -> None:
        """End the pause that is, or the next one."""
        self._nudged.set()

    def check(self) -> None:
        """Raises TurnStopped when the turn is not to go on."""
        if self.ending is not None:
            raise TurnStopped(self.ending)

    async def ended(self) -> None:
        """Until the last token is there. Raises TurnStopped."""
        await asyncio.shield(self._end)
        self.check()

    async def pause(self, seconds: float) -> None:
        """That long at most. Raises TurnStopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._nudged.wait()
        self._nudged.clear()
        self.check()

    async def acquire(self, lock: asyncio.Lock) -> bool:
        """Whether the lock was had before the turn's end."""
        acquiring = asyncio.create_task(lock.acquire())
        await asyncio.wait((acquiring, self._end), return_when=asyncio.FIRST_COMPLETED)
        if not acquiring.done():
            acquiring.cancel()
            await asyncio.wait((acquiring,))
        return not acquiring.cancelled()


class TurnBegin:
    """Of one turn. What is stored elsewhere goes to `turn_log` meanwhile."""

    def __init__(
        self, host: TurnHost, call: TurnCall, turn_log: TurnLog, signals: TurnSignals
    ) -> None:
        self._host = host
        self._call = call
        self._log = turn_log
        self._signals = signals
        self._nonce = new_nonce()
        self._steal = call.steal
        self._blameless = call.blameless
        self.holds_resume = False

    def steal(self, blameless: bool) -> None:
        """The owner was seen dead, or else is gone."""
        self._blameless = blameless and (self._blameless or not self._steal)
        self._steal = True
        self._signals.nudge()

    async def begin(self) -> Ownership | CommittedTurn:
        """Raises ServiceError, TurnStopped."""
        call, parts = self._call, self._host.parts
        turn = BeginTurn(
            conversation_id=call.conversation_id,
            tenant=call.tenant,
            replica=parts.replica,
            input_ids=call.input_ids,
            fingerprint=parts.fingerprint,
            lease_s=self._host.tunables().lease_s,
            expect_turn=call.expect_turn,
            expect_head=call.expect_head,
            nonce=self._nonce,
            key=call.key,
            request_hash=call.request_hash,
        )
        lease_ends = False
        while True:
            if self._steal or lease_ends:
                await self.wait_to_resume()
            asked = replace(turn, steal=self._steal, blameless=self._blameless)
            async with store_errors(call.conversation_id):
                begun = await self._ask(asked)
            if not isinstance(begun, BusyTurn):
                return begun
            if begun.owner == parts.replica and not self._steal:
                # No other turn of this key runs here: it began, and its answer was lost.
                self.steal(blameless=True)
                continue
            self.resume_next()
            self._show(begun)
            lease_ends = begun.retry_after_s < _LEASE_ENDS_S
            await self._signals.pause(FOLLOW_PAUSE_S)

    async def wait_to_resume(self) -> None:
        """Until no other turn of this replica is resuming. Raises TurnStopped."""
        if not self.holds_resume:
            self.holds_resume = await self._signals.acquire(self._host.resuming)
            self._signals.check()

    def resume_next(self) -> None:
        """Let the next turn resume; idempotent."""
        if self.holds_resume:
            self.holds_resume = False
            self._host.resuming.release()

    def claim(self, ownership: Ownership) -> TurnClaim:
        """Raises TurnStopped when what was shown, here or elsewhere, is not what is stored."""
        longest: tuple[int, ...] = ()
        stored = tuple(ownership.output_ids.tolist())
        for ids in (stored, self._call.shown_ids, self._log.token_ids):
            common = min(len(ids), len(longest))
            if ids[:common] != longest[:common]:
                raise TurnStopped(Ending(CONTRADICTED))
            longest = max(longest, ids, key=len)
        self._host.figures.resumed_turns += ownership.resumed
        parts = self._host.parts
        return TurnClaim(self._call, ownership, parts.replica, parts.spec.slot_tokens, longest)

    def done_again(self, committed: CommittedTurn) -> TurnDone:
        """The end of a turn that was committed before."""
        result, usage = committed.result, TurnUsage(**committed.result["usage"])
        self._log.accept(
            TurnAccepted(
                turn=committed.turn,
                replica=self._host.parts.replica,
                recovery=usage.recovery,
                completion_id=result["completion_id"],
                created_s=result["created_s"],
                stop=self._call.stop,
            )
        )
        return TurnDone(
            turn=committed.turn,
            head=committed.head,
            finish_reason=result["finish_reason"],
            output_ids=committed.reply_ids,
            usage=usage,
        )

    async def _ask(self, turn: BeginTurn) -> Begun:
        while True:
            try:
                return await self._host.parts.store.begin(turn)
            except Recovering as error:
                # Over within seconds: owners are repairing the store.
                await self._signals.pause(error.retry_after_s)
            except StoreUnavailable:
                self._host.do_later(self._withdraw(turn))
                raise

    async def _withdraw(self, turn: BeginTurn) -> None:
        """The turn may have begun, and nobody was told so: end it, for others not to wait for its lease."""
        clock, store = asyncio.get_running_loop().time, self._host.parts.store
        until_s = clock() + turn.lease_s
        while clock() < until_s:
            await asyncio.sleep(_WITHDRAW_PAUSE_S)
            try:
                record = await store.get(turn.tenant, turn.conversation_id)
                if not record.running or record.owner != turn.replica:
                    return
                # If the one that runs is another than this, the fence refuses.
                fence = Fence(record.epoch, turn.nonce)
                await store.abort(turn.tenant, turn.conversation_id, fence)
                return
            except StoreUnavailable as error:
                log.debug("claim of %s not withdrawn yet: %s", turn.conversation_id, error)
            except StoreError:
                return

    def _show(self, busy: BusyTurn) -> None:
        shown, stored = self._log.token_ids, tuple(busy.output_ids.tolist())
        if stored[: len(shown)] != shown[: len(stored)]:
            raise TurnStopped(Ending(CONTRADICTED, "lost"))
        self._log.accept(TurnAccepted(busy.turn, self._host.parts.replica, "none"))
        eos_ids = frozenset() if self._call.ignore_eos else self._host.parts.codec.eos_ids
        self._log.show([token for token in stored[len(shown) :] if token not in eos_ids])
