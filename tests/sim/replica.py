"""A replica of the simulation: production's protocol, small enough to be broken on purpose.

The same as in production: the contract it speaks (TurnCall in, TurnItem out), the store and its Redis
functions, `cluster.restore`, the hash chain; one checkpoint for all running turns of a step, and
nothing shown before its answer; slots that are valid under one hash only; joining, takeover, repair
after RolledBack and after a new pulse, a bounded number of snapshots.

Not as in production: the engine is a function of a few lines (`tests.sim.toy`) in place of thread,
scheduler and kv_slots; no text, so no stop strings; a lease is renewed by checkpoints alone; a resumed
turn does not wait for another one. `tests.sim.real_replica` runs production's own code instead.

    begin -> restore -> [ sample -> checkpoint -> show ]* -> commit -> settle
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.conversation import (
    BeginTurn,
    BusyTurn,
    Checkpoint,
    CommittedTurn,
    Conversation,
    Message,
    Ownership,
    RememberedTurn,
    ReplayLog,
    RunningSnapshot,
    Snapshot,
    TokenIds,
    TurnCommit,
    chain_head,
    history_hash,
)
from cluster.restore import plan_restore
from cluster.store import (
    ConversationStore,
    Fenced,
    NotFound,
    Recovering,
    RolledBack,
    StoreError,
    StoreUnavailable,
)
from deployments.errors import ErrorInfo
from deployments.store_errors import store_error_info
from deployments.turn_call import (
    TurnAccepted,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
    TurnTokens,
    TurnUsage,
)
from tests.sim.toy import EOS, MODEL, POISON, ToySlot, close_reply, toy_token
from tests.sim.virtual import Process

LEASE_S = 6.0
HOLD_S = 2.0
PULSE_S = 0.5
REPLAY_WINDOWS = 2
RESUMABLE = (StoreUnavailable, Fenced, RolledBack)


@dataclass(frozen=True, slots=True)
class Host:
    """Where a replica runs. `salt` is "" for the deterministic toy."""

    process: Process
    store: ConversationStore
    random: random.Random
    salt: str
    max_slots: int
    on_poison: Callable[[TurnCall], None]


@dataclass(slots=True, eq=False)
class Running:
    """A turn that this replica believes to own. Of `sampled` tokens, `num_stored` may be shown."""

    call: TurnCall
    ownership: Ownership
    slot: ToySlot
    sampled: list[int]
    num_stored: int
    messages: tuple[Message, ...]
    held_since_s: float | None = None
    repairs: int = 0
    readers: int = 0
    committing: bool = False
    end: TurnDone | TurnRefused | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def turn(self) -> int:
        return self.ownership.conversation.turn + 1

    @property
    def input_ids(self) -> TokenIds:
        return self.ownership.input_ids if self.ownership.resumed else self.call.input_ids

    @property
    def is_complete(self) -> bool:
        return EOS in self.sampled or len(self.sampled) >= self.call.max_tokens

    def tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class SimReplica:
    """Serves turns; what it does on its own runs in `host.process`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._store = host.store
        self._slots: dict[str, ToySlot] = {}
        self._turns: dict[str, Running] = {}
        self._kept: dict[str, Snapshot] = {}
        self._claiming: dict[str, asyncio.Lock] = {}
        self._life: str | None = None
        self._work = asyncio.Event()
        host.process.spawn(self._run_engine())
        host.process.spawn(self._keep_pulse())

    @property
    def name(self) -> str:
        return self._host.process.name

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """As `TurnRunner.turn`."""
        try:
            running = await self._join(call)
        except StoreError as error:
            info = store_error_info(error, call.conversation_id)
            yield TurnRefused(info, isinstance(error, RESUMABLE))
            return
        if isinstance(running, TurnDone | TurnRefused):
            yield running
            return
        running.readers += 1
        try:
            async for item in self._follow(running, call):
                yield item
        finally:
            running.readers -= 1
            if not running.readers and call.on_disconnect == "cancel" and running.end is None:
                self._host.process.spawn(self._cancel(running))

    async def close(self) -> None:
        """Nothing outlives the process."""

    # Claiming.

    async def _join(self, call: TurnCall) -> Running | TurnDone | TurnRefused:
        """Raises StoreError."""
        lock = self._claiming.setdefault(call.conversation_id, asyncio.Lock())
        async with lock:
            running = self._turns.get(call.conversation_id)
            if running is not None and self._is_same_turn(running, call):
                return running
            if self._life is None:
                # Only who knows the life in which it begins can tell that a later one is another.
                self._life = await self._store.pulse()
            begun = await self._begin(call)
            if isinstance(begun, CommittedTurn):
                return done(begun)
            if isinstance(begun, BusyTurn):
                info = ErrorInfo("conversation_busy", f"{begun.owner} runs it", None, 0.5)
                return TurnRefused(info)
            return await self._start(call, begun)

    def _is_same_turn(self, running: Running, call: TurnCall) -> bool:
        mine = running.call
        return (mine.key, mine.request_hash) == (call.key, call.request_hash)

    async def _begin(self, call: TurnCall) -> Ownership | CommittedTurn | BusyTurn:
        begun = await self._store.begin(self._claim(call))
        if isinstance(begun, BusyTurn) and begun.owner == self.name:
            # The store says that it runs here, and it does not: an answer to us was lost.
            begun = await self._store.begin(self._claim(replace(call, steal=True, blameless=True)))
        return begun

    def _claim(self, call: TurnCall) -> BeginTurn:
        return BeginTurn(
            conversation_id=call.conversation_id,
            tenant=call.tenant,
            replica=self.name,
            input_ids=call.input_ids,
            fingerprint=MODEL,
            lease_s=LEASE_S,
            expect_turn=call.expect_turn,
            expect_head=call.expect_head,
            nonce=f"{self._host.random.getrandbits(128):032x}",
            key=call.key,
            request_hash=call.request_hash,
            steal=call.steal,
            blameless=call.blameless,
        )

    async def _start(self, call: TurnCall, ownership: Ownership) -> Running | TurnRefused:
        previous = self._turns.pop(call.conversation_id, None)
        if previous is not None:
            self._lose(previous, Fenced(call.conversation_id))
        stored = ownership.output_ids.tolist()
        shown = list(call.shown_ids)
        if stored[: len(shown)] != shown[: len(stored)]:
            await self._abort(call, ownership)
            return TurnRefused(ErrorInfo("turn_conflict", "The reply is not the one shown before."))
        sampled = self._known_output(stored, shown)
        slot = self._restored(call, ownership, sampled)
        running = Running(call, ownership, slot, sampled, len(stored), self._messages(ownership))
        self._turns[call.conversation_id] = running
        self._work.set()
        return running

    def _known_output(self, stored: list[int], shown: list[int]) -> list[int]:
        """What need not be sampled. A client may have seen what the store has lost since."""
        return max(stored, shown, key=len)

    def _restored(self, call: TurnCall, ownership: Ownership, sampled: list[int]) -> ToySlot:
        """The slot with everything before the next token in it."""
        record = ownership.conversation
        slot = self._slots.pop(record.conversation_id, None)
        resident = slot is not None and self._is_valid(slot, record)
        new = ownership.input_ids if ownership.resumed else call.input_ids
        tokens = np.concatenate([new, np.array(sampled, np.int32)]).astype(np.int32)
        length = slot.length if resident and slot is not None else None
        if slot is None or not resident:
            slot = ToySlot(record.sink_tokens, record.window_tokens, record.head)
        for segment in plan_restore(ownership.replay, tokens, length).segments:
            slot.push(segment.start, segment.tokens.tolist())
        return slot

    def _is_valid(self, slot: ToySlot, record: Conversation) -> bool:
        """Whether the slot holds this very conversation."""
        return slot.head == record.head and slot.length > 0

    def _messages(self, ownership: Ownership) -> tuple[Message, ...]:
        """The transcript as far as this replica has written its end."""
        kept = self._kept.get(ownership.conversation.conversation_id)
        same = kept is not None and kept.conversation.head == ownership.conversation.head
        return kept.messages if kept is not None and same else ()

    # The engine: one step for all running turns.

    async def _run_engine(self) -> None:
        process = self._host.process
        while True:
            await self._work.wait()
            await process.sleep(self._host.random.uniform(0.002, 0.1))
            turns = [turn for turn in self._turns.values() if not turn.committing]
            if not turns:
                self._work.clear()
                continue
            for running in turns:
                self._sample(running)
            if process.died.is_set():
                await process.gate()
            await self._pass(turns)
            for running in turns:
                if running.is_complete and running.num_stored == len(running.sampled):
                    self._settle(running)

    def _sample(self, running: Running) -> None:
        if POISON in running.input_ids:
            self._host.on_poison(running.call)
            self._host.process.crash()
        elif running.num_stored == len(running.sampled) and not running.is_complete:
            token = self._draw(running)
            running.sampled.append(token)
            running.slot.push(running.slot.length, [token])

    def _draw(self, running: Running) -> int:
        k, seed = len(running.sampled), running.call.sampling.seed
        return toy_token(running.slot, seed, running.turn, k, self._host.salt)

    async def _pass(self, turns: list[Running]) -> None:
        """Store what was sampled, then show it."""
        batch = [self._checkpoint(running) for running in turns]
        answers = await self._store.checkpoint(batch)
        for running, checkpoint, answer in zip(turns, batch, answers, strict=True):
            await self._take(running, checkpoint, answer)

    def _checkpoint(self, running: Running) -> Checkpoint:
        call, k = running.call, running.num_stored
        return Checkpoint(
            conversation_id=call.conversation_id,
            tenant=call.tenant,
            fence=running.ownership.fence,
            k=k,
            token_ids=np.array(running.sampled[k:], np.int32),
            lease_s=LEASE_S,
        )

    async def _take(
        self, running: Running, checkpoint: Checkpoint, answer: StoreError | None
    ) -> None:
        if self._turns.get(running.call.conversation_id) is not running:
            return
        now_s = asyncio.get_running_loop().time()
        if answer is None:
            running.num_stored = checkpoint.k + len(checkpoint.token_ids)
            running.held_since_s = None
            running.tell()
        elif isinstance(answer, StoreUnavailable):
            if running.held_since_s is None:
                running.held_since_s = now_s
            if now_s - running.held_since_s > HOLD_S:
                self._lose(running, answer)
        else:
            await self._mend(running, answer)

    async def _mend(self, running: Running, error: StoreError) -> bool:
        """Put the turn back if the store has lost it; whether to go on."""
        if isinstance(error, RolledBack):
            try:
                await self._repair_turn(running)
            except StoreUnavailable:
                return True
            except StoreError as refusal:
                error = refusal
            else:
                return True
        self._lose(running, error)
        return False

    def _settle(self, running: Running) -> None:
        if self._turns.get(running.call.conversation_id) is running and not running.committing:
            running.committing = True
            self._host.process.spawn(self._commit(running))

    # The end of a turn.

    async def _commit(self, running: Running) -> None:
        reply, closing = close_reply(running.sampled)
        commit = self._commit_of(running, np.array(reply + closing, np.int32), len(reply))
        loop = asyncio.get_running_loop()
        until_s = loop.time() + LEASE_S
        while self._turns.get(running.call.conversation_id) is running:
            repairs = running.repairs
            try:
                record = await self._store.commit(commit)
            except StoreUnavailable as error:
                if loop.time() > until_s:
                    self._lose(running, error)
                await self._host.process.sleep(0.1)
                continue
            except StoreError as error:
                if not await self._mend(running, error):
                    return
                continue
            if self._is_void(running, repairs):
                continue
            self._committed(running, commit, record, reply)
            return

    def _is_void(self, running: Running, repairs: int) -> bool:
        """Whether the answer is of a life of the store that has ended since: the turn was put back as
        running, so it must be committed again."""
        return running.repairs != repairs

    def _commit_of(self, running: Running, output_ids: TokenIds, reply_tokens: int) -> TurnCommit:
        call, record = running.call, running.ownership.conversation
        reply = Message("assistant", " ".join(map(str, output_ids[:reply_tokens])))
        return TurnCommit(
            conversation_id=call.conversation_id,
            tenant=call.tenant,
            fence=running.ownership.fence,
            output_ids=output_ids,
            head=chain_head(record.head, running.input_ids, output_ids),
            history=history_hash(call.history, reply.role, reply.content),
            messages=(*call.messages, reply),
            result={"usage": len(output_ids)},
            reply_tokens=reply_tokens,
        )

    def _committed(
        self, running: Running, commit: TurnCommit, record: Conversation, reply: list[int]
    ) -> None:
        conversation_id, slot = running.call.conversation_id, running.slot
        if self._turns.get(conversation_id) is not running:
            return
        del self._turns[conversation_id]
        # A closing token that was not sampled is not cached: the next turn's prefill begins with it.
        slot.head = commit.head
        self._slots[conversation_id] = slot
        self._keep(running, commit, record)
        while len(self._slots) > self._host.max_slots:
            oldest = next(iter(self._slots))
            del self._slots[oldest]
            self._kept.pop(oldest, None)
        running.end = TurnDone(
            running.turn, commit.head, "stop", np.array(reply, np.int32), _usage(running)
        )
        running.tell()

    def _keep(self, running: Running, commit: TurnCommit, record: Conversation) -> None:
        """Remember what would have to be put back."""
        log = self._advanced(running, commit)
        messages = (*running.messages, *commit.messages)
        self._kept[record.conversation_id] = Snapshot(
            conversation=record,
            replay=log,
            replay_windows=REPLAY_WINDOWS,
            messages=messages,
            first_message=2 * record.turn - len(messages),
            results=(self._result(running, commit),),
        )

    def _result(self, running: Running, commit: TurnCommit) -> RememberedTurn:
        context = running.ownership.conversation.token_count + len(running.input_ids)
        return RememberedTurn(
            key=running.call.key,
            request_hash=running.call.request_hash,
            turn=running.turn,
            head=commit.head,
            reply_start=context,
            reply_ids=commit.output_ids[: commit.reply_tokens],
            result=commit.result,
        )

    def _advanced(self, running: Running, commit: TurnCommit) -> ReplayLog:
        record = running.ownership.conversation
        ids = np.concatenate([running.input_ids, commit.output_ids]).astype(np.int32)
        recent = REPLAY_WINDOWS * record.window_tokens
        return running.ownership.replay.advanced(ids, record.sink_tokens, recent)

    def _lose(self, running: Running, error: StoreError) -> None:
        """The turn goes on elsewhere, or nowhere. Its slot holds tokens that nobody committed."""
        if self._turns.get(running.call.conversation_id) is running:
            del self._turns[running.call.conversation_id]
        if running.end is None:
            info = store_error_info(error, running.call.conversation_id)
            running.end = TurnRefused(info, isinstance(error, RESUMABLE))
            running.tell()

    async def _cancel(self, running: Running) -> None:
        if running.readers or running.committing or running.end is not None:
            return
        self._lose(running, Fenced(running.call.conversation_id))
        await self._abort(running.call, running.ownership)

    async def _abort(self, call: TurnCall, ownership: Ownership) -> None:
        try:
            await self._store.abort(call.tenant, call.conversation_id, ownership.fence)
        except StoreError:
            """Its lease ends it."""

    # The store's lives.

    async def _keep_pulse(self) -> None:
        while True:
            await self._host.process.sleep(PULSE_S)
            try:
                life = await self._store.pulse()
                if self._life is not None and life != self._life:
                    await self._repair_all()
                self._life = life
            except StoreUnavailable:
                continue

    async def _repair_all(self) -> None:
        """Raises StoreUnavailable, and is then to be done again."""
        for running in list(self._turns.values()):
            try:
                await self._repair_turn(running)
            except (Recovering, StoreUnavailable):
                raise
            except StoreError as error:
                # Newer than what was put back may be by a commit of ours whose answer is on its way.
                if not running.committing:
                    self._lose(running, error)
        for conversation_id, kept in list(self._kept.items()):
            if conversation_id in self._turns:
                continue
            try:
                await self._store.repair(kept)
            except (Fenced, NotFound):
                self._kept.pop(conversation_id, None)

    async def _repair_turn(self, running: Running) -> None:
        """Raises StoreError."""
        running.repairs += 1
        await self._store.repair(self._snapshot(running))

    def _snapshot(self, running: Running) -> Snapshot:
        claim, ownership = running.call, running.ownership
        return Snapshot(
            conversation=ownership.conversation,
            replay=ownership.replay,
            replay_windows=REPLAY_WINDOWS,
            messages=running.messages,
            first_message=2 * ownership.conversation.turn - len(running.messages),
            running=RunningSnapshot(
                nonce=ownership.fence.nonce,
                key=claim.key,
                request_hash=claim.request_hash,
                input_ids=running.input_ids,
                output_ids=np.array(running.sampled[: running.num_stored], np.int32),
                lease_s=LEASE_S,
            ),
        )

    # Readers.

    async def _follow(self, running: Running, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        yield TurnAccepted(running.turn, self.name, "none")
        k = len(call.shown_ids)
        while True:
            news = running.news
            visible = [token for token in self._visible(running) if token != EOS]
            if len(visible) > k:
                yield TurnTokens(k, tuple(visible[k:]))
                k = len(visible)
            elif running.end is not None:
                yield running.end
                return
            else:
                await news.wait()

    def _visible(self, running: Running) -> list[int]:
        return running.sampled[: running.num_stored]


def done(committed: CommittedTurn) -> TurnDone:
    usage = TurnUsage(0, 0, 0, 0, 0, 0, "none")
    return TurnDone(committed.turn, committed.head, "stop", committed.reply_ids, usage)


def _usage(running: Running) -> TurnUsage:
    return TurnUsage(len(running.input_ids), len(running.sampled), 0, 0, 0, 0, "none")
