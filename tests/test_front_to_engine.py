"""The front over a real replica, loop and toy engine, without Ray: what the parts promise each other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.conversation import Message
from cluster.memory_store import MemoryStore
from cluster.store import StoreLimits
from deployments.chat_service import ChatService
from deployments.conversation_records import FrontConfig
from deployments.errors import ServiceError
from deployments.openai_sampling import RequestLimits
from deployments.turn_call import FollowCall, ReplicaStats, TurnCall, TurnItem
from deployments.turn_runner import TurnRunner
from engine.toy_engine import ToyEngine, ToyText
from tests.fake_turns import HASTE
from tests.toy_service import CODEC, SPEC, TENANT, make_runner

Body = dict[str, Any]
WORDS = [
    "hello",
    "na\u00efve",
    "\u4f60\u597d",
    "\U0001f600",
    "<|end_of_turn|>",
    "",
    "x y z",
    "\n\n",
]


@dataclass(slots=True)
class OneReplica:
    runner: TurnRunner

    def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        return self.runner.turn(call)

    def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        return self.runner.follow(call)

    async def stats(self) -> tuple[ReplicaStats, ...]:
        return (self.runner.stats(),)


@dataclass(slots=True)
class Whole:
    service: ChatService
    store: MemoryStore
    runner: TurnRunner


async def start(engine: ToyEngine) -> Whole:
    store = MemoryStore(StoreLimits(input_tokens=1 << 20))
    runner = make_runner(store, engine=engine)
    limits = RequestLimits(vocab_size=SPEC.model.vocab_size, default_max_tokens=30)
    config = FrontConfig(("toy",), SPEC.fingerprint, SPEC.capacity, limits, max_input_tokens=500)
    service = ChatService(config, store, CODEC, OneReplica(runner), None, HASTE)
    return Whole(service, store, runner)


@pytest.fixture
async def whole() -> AsyncIterator[Whole]:
    running = await start(ToyEngine(SPEC, max_resident=3, text=ToyText(stop_period=25)))
    yield running
    await running.runner.close()
    await running.service.close()


def user(text: str) -> Body:
    return {"role": "user", "content": text}


def ask(messages: list[Body], **more: Any) -> Body:
    return {"model": "toy", "messages": messages, **more}


@dataclass(slots=True)
class Talk:
    """A client that keeps its history, and the ids that its conversation must hold."""

    history: list[Body]
    named: str = ""
    turn: int = 0

    def whole_input(self) -> list[int]:
        pairs = [Message(message["role"], message["content"]) for message in self.history]
        ids: list[int] = CODEC.encode_opening(pairs).tolist()
        return ids


async def one_turn(whole: Whole, talk: Talk, rng: random.Random) -> Any:
    """A turn in a way chosen at random: stateful or stateless, streamed or not, with stops or not."""
    talk.history.append(user(" ".join(rng.choices(WORDS, k=rng.randrange(6)))))
    stateful = bool(talk.named) and rng.random() < 0.5
    more: Body = {"seed": rng.randrange(100), "logprobs": True, "top_logprobs": 1}
    if rng.random() < 0.4:
        more["stop"] = rng.sample(["e", "qu", " a", "th"], k=2)
    if stateful:
        more["conversation"] = talk.named
    body = ask(talk.history[-1:] if stateful else talk.history, **more)
    if rng.random() < 0.5:
        reply = await whole.service.chat(body, TENANT)
        text = reply["choices"][0]["message"]["content"]
        usage, block, logprobs = reply["usage"], reply["conversation"], reply["choices"][0]
        entries = (logprobs["logprobs"] or {"content": []})["content"]
    else:
        body["stream_options"] = {"include_usage": True}
        chunks = [chunk async for chunk in whole.service.chat_stream(body, TENANT)]
        usage, block = chunks[-1]["usage"], chunks[-1]["conversation"]
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        blocks = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        entries = [entry for one in blocks for entry in one["content"]]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    assert not any(stop in text for stop in more.get("stop", ()))
    talk.turn += 1
    assert block["turn"] == talk.turn
    assert usage["prompt_tokens"] == len(talk.whole_input())
    talk.named = block["id"]
    talk.history.append({"role": "assistant", "content": text})
    record = await whole.store.get(TENANT, talk.named)
    assert (record.head, record.running) == (block["etag"], False)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached + usage["sinkserve"]["prefill_tokens"] <= usage["prompt_tokens"]
    assert usage["sinkserve"]["evicted_tokens"] == max(0, record.token_count - SPEC.capacity)
    return usage


async def test_conversations_side_by_side_stay_what_they_are(whole: Whole) -> None:
    """Five clients on three kv_slots, each in random ways; every count and text must fit."""

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        system: list[Body] = [{"role": "system", "content": "Be kind."}] if seed % 2 else []
        talk = Talk(system)
        for _ in range(8):
            await one_turn(whole, talk, rng)
        page = await whole.service.transcript(talk.named, TENANT)
        shown = [{key: entry[key] for key in ("role", "content")} for entry in page["data"]]
        assert shown == talk.history

    await asyncio.gather(*[client(seed) for seed in range(5)])
    made = await whole.service.list_conversations(TENANT, limit=100)
    assert len(made["data"]) == 5


async def test_a_resident_conversation_computes_only_its_new_tokens(whole: Whole) -> None:
    talk, rng = Talk([]), random.Random(1)
    await one_turn(whole, talk, rng)
    for _ in range(6):
        before = (await whole.store.get(TENANT, talk.named)).token_count
        usage = await one_turn(whole, talk, rng)
        new_tokens = usage["prompt_tokens"] - before
        # The reply's last token and the end of turn go in with the next turn.
        assert usage["sinkserve"]["prefill_tokens"] <= new_tokens + 2
        assert usage["sinkserve"]["recovery"] == "none"


async def test_the_same_seed_says_the_same(whole: Whole) -> None:
    texts = set()
    for _ in range(3):
        reply = await whole.service.chat(ask([user("a")], seed=5), TENANT)
        texts.add(reply["choices"][0]["message"]["content"])
    other = await whole.service.chat(ask([user("a")], seed=6), TENANT)
    assert len(texts) == 1
    assert other["choices"][0]["message"]["content"] not in texts


async def test_a_client_that_leaves_frees_its_slot() -> None:
    whole = await start(ToyEngine(SPEC, max_resident=1, step_delay_s=0.005))
    endless = ask([user("a")], max_tokens=4000, ignore_eos=True)
    try:
        for _ in range(3):
            chunks = whole.service.chat_stream(endless, TENANT)
            await anext(chunks)
            await anext(chunks)
            await chunks.aclose()
        reply = await whole.service.chat(ask([user("a")], max_tokens=3), TENANT)
        assert reply["choices"][0]["finish_reason"] == "length"
        await whole.service.close()
        left = await whole.service.list_conversations(TENANT)
        assert [entry["id"] for entry in left["data"]] == [reply["conversation"]["id"]]
        assert whole.runner.stats().values["cancelled_turns"] == 3
    finally:
        await whole.runner.close()


async def test_an_engine_that_dies_is_a_lost_replica() -> None:
    class Dying(ToyEngine):
        def step(self, plan: Any) -> Any:
            raise MemoryError("no more")

    whole = await start(Dying(SPEC, max_resident=1))
    try:
        with pytest.raises(ServiceError) as caught:
            await whole.service.chat(ask([user("a")]), TENANT)
        assert caught.value.info.kind.status in (500, 503)
        await whole.service.close()
        assert (await whole.service.list_conversations(TENANT))["data"] == []
    finally:
        await whole.runner.close()
