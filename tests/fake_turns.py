"""A replica at the TurnCall seam without an engine: a real store, scripted tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from starlette.applications import Starlette

from cluster.conversation import (
    BeginTurn,
    BusyTurn,
    Checkpoint,
    CommittedTurn,
    Message,
    Ownership,
    TurnCommit,
    chain_head,
    history_hash,
)
from cluster.memory_store import MemoryStore
from cluster.store import StoreError
from deployments.auth import ApiKeys
from deployments.chat_service import ChatService
from deployments.conversation_records import FrontConfig
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import FailoverPolicy, ReplicaUnreachable
from deployments.ingress import create_app
from deployments.openai_sampling import RequestLimits
from deployments.store_errors import store_error_info
from deployments.text import ChatCodec
from deployments.turn_call import (
    FollowCall,
    ReplicaStats,
    TurnAccepted,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
    TurnTokens,
    TurnUsage,
)
from engine.protocol import FinishReason
from engine.sampling import TokenLogprob
from engine.toy_engine import BYTE_VOCAB

MODEL = "toy"
FINGERPRINT = "f" * 64
CAPACITY = 256
HASTE = FailoverPolicy(first_pause_s=0.0001, max_pause_s=0.001, silence_s=0.05)


Death = Literal["dead", "unreachable", "vanished", "handed_over"]


@dataclass(slots=True)
class Script:
    """What a turn does. `refuse` comes before acceptance; `fail` instead of token `fail_at`, and an
    exception there is raised; token `lose` is never sent. Gates are awaited: `accept_gate` first,
    `gate` before token `gate_at`; `at_gate` tells that one was reached.

    The replica dies (see `death`) before it shows token `die_at`, having stored `ahead` more than it
    has shown; -1 is after the commit, before the last item. `die_unaccepted`: right after `begin`.
    """

    reply: str = "Good day."
    finish_reason: FinishReason = "stop"
    refuse: ErrorInfo | None = None
    fail: ErrorInfo | Exception | None = None
    fail_at: int = 2
    lose: int | None = None
    die_at: int | None = None
    death: Death = "dead"
    ahead: int = 0
    die_unaccepted: bool = False
    accept_gate: asyncio.Event | None = None
    gate: asyncio.Event | None = None
    gate_at: int = 2
    at_gate: asyncio.Event = field(default_factory=asyncio.Event)


class Died(Exception):
    """The replica is gone; its claim stays."""


@dataclass(slots=True)
class FakeTurn:
    """A running turn with its log, read by any number of calls."""

    call: TurnCall
    owned: Ownership
    items: list[TurnItem | Exception] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    over: bool = False
    readers: int = 0

    def add(self, item: TurnItem | Exception) -> None:
        self.items.append(item)
        self.grown.set()

    def end(self) -> None:
        self.over = True
        self.grown.set()

    async def read(self, first_k: int) -> AsyncGenerator[TurnItem, None]:
        """Tokens from number `first_k` on. Raises what the replica did."""
        number = 0
        while True:
            while number < len(self.items):
                item = self.items[number]
                number += 1
                if isinstance(item, Exception):
                    raise item
                if not (isinstance(item, TurnTokens) and item.k < first_k):
                    yield item
            if self.over:
                return
            self.grown.clear()
            await self.grown.wait()


@dataclass(slots=True)
class FakeEngine:
    """Begins, stores, commits and aborts as replicas do; the next call after a death meets another
    replica. Records what it was asked. `durability` as in the configuration."""

    store: MemoryStore
    codec: ChatCodec
    scripts: deque[Script] = field(default_factory=deque)
    calls: list[TurnCall] = field(default_factory=list)
    follows: list[FollowCall] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: dict[str, FakeTurn] = field(default_factory=dict)
    ended: int = 0
    deaths: int = 0
    up: bool = True
    durability: Literal["token", "turn"] = "token"
    fingerprint: str = FINGERPRINT

    @property
    def replica(self) -> str:
        return f"replica-{chr(ord('a') + self.deaths)}"

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        try:
            async with aclosing(self._turn(call)) as items:
                async for item in items:
                    yield item
        finally:
            self.ended += 1

    async def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        self.follows.append(call)
        turn = self.running.get(call.conversation_id)
        if turn is None or turn.call.tenant != call.tenant or call.owner_hint != self.replica:
            yield TurnRefused(ErrorInfo("replica_lost", "no such turn here"))
            return
        async with aclosing(turn.read(0)) as items:
            async for item in items:
                yield item

    async def _turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        self.calls.append(call)
        script = self.scripts.popleft() if self.scripts else Script()
        if script.accept_gate is not None:
            script.at_gate.set()
            await script.accept_gate.wait()
        if script.refuse is not None:
            yield TurnRefused(script.refuse)
            return
        try:
            begun = await self.store.begin(self._claim(call))
        except StoreError as error:
            yield TurnRefused(store_error_info(error, call.conversation_id))
            return
        if not isinstance(begun, Ownership):
            self.scripts.appendleft(script)
        if isinstance(begun, CommittedTurn):
            yield self._accepted(call, begun.turn, begun.result)
            yield _remembered(begun)
            return
        if isinstance(begun, BusyTurn):
            turn = self.running.get(call.conversation_id)
            if turn is None:
                info = ErrorInfo("conversation_busy", "its owner is silent", None, 1.0)
                yield TurnRefused(info)
                return
        else:
            turn = FakeTurn(call, begun)
            self.running[call.conversation_id] = turn
            turn.task = asyncio.create_task(self._produce(turn, script))
        turn.readers += 1
        try:
            async with aclosing(turn.read(len(call.shown_ids))) as items:
                async for item in items:
                    yield item
        finally:
            turn.readers -= 1
            if not turn.over and not turn.readers and call.on_disconnect == "cancel":
                assert turn.task is not None
                turn.task.cancel()
                await asyncio.gather(turn.task, return_exceptions=True)

    def _claim(self, call: TurnCall) -> BeginTurn:
        return BeginTurn(
            *(call.conversation_id, call.tenant, self.replica, call.input_ids, self.fingerprint),
            lease_s=30.0,
            expect_turn=call.expect_turn,
            expect_head=call.expect_head,
            key=call.key,
            request_hash=call.request_hash,
            steal=call.steal,
        )

    def _accepted(self, call: TurnCall, turn: int, result: dict[str, Any]) -> TurnAccepted:
        name, created_s = result["completion_id"], result["created_s"]
        return TurnAccepted(turn, self.replica, "none", name, created_s, call.stop)

    async def _produce(self, turn: FakeTurn, script: Script) -> None:
        committed = False
        try:
            async for item in self._items(turn, script):
                committed = isinstance(item, TurnDone)
                if not (committed and script.die_at == -1):
                    turn.add(item)
            if script.die_at == -1:
                raise Died
        except Died:
            committed = True
            self.deaths += 1
            self._die(turn, script)
        except Exception as error:
            turn.add(error)
        finally:
            if self.running.get(turn.call.conversation_id) is turn:
                del self.running[turn.call.conversation_id]
            if not committed:
                self.aborted.append(turn.call.conversation_id)
                with contextlib.suppress(StoreError):
                    call = turn.call
                    await self.store.abort(call.tenant, call.conversation_id, turn.owned.fence)
            turn.end()

    def _die(self, turn: FakeTurn, script: Script) -> None:
        lost = ErrorInfo("replica_lost", "gone")
        match script.death:
            case "dead":
                turn.add(ServiceError(lost))
            case "unreachable":
                turn.add(ReplicaUnreachable())
            case "handed_over":
                turn.add(TurnRefused(lost, resumable=True))

    async def _items(self, turn: FakeTurn, script: Script) -> AsyncGenerator[TurnItem, None]:
        call, owned = turn.call, turn.owned
        record = owned.conversation
        if script.die_unaccepted:
            raise Died
        kept = {"completion_id": call.completion_id, "created_s": call.created_s}
        yield self._accepted(call, record.turn + 1, kept)
        sampled = self._tokens(call, script)
        known = owned.output_ids.tolist()
        assert sampled[: len(known)] == known, "the fake replicas disagree"
        assert sampled[: len(call.shown_ids)] == list(call.shown_ids)
        # Tokens of earlier owners are in the log as well, for whoever reads it from the start.
        for k, token_id in enumerate(sampled):
            if k == script.gate_at and script.gate is not None:
                script.at_gate.set()
                await script.gate.wait()
            if k == script.die_at:
                for ahead in range(k, min(k + script.ahead, len(sampled))):
                    await self._store_token(turn, ahead, sampled[ahead])
                raise Died
            if k == script.fail_at and script.fail is not None:
                if isinstance(script.fail, Exception):
                    raise script.fail
                yield TurnRefused(script.fail)
                return
            if k != script.lose:
                await self._store_token(turn, k, token_id)
                yield TurnTokens(k, (token_id,), self._logprobs(call, token_id))
        yield await self._commit(turn, script, sampled)

    async def _store_token(self, turn: FakeTurn, k: int, token_id: int) -> None:
        if self.durability == "token":
            call, ids = turn.call, np.array([token_id], np.int32)
            one = Checkpoint(
                call.conversation_id, call.tenant, turn.owned.fence, k, ids, lease_s=30.0
            )
            assert await self.store.checkpoint([one]) == [None]

    async def _commit(self, turn: FakeTurn, script: Script, sampled: list[int]) -> TurnDone:
        call, record = turn.call, turn.owned.conversation
        reply = self.codec.close_reply(sampled, call.stop)
        log_ids = np.concatenate([reply.output_ids, reply.closing_ids])
        context = record.token_count
        usage = TurnUsage(
            input_tokens=len(call.input_ids),
            output_tokens=len(sampled),
            context_tokens=context,
            cached_tokens=max(0, context - len(reply.closing_ids)),
            prefill_tokens=len(call.input_ids) + len(reply.closing_ids),
            evicted_tokens=max(0, context + len(call.input_ids) + len(log_ids) - CAPACITY),
            recovery="restart" if record.turn and not context else "none",
        )
        committed = await self.store.commit(
            TurnCommit(
                conversation_id=call.conversation_id,
                tenant=call.tenant,
                fence=turn.owned.fence,
                output_ids=log_ids,
                head=chain_head(record.head, call.input_ids, log_ids),
                history=history_hash(call.history, "assistant", reply.text),
                messages=(*call.messages, Message("assistant", reply.text)),
                result={
                    "finish_reason": script.finish_reason,
                    "usage": dataclasses.asdict(usage),
                    "completion_id": call.completion_id,
                    "created_s": call.created_s,
                },
                reply_tokens=len(reply.output_ids),
            )
        )
        return TurnDone(
            committed.turn,
            committed.head,
            script.finish_reason,
            reply.output_ids,
            usage,
            record=committed,
        )

    async def stats(self) -> tuple[ReplicaStats, ...]:
        if not self.up:
            return ()
        return (ReplicaStats("replica-a", {"free_slots": 3.0, "running_turns": 0.0}),)

    @staticmethod
    def _tokens(call: TurnCall, script: Script) -> list[int]:
        """Bytes of the reply, cut as the engine cuts: after the token that completes a stop string."""
        data = script.reply.encode()
        if script.finish_reason == "length":
            return list(data[: call.max_tokens])
        stops = [stop.encode() for stop in call.stop]
        ends = [data.find(stop) + len(stop) for stop in stops if stop in data]
        return list(data[: min(ends)] if ends else data)

    @staticmethod
    def _logprobs(
        call: TurnCall, token_id: int
    ) -> tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...]:
        if not call.sampling.logprobs:
            return ()
        others = [TokenLogprob(other, -2.0 - other) for other in range(call.sampling.top_logprobs)]
        return ((TokenLogprob(token_id, -0.5), tuple(others)),)


def _remembered(begun: CommittedTurn) -> TurnDone:
    usage = TurnUsage(**begun.result["usage"])
    reason = begun.result["finish_reason"]
    return TurnDone(begun.turn, begun.head, reason, begun.reply_ids, usage)


@dataclass(slots=True)
class Front:
    """A whole front over a fake replica."""

    store: MemoryStore
    engine: FakeEngine
    codec: ChatCodec
    service: ChatService

    def app(self, keys: ApiKeys | None = None) -> Starlette:
        return create_app(self.service, keys)


def make_front(**changes: Any) -> Front:
    """`changes` are fields of FrontConfig."""
    store, codec = MemoryStore(), ChatCodec.for_toy()
    engine = FakeEngine(store, codec)
    limits = RequestLimits(vocab_size=BYTE_VOCAB)
    config = FrontConfig((MODEL,), FINGERPRINT, CAPACITY, limits, max_input_tokens=2000)
    config = dataclasses.replace(config, **changes)
    return Front(store, engine, codec, ChatService(config, store, codec, engine, None, HASTE))
