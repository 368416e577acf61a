"""What a replica remembers of its conversations, to bring back a store that has lost its latest writes.

    commit -> Snapshot of the conversation, kept for as many as there are kv_slots
    pulse, every half second: another life of the store -> repair what runs here, then what was kept

A store that came back older than it was would otherwise let a turn begin on a history that a client
has seen the end of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.conversation import (
    Conversation,
    RememberedTurn,
    RunningSnapshot,
    Snapshot,
    TurnCommit,
)
from cluster.store import ConversationStore, Fenced, NotFound, StoreError
from deployments.task_ending import end_tasks
from deployments.turn_claim import TurnClaim

log = logging.getLogger(__name__)

PULSE_S = 0.5
KEPT_MESSAGES = 32
KEPT_RESULTS = 4


class Repairable(Protocol):
    """A running turn, as the watch sees it."""

    @property
    def conversation_id(self) -> str: ...

    async def repair(self) -> bool:
        """Put the turn back as far as its store acknowledged it; False while it is not claimed yet.
        Raises StoreError."""
        ...

    def lose(self, error: StoreError) -> None:
        """The store says that the turn belongs to another owner, or to nobody."""
        ...


@dataclass(slots=True)
class WatchFigures:
    """Restarts of the store that were noticed, and conversations put back after them."""

    store_restarts: int = 0
    repaired_conversations: int = 0


class StoreWatch:
    """Of one replica. Use it from one event loop. `running` names the turns that run now."""

    def __init__(
        self,
        store: ConversationStore,
        running: Callable[[], Iterable[Repairable]],
        max_conversations: int,
    ) -> None:
        self.figures = WatchFigures()
        self._store = store
        self._running = running
        self._max_conversations = max_conversations
        self._committed: OrderedDict[str, Snapshot] = OrderedDict()
        self._beat = asyncio.create_task(self._watch())

    def committed(self, claim: TurnClaim, commit: TurnCommit, record: Conversation) -> None:
        """Remember the conversation as this commit left it; the one not used for longest is forgotten."""
        before = self._known(claim)
        owned = claim.ownership.conversation
        window = record.window_tokens * record.replay_windows
        replay = claim.ownership.replay.advanced(claim.input_ids, record.sink_tokens, window)
        messages = (*(before.messages if before else ()), *commit.messages)[-KEPT_MESSAGES:]
        reply_tokens = commit.reply_tokens
        result = RememberedTurn(
            key=claim.key,
            request_hash=claim.call.request_hash,
            turn=record.turn,
            head=record.head,
            reply_start=owned.token_count + len(claim.input_ids),
            reply_ids=commit.output_ids[:reply_tokens],
            result=commit.result,
        )
        self._committed[record.conversation_id] = Snapshot(
            conversation=record,
            replay=replay.advanced(commit.output_ids, record.sink_tokens, window),
            replay_windows=record.replay_windows,
            messages=messages,
            first_message=record.num_messages - len(messages),
            results=(result, *(before.results if before else ()))[:KEPT_RESULTS],
        )
        self._committed.move_to_end(record.conversation_id)
        while len(self._committed) > self._max_conversations:
            self._committed.popitem(last=False)

    async def repair_running(
        self, claim: TurnClaim, output_ids: Sequence[int], lease_s: float
    ) -> None:
        """Put back a running turn of which these tokens were stored. Raises StoreError."""
        before, owned = self._known(claim), claim.ownership
        messages = before.messages if before else ()
        running = RunningSnapshot(
            nonce=owned.fence.nonce,
            key=claim.key,
            request_hash=claim.call.request_hash,
            input_ids=claim.input_ids,
            output_ids=np.array(output_ids, np.int32),
            lease_s=lease_s,
        )
        snapshot = Snapshot(
            conversation=owned.conversation,
            replay=owned.replay,
            replay_windows=owned.conversation.replay_windows,
            messages=messages,
            first_message=owned.conversation.num_messages - len(messages),
            running=running,
            results=before.results if before else (),
        )
        await self._store.repair(snapshot)
        self.figures.repaired_conversations += 1

    async def close(self) -> None:
        """Stop watching; idempotent."""
        await end_tasks((self._beat,))

    def _known(self, claim: TurnClaim) -> Snapshot | None:
        """What is remembered of the conversation, if the claim goes on from there."""
        known = self._committed.get(claim.call.conversation_id)
        same = known is not None and known.conversation.head == claim.ownership.conversation.head
        return known if same else None

    async def _watch(self) -> None:
        life = ""
        while True:
            try:
                now = await self._store.pulse()
                if life and now != life:
                    self.figures.store_restarts += 1
                    await self._repair_all()
                # Not before all is repaired: what failed is tried again.
                life = now
            except StoreError as error:
                log.debug("no pulse: %s", error)
            except Exception:
                log.exception("the watch over the store failed")
            await asyncio.sleep(PULSE_S)

    async def _repair_all(self) -> None:
        at_work: set[str] = set()
        for turn in list(self._running()):
            try:
                if await turn.repair():
                    at_work.add(turn.conversation_id)
            except (Fenced, NotFound) as error:
                turn.lose(error)
                at_work.add(turn.conversation_id)
        for name, snapshot in reversed(list(self._committed.items())):
            if name in at_work:
                continue
            with contextlib.suppress(Fenced, NotFound):
                await self._store.repair(snapshot)
                self.figures.repaired_conversations += 1
                continue
            # Another replica has it now, or it was deleted.
            self._committed.pop(name, None)
