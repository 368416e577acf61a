"""A replica at the TurnCall seam without an engine: a real store, scripted tokens."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.applications import Starlette

from cluster.conversation import BeginTurn, Fence, Message, TurnCommit, chain_head, history_hash
from cluster.memory_store import MemoryStore
from cluster.store import StoreError
from deployments.auth import ApiKeys
from deployments.chat_service import ChatService, FrontConfig
from deployments.errors import ErrorInfo
from deployments.ingress import create_app
from deployments.openai_schema import RequestLimits
from deployments.store_errors import store_error_info
from deployments.text import ChatCodec
from deployments.turn_call import (
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


@dataclass(slots=True)
class Script:
    """What a turn does. `refuse` comes before acceptance; `fail` instead of token `fail_at`, and an
    exception there is raised; token `lose` is never sent. Gates are awaited: `accept_gate` first,
    `gate` before token `gate_at`; `at_gate` tells that one was reached."""

    reply: str = "Good day."
    finish_reason: FinishReason = "stop"
    refuse: ErrorInfo | None = None
    fail: ErrorInfo | Exception | None = None
    fail_at: int = 2
    vanish_at: int | None = None
    vanish_committed: bool = False
    lose: int | None = None
    accept_gate: asyncio.Event | None = None
    gate: asyncio.Event | None = None
    gate_at: int = 2
    at_gate: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class FakeEngine:
    """Begins, commits and aborts in the store as a replica does. Records what it was asked."""

    store: MemoryStore
    codec: ChatCodec
    scripts: deque[Script] = field(default_factory=deque)
    calls: list[TurnCall] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    ended: int = 0
    up: bool = True

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        try:
            async with aclosing(self._turn(call)) as items:
                async for item in items:
                    yield item
        finally:
            self.ended += 1

    async def _turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        self.calls.append(call)
        script = self.scripts.popleft() if self.scripts else Script()
        if script.accept_gate is not None:
            script.at_gate.set()
            await script.accept_gate.wait()
        if script.refuse is not None:
            yield TurnRefused(script.refuse)
            return
        begin = BeginTurn(
            call.conversation_id,
            call.tenant,
            "replica-a",
            call.input_ids,
            FINGERPRINT,
            30.0,
            call.expect_turn,
            call.expect_head,
        )
        try:
            owned = await self.store.begin(begin)
        except StoreError as error:
            yield TurnRefused(store_error_info(error, call.conversation_id))
            return
        record, committed = owned.conversation, False
        try:
            yield TurnAccepted(record.turn + 1, "replica-a", "none")
            sampled = self._tokens(call, script)
            for k, token_id in enumerate(sampled):
                if k == script.gate_at and script.gate is not None:
                    script.at_gate.set()
                    await script.gate.wait()
                if k == script.vanish_at:
                    return
                if k == script.fail_at and script.fail is not None:
                    if isinstance(script.fail, Exception):
                        raise script.fail
                    yield TurnRefused(script.fail)
                    return
                if k != script.lose:
                    yield TurnTokens(k, (token_id,), self._logprobs(call, token_id))
            reply = self.codec.close_reply(sampled, call.stop)
            log_ids = np.concatenate([reply.output_ids, reply.closing_ids])
            after = await self.store.commit(
                TurnCommit(
                    conversation_id=call.conversation_id,
                    tenant=call.tenant,
                    fence=owned.fence,
                    output_ids=log_ids,
                    head=chain_head(record.head, call.input_ids, log_ids),
                    history=history_hash(call.history, "assistant", reply.text),
                    messages=(*call.messages, Message("assistant", reply.text)),
                )
            )
            committed = True
            if script.vanish_committed:
                return
            usage = TurnUsage(
                input_tokens=len(call.input_ids),
                output_tokens=len(sampled),
                context_tokens=record.token_count,
                cached_tokens=max(0, record.token_count - len(reply.closing_ids)),
                prefill_tokens=len(call.input_ids) + len(reply.closing_ids),
                evicted_tokens=max(0, after.token_count - CAPACITY),
                recovery="none",
            )
            yield TurnDone(after.turn, after.head, script.finish_reason, reply.output_ids, usage)
        finally:
            if not committed:
                self.aborted.append(call.conversation_id)
                await self._abort(call, owned.fence)

    async def stats(self) -> tuple[ReplicaStats, ...]:
        if not self.up:
            return ()
        return (ReplicaStats("replica-a", {"free_slots": 3.0, "running_turns": 0.0}),)

    async def _abort(self, call: TurnCall, fence: Fence) -> None:
        try:
            await self.store.abort(call.tenant, call.conversation_id, fence)
        except StoreError:
            return

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
    return Front(store, engine, codec, ChatService(config, store, codec, engine))
