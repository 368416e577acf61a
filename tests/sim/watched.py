"""A process's way to the store, with the ledger looking on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from cluster.conversation import (
    BeginTurn,
    Begun,
    BusyTurn,
    Checkpoint,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    Rebase,
    Snapshot,
    TurnCommit,
)
from cluster.store import (
    ConversationStore,
    Fenced,
    HistoryMatch,
    Quarantined,
    StoreError,
    StoreUnavailable,
)
from tests.sim.ledger import Ledger
from tests.sim.network import Lost, Network
from tests.sim.virtual import Process

T = TypeVar("T")


class RemoteStore:
    """A store in another process: every call may be late, lost, or answered in vain."""

    def __init__(self, inner: ConversationStore, process: Process, network: Network) -> None:
        self._inner = inner
        self._process = process
        self._network = network

    async def create(self, new: NewConversation) -> Conversation:
        return await self._call(lambda: self._inner.create(new))

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        return await self._call(lambda: self._inner.get(tenant, conversation_id))

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> Sequence[Conversation]:
        return await self._call(lambda: self._inner.list(tenant, limit, after))

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, Sequence[Message]]:
        return await self._call(
            lambda: self._inner.transcript(tenant, conversation_id, limit, before)
        )

    async def system_messages(self, tenant: str, conversation_id: str) -> Sequence[Message]:
        return await self._call(lambda: self._inner.system_messages(tenant, conversation_id))

    async def begin(self, turn: BeginTurn) -> Begun:
        return await self._call(lambda: self._inner.begin(turn))

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        try:
            return await self._call(lambda: self._inner.checkpoint(batch))
        except StoreUnavailable as error:
            return [error for _ in batch]

    async def renew(self, tenant: str, conversation_id: str, fence: Fence, lease_s: float) -> None:
        await self._call(lambda: self._inner.renew(tenant, conversation_id, fence, lease_s))

    async def commit(self, commit: TurnCommit) -> Conversation:
        return await self._call(lambda: self._inner.commit(commit))

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        await self._call(lambda: self._inner.abort(tenant, conversation_id, fence))

    async def repair(self, snapshot: Snapshot) -> None:
        await self._call(lambda: self._inner.repair(snapshot))

    async def rebase(self, rebase: Rebase) -> Conversation:
        return await self._call(lambda: self._inner.rebase(rebase))

    async def pulse(self) -> str:
        return await self._call(self._inner.pulse)

    async def delete(self, tenant: str, conversation_id: str) -> None:
        await self._call(lambda: self._inner.delete(tenant, conversation_id))

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        return await self._call(lambda: self._inner.match_history(tenant, history))

    async def ping(self) -> float:
        return await self._call(self._inner.ping)

    async def close(self) -> None:
        await self._inner.close()

    async def _call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """As a client of Redis does: when no answer comes, ask once more."""
        try:
            return await self._call_once(operation)
        except StoreUnavailable:
            return await self._call_once(operation)

    async def _call_once(self, operation: Callable[[], Awaitable[T]]) -> T:
        try:
            await self._network.request(self._process)
            answer: T | StoreError
            try:
                answer = await operation()
            except StoreError as error:
                answer = error
            await self._network.reply(self._process)
        except Lost as lost:
            raise StoreUnavailable(str(lost)) from lost
        if isinstance(answer, StoreError):
            raise answer
        return answer


class WatchedStore:
    """Tells the ledger what this process has sent and what it was answered."""

    def __init__(
        self, inner: ConversationStore, who: str, ledger: Ledger, network: Network
    ) -> None:
        self._inner = inner
        self._who = who
        self._ledger = ledger
        self._network = network
        self._turns: dict[tuple[str, str], tuple[int, str]] = {}
        self._life = ""

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def begin(self, turn: BeginTurn) -> Begun:
        claims = self._ledger.claims(turn.conversation_id)
        claim = claims.sent(turn, self._network.loop.now_s)
        what = f"begin {turn.key}{' by force' if turn.steal else ''}"
        try:
            begun = await self._inner.begin(turn)
        except StoreError as error:
            self._note(f"{what} -> {type(error).__name__}")
            claims.returned(claim, known=not isinstance(error, StoreUnavailable))
            if isinstance(error, Quarantined):
                self._ledger.quarantined(claim)
            raise
        claims.returned(claim, known=True)
        self._note(f"{what} -> {type(begun).__name__}")
        if isinstance(begun, BusyTurn):
            claims.busy(claim, begun.output_ids.tolist())
        if isinstance(begun, Ownership):
            record = begun.conversation
            self._turns[turn.conversation_id, begun.fence.nonce] = (record.turn + 1, record.head)
            self._ledger.granted(claim, begun, self._network.loop.now_s)
        return begun

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        sent_s = self._network.loop.now_s
        answers = await self._inner.checkpoint(batch)
        for checkpoint, answer in zip(batch, answers, strict=True):
            outcome = "ok" if answer is None else type(answer).__name__
            end = checkpoint.k + len(checkpoint.token_ids)
            self._note(f"checkpoint {checkpoint.conversation_id[-4:]} ..{end} -> {outcome}")
            if answer is None:
                self._ledger.claims(checkpoint.conversation_id).stored(
                    checkpoint, sent_s, self._ledger.may_be_gone(checkpoint.conversation_id)
                )
            elif isinstance(answer, Fenced):
                self._ledger.fenced(checkpoint.conversation_id, checkpoint.fence)
        return answers

    async def commit(self, commit: TurnCommit) -> Conversation:
        turn, before = self._turns[commit.conversation_id, commit.fence.nonce]
        what = f"commit {commit.conversation_id[-4:]} turn {turn}"
        self._ledger.proposed(commit, turn, before)
        try:
            record = await self._inner.commit(commit)
        except StoreError as error:
            self._note(f"{what} -> {type(error).__name__}")
            if isinstance(error, Fenced):
                self._ledger.fenced(commit.conversation_id, commit.fence, commits=True)
            raise
        self._note(f"{what} -> ok")
        return record

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        self._ledger.claims(conversation_id).ends(fence, aborts=True)
        self._note(f"abort {conversation_id[-4:]}")
        await self._inner.abort(tenant, conversation_id, fence)

    async def pulse(self) -> str:
        life = await self._inner.pulse()
        if life != self._life:
            self._note("pulse: another life")
        self._life = life
        return life

    async def repair(self, snapshot: Snapshot) -> None:
        record = snapshot.conversation
        of = f"turn {record.turn}{' and the running one' if snapshot.running else ''}"
        what = f"repair {record.conversation_id[-4:]} {of}"
        try:
            await self._inner.repair(snapshot)
        except StoreError as error:
            self._note(f"{what} -> {type(error).__name__}")
            raise
        self._ledger.counts["repaired"] += 1
        self._note(f"{what} -> ok")

    def _note(self, what: str) -> None:
        self._network.note(self._who, what)
