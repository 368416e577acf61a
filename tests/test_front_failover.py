"""The front over two real replicas (loop, gate, toy engine) and one store: a replica dies in mid-reply."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from cluster.memory_store import MemoryStore
from cluster.redis_functions import RedisOptions
from cluster.redis_store import RedisStore
from cluster.store import ConversationStore, StoreLimits, StoreUnavailable
from deployments import turn_opening
from deployments.chat_service import ChatService
from deployments.config import Limits, Tunables
from deployments.conversation_records import FrontConfig
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import ReplicaUnreachable
from deployments.openai_sampling import RequestLimits
from deployments.turn_call import (
    FollowCall,
    ReplicaStats,
    TurnCall,
    TurnItem,
    TurnTokens,
)
from deployments.turn_runner import TurnRunner
from engine.toy_engine import ToyEngine, ToyText
from tests.fake_turns import HASTE
from tests.faulty_proxy import faulty_proxy
from tests.toy_service import CODEC, SPEC, make_runner
from tests.valkey_fixture import start_valkey

Body = dict[str, Any]
Durability = Literal["token", "turn"]

MAX_TOKENS = 16


class MortalStore:
    """The store as one replica reaches it; once that is dead, nothing of it gets through."""

    def __init__(self, store: ConversationStore) -> None:
        self._store = store
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise StoreUnavailable("this replica is dead")
            return await method(*args, **kwargs)

        return call


@dataclass(slots=True)
class Replica:
    name: str
    runner: TurnRunner
    store: MortalStore


@dataclass(slots=True)
class Replicas:
    """Routes as the router does: to the owner, else to another one. `die_at`: the replica at work dies
    when it has shown that many tokens of a reply; `silent`: and nobody can say whether it did."""

    all: list[Replica]
    die_at: int | None = None
    silent: bool = False
    calls: list[TurnCall] = field(default_factory=list)

    def alive(self) -> list[Replica]:
        return [one for one in self.all if not one.store.dead]

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        self.calls.append(call)
        fit = [one for one in self.alive() if one.name != call.avoid] or self.alive()
        owners = [one for one in fit if one.name == call.owner_hint]
        replica = (owners or fit)[0]
        async with aclosing(replica.runner.turn(call)) as items:
            async for item in items:
                if isinstance(item, TurnTokens) and self.die_at is not None:
                    left = self.die_at - item.k
                    if len(item.token_ids) > left:
                        if left > 0:
                            yield TurnTokens(item.k, item.token_ids[:left], item.logprobs[:left])
                        self._kill(replica)
                yield item

    def _kill(self, replica: Replica) -> None:
        self.die_at = None
        replica.store.dead = True
        if self.silent:
            raise ReplicaUnreachable
        raise ServiceError(ErrorInfo("replica_lost", "killed"))

    async def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        for replica in self.alive():
            if replica.name == call.owner_hint:
                async with aclosing(replica.runner.follow(call)) as items:
                    async for item in items:
                        yield item
                return
        raise ServiceError(ErrorInfo("replica_lost", "nobody has it"))

    async def stats(self) -> tuple[ReplicaStats, ...]:
        return tuple(one.runner.stats() for one in self.alive())


@dataclass(slots=True)
class World:
    service: ChatService
    store: ConversationStore
    replicas: Replicas


@asynccontextmanager
async def world(
    durability: Durability = "token",
    step_delay_s: float = 0.0,
    store: ConversationStore | None = None,
    store_hold_s: float = 0.1,
) -> AsyncIterator[World]:
    store = store or MemoryStore(StoreLimits(input_tokens=1 << 20))
    limited = Limits(max_input_tokens=500)
    tunables = Tunables(
        limits=limited,
        durability=durability,
        store_hold_s=store_hold_s,
        lease_s=max(1.0, store_hold_s),
    )
    replicas = []
    for name in ("r1", "r2", "r3"):
        own = MortalStore(store)
        engine = ToyEngine(
            SPEC, max_resident=3, text=ToyText(stop_period=25), step_delay_s=step_delay_s
        )
        replicas.append(Replica(name, make_runner(own, name, engine, tunables), own))
    client = Replicas(replicas)
    limits = RequestLimits(vocab_size=SPEC.model.vocab_size, default_max_tokens=MAX_TOKENS)
    config = FrontConfig(("toy",), SPEC.fingerprint, SPEC.capacity, limits, max_input_tokens=500)
    service = ChatService(config, store, CODEC, client, None, HASTE)
    try:
        yield World(service, store, client)
    finally:
        await asyncio.gather(*(one.runner.close() for one in replicas))
        await service.close()


def ask(text: str, **more: Any) -> Body:
    return {"model": "toy", "messages": [{"role": "user", "content": text}], "seed": 5, **more}


def keyed(text: str) -> Body:
    return ask(text, idempotency_key=f"key of {text}".replace(" ", "-"))


@dataclass(frozen=True, slots=True)
class Told:
    """What a client has read of a reply, and where its conversation stands then."""

    text: str
    reason: str
    turn: int
    etag: str
    recovery: str


async def converse(world: World, stream: bool, die_at: int | None, **more: Any) -> list[Told]:
    """Three turns; in the second one the replica dies."""
    named, told = "", []
    for number, question in enumerate(("one", "two \u00e9", "three")):
        body = ask(question, **more)
        if named:
            body["conversation"] = named
        world.replicas.die_at = die_at if number == 1 else None
        if stream:
            body["stream_options"] = {"include_usage": True}
            chunks = [chunk async for chunk in world.service.chat_stream(body)]
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            reason, last = choices[-1]["finish_reason"], chunks[-1]
        else:
            last = await world.service.chat(body)
            text = last["choices"][0]["message"]["content"]
            reason = last["choices"][0]["finish_reason"]
        named, block = last["conversation"]["id"], last["conversation"]
        recovery = last["usage"]["sinkserve"]["recovery"]
        told.append(Told(text, reason, block["turn"], block["etag"], recovery))
    return told


def said(told: list[Told]) -> list[tuple[str, str, int, str]]:
    return [(one.text, one.reason, one.turn, one.etag) for one in told]


@pytest.mark.parametrize("durability", ["token", "turn"])
@pytest.mark.parametrize("with_stop", [False, True])
async def test_a_replica_killed_at_any_token(durability: Durability, with_stop: bool) -> None:
    """Text, ETag and every later turn are as if nothing had happened."""
    more: Body = {"ignore_eos": True}
    async with world(durability) as undisturbed:
        due = await converse(undisturbed, False, None, **more)
    if with_stop:
        # Ends the second reply, perhaps not at its first characters.
        more["stop"] = [due[1].text[8:11], "\u00e9\u00e9"]
        async with world(durability) as undisturbed:
            due = await converse(undisturbed, False, None, **more)
        assert due[1].reason == "stop"
    assert [one.recovery for one in due] == ["none"] * 3
    kills, resumed = 0, 0
    for k in range(MAX_TOKENS):
        async with world(durability, step_delay_s=0.001) as disturbed:
            disturbed.replicas.silent = k % 5 == 4
            told = await converse(disturbed, k % 2 == 0, k, **more)
            killed = len(disturbed.replicas.alive()) < 3
            page = await disturbed.service.list_conversations()
        assert said(told) == said(due), k
        assert len(page["data"]) == 1
        # A replica that was ahead of its reader may have committed all of it.
        assert told[1].recovery in ("exact", "none"), k
        kills += killed
        resumed += told[1].recovery == "exact"
        if not killed:
            break
    assert kills > 5
    assert resumed > 0


async def test_log_probabilities_and_a_new_conversation() -> None:
    """The first turn of a conversation, with what else a client may ask for."""
    body = ask("Hi", logprobs=True, top_logprobs=2, temperature=0.7, presence_penalty=0.5)
    async with world() as undisturbed:
        due = (await undisturbed.service.chat(body))["choices"]
    for k in (0, 1, 7):
        async with world() as disturbed:
            disturbed.replicas.die_at = k
            choices = (await disturbed.service.chat(body))["choices"]
            assert len(disturbed.replicas.alive()) == 2
        assert choices[0]["message"] == due[0]["message"]
        # Of tokens that were stored and not yet shown, nobody knows them any more.
        blocks = [choice[0]["logprobs"] or {"content": []} for choice in (choices, due)]
        entries = [block["content"] for block in blocks]
        assert entries[0][:k] == entries[1][:k]
        assert all(entry in entries[1] for entry in entries[0])


async def test_without_a_seed_the_reply_is_the_one_of_its_key() -> None:
    texts = set()
    for k in (None, 0, 3, 9):
        async with world() as one:
            one.replicas.die_at = k
            body = {**ask("Hi", idempotency_key="key"), "seed": None}
            texts.add((await one.service.chat(body))["choices"][0]["message"]["content"])
    assert len(texts) == 1


async def test_many_replies_outlive_the_replica_they_share() -> None:
    bodies = [ask(f"question {n}", seed=n, stop=["e"] if n % 2 else None) for n in range(6)]
    async with world() as undisturbed:
        due = [await undisturbed.service.chat(body) for body in bodies]
    async with world(step_delay_s=0.002) as disturbed:
        disturbed.replicas.die_at = 6
        replies = await asyncio.gather(*(disturbed.service.chat(body) for body in bodies))
        assert len(disturbed.replicas.alive()) == 2
    assert [reply["choices"] for reply in replies] == [reply["choices"] for reply in due]


async def test_a_stream_rejoined_at_another_front_while_its_replica_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(turn_opening, "time", SimpleNamespace(time=lambda: next(seconds)))
    body = ask("Hi", idempotency_key="key", ignore_eos=True)
    async with world() as undisturbed:
        reply = await undisturbed.service.chat(body)
    due = reply["choices"][0]["message"]["content"]
    async with world(step_delay_s=0.005) as one:
        chunks = one.service.chat_stream(body)
        seen = [await anext(chunks) for _ in range(4)]
        await chunks.aclose()
        config = dataclasses.replace(one.service.config)
        other = ChatService(config, one.store, CODEC, one.replicas, None, HASTE)
        one.replicas.die_at = 12
        after = seen[-1]["event_id"]
        rest = [chunk async for chunk in other.chat_stream({**body, "last_event_id": after})]
        again = await other.chat(body)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in seen + rest)
    assert text == due
    assert again["id"] == seen[0]["id"] == rest[-1]["id"]
    assert again["created"] == rest[-1]["created"] == seen[0]["created"]
    assert again["choices"] == reply["choices"]
    assert again["conversation"]["etag"] == reply["conversation"]["etag"]


async def test_who_follows_a_turn_outlives_its_replica() -> None:
    async with world(step_delay_s=0.005) as one:
        body = ask("Hi", ignore_eos=True)
        running = asyncio.create_task(one.service.chat(body))
        while not one.replicas.calls:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)
        named = one.replicas.calls[0].conversation_id
        followed: list[Body] = []
        for _ in range(400):
            with contextlib.suppress(ServiceError):
                followed = [await anext(chunks := one.service.rejoin_stream(named))]
                break
            await asyncio.sleep(0.005)
        followed += [chunk async for chunk in chunks]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in followed)
        assert text == (await running)["choices"][0]["message"]["content"]


# A real store, in trouble.


async def test_lost_replies_of_the_store_change_nothing(redis_url: str) -> None:
    async with world() as undisturbed:
        due = await converse(undisturbed, False, None, ignore_eos=True)
    with TemporaryDirectory(prefix="ss-") as directory:
        async with faulty_proxy(redis_url, f"{directory}/proxy.sock") as proxy:
            options = RedisOptions(timeout_s=0.5, attempts=3, backoff_s=0.01)
            store = await RedisStore.connect(proxy.url, options=options)
            try:
                async with world(store=store, step_delay_s=0.002, store_hold_s=20) as disturbed:
                    names = ["create", "begin", "checkpoint", "commit", "get", "transcript"]
                    proxy.lose = names * 2
                    told = await converse(disturbed, True, 5, ignore_eos=True)
            finally:
                await store.close()
    assert proxy.lost >= 8
    assert said(told) == said(due)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_store_that_restarts_is_waited_for(stream: bool) -> None:
    async with world() as undisturbed:
        due = await converse(undisturbed, False, None, ignore_eos=True)
    with TemporaryDirectory(prefix="ss-") as directory:
        options = ("--appendonly", "yes", "--appendfsync", "always")
        server = start_valkey(Path(directory), *options)
        limits = StoreLimits(recovery_s=0.2)
        store = await RedisStore.connect(server.url, limits)
        try:
            async with world(store=store, step_delay_s=0.01, store_hold_s=20) as disturbed:
                conversing = asyncio.create_task(converse(disturbed, stream, None, ignore_eos=True))
                while len(disturbed.replicas.calls) < 2:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.05)
                server.process.kill()
                server.process.wait()
                server = await asyncio.to_thread(start_valkey, Path(directory), *options)
                told = await conversing
        finally:
            await store.close()
            server.process.kill()
            server.process.wait()
    assert said(told) == said(due)


@pytest.mark.parametrize("trouble", ["down", "full"])
async def test_a_store_in_trouble_is_503_and_nothing_is_lost(trouble: str) -> None:
    with TemporaryDirectory(prefix="ss-") as directory:
        server = start_valkey(Path(directory), "--appendonly", "yes")
        options = RedisOptions(timeout_s=2.0, attempts=2, backoff_s=0.01)
        store = await RedisStore.connect(server.url, StoreLimits(recovery_s=0.1), options)
        try:
            async with world(store=store) as one:
                first = await one.service.chat(ask("one"))
                named = first["conversation"]["id"]
                if trouble == "down":
                    server.process.kill()
                    server.process.wait()
                else:
                    with server.client() as admin:
                        admin.config_set("maxmemory", 1)
                for body in (ask("two", conversation=named), ask("new"), keyed("new")):
                    with pytest.raises(ServiceError, match="store_unavailable") as caught:
                        await one.service.chat(body)
                    assert caught.value.info.kind.retry_after_s
                if trouble == "down":
                    server = await asyncio.to_thread(
                        start_valkey, Path(directory), "--appendonly", "yes"
                    )
                else:
                    with server.client() as admin:
                        admin.config_set("maxmemory", 0)
                second = await one.service.chat(ask("two", conversation=named))
                assert second["conversation"]["turn"] == 2
                assert (await one.service.chat(keyed("new")))["conversation"]["turn"] == 1
        finally:
            await store.close()
            server.process.kill()
            server.process.wait()
