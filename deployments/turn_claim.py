"""A claimed turn on its replica: its fence, its kept-alive lease and the mailbox of its events."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster.conversation import Ownership, TokenIds
from cluster.restore import plan_restore, retained_ids
from cluster.store import ConversationStore, Fenced, NotFound, StoreError
from deployments.turn_call import TurnCall
from engine.turn import Prefill, Segment, StopCheck, TurnEvent, TurnRequest
from engine.window import SinkWindow

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClaimLost:
    """The claim is void: another owner exists, or the conversation is gone."""

    error: StoreError


class Mailbox:
    """Events from the engine's thread to this loop, unbounded: a stalled client never stalls the engine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[TurnEvent | ClaimLost] = deque()
        self._woken = asyncio.Event()

    def put(self, event: TurnEvent | ClaimLost) -> None:
        """From any thread."""
        self._events.append(event)
        if not self._woken.is_set():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def take(self, deadline_s: float) -> list[TurnEvent | ClaimLost]:
        """All events that are there, at least one. Raises TimeoutError at `deadline_s` (loop time)."""
        while not self._events:
            self._woken.clear()
            # An event put between the check and the clear did not wake anybody.
            if not self._events:
                async with asyncio.timeout_at(deadline_s):
                    await self._woken.wait()
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken


class TurnClaim:
    """What `begin` gave. `ending` once its commit or undoing has begun, `over` once that is done."""

    def __init__(
        self, call: TurnCall, ownership: Ownership, replica: str, slot_tokens: int
    ) -> None:
        record = ownership.conversation
        self.call = call
        self.replica = replica
        self.ownership = ownership
        self.turn = record.turn + 1
        self.window = SinkWindow(
            record.sink_tokens, record.window_tokens, slot_tokens - record.sink_tokens
        )
        self.mailbox = Mailbox()
        self.over = asyncio.Event()
        self.ending = False
        self._renewal: asyncio.Task[None] | None = None

    @property
    def base_tokens(self) -> int:
        """Tokens of the conversation before this turn."""
        return self.ownership.conversation.token_count

    def request(self, eos_ids: frozenset[int], stop: StopCheck | None) -> TurnRequest:
        """The turn as the engine loop wants it."""
        call, record = self.call, self.ownership.conversation
        return TurnRequest(
            conversation_id=call.conversation_id,
            turn=self.turn,
            head=record.head,
            window=self.window,
            token_count=record.token_count,
            input_tokens=len(call.input_ids),
            prefill=self._prefill,
            retained=_penalised(retained_ids(self.ownership.replay, call.input_ids), eos_ids),
            sampling=call.sampling,
            max_tokens=call.max_tokens,
            eos_ids=frozenset() if call.ignore_eos else eos_ids,
            stop=stop,
        )

    def _prefill(self, resident_length: int | None) -> Prefill:
        plan = plan_restore(self.ownership.replay, self.call.input_ids, resident_length)
        segments = tuple(Segment(part.start, part.tokens) for part in plan.segments)
        return Prefill(segments, plan.window_start, plan.recovery)

    def keep_alive(self, store: ConversationStore, lease_s: Callable[[], float]) -> None:
        """Renew the lease until `release`; ClaimLost goes to the mailbox when the store refuses."""
        self._renewal = asyncio.create_task(self._renew(store, lease_s))

    async def release(self) -> None:
        """Stop renewing; idempotent. Whatever ended the renewal is not the caller's trouble."""
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.cancel()
            await asyncio.wait([renewal])

    async def _renew(self, store: ConversationStore, lease_s: Callable[[], float]) -> None:
        call, fence = self.call, self.ownership.fence
        while True:
            await asyncio.sleep(lease_s() / 3)
            try:
                await store.renew(call.tenant, call.conversation_id, fence, lease_s())
            except (Fenced, NotFound) as error:
                self.mailbox.put(ClaimLost(error))
                return
            except StoreError as error:
                # Safety is the fence's: a commit after the lease ran out is refused if need be.
                log.warning("lease of %s not renewed: %s", call.conversation_id, error)


def _penalised(token_ids: TokenIds, eos_ids: frozenset[int]) -> TokenIds:
    """Without what ends a turn: every turn adds one, and penalties on them would let the replies of a
    long conversation never end."""
    kept: TokenIds = token_ids[~np.isin(token_ids, list(eos_ids))]
    return kept
