"""A replica's turns on a toy engine, and what they must say: shared by replica and cluster tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np

from cluster.conversation import (
    GENESIS,
    Message,
    NewConversation,
    chain_head,
    history_hash,
    new_conversation_id,
)
from cluster.store import ConversationStore
from deployments.config import Limits, Tunables
from deployments.text import ChatCodec
from deployments.turn_call import TurnCall, TurnDone, TurnItem, TurnRefused
from deployments.turn_runner import ReplicaParts, TurnRunner
from engine.loop import EngineLoop
from engine.loop_types import LoopConfig
from engine.sampling import SamplingParams
from engine.toy_engine import ToyEngine, ToyModel, ToyText, byte_spec, toy_reply
from engine.window import SinkWindow

TENANT = "t"
SPEC = byte_spec(capacity=48, max_chunk=8)
TEXT = ToyText(stop_period=25)
CODEC = ChatCodec.for_toy()
SAMPLING = SamplingParams(temperature=1.0, top_p=0.95, seed=7)


def make_runner(
    store: ConversationStore,
    name: str = "r1",
    engine: ToyEngine | None = None,
    tunables: Tunables | None = None,
    max_waiting: int = 64,
) -> TurnRunner:
    engine = engine or ToyEngine(SPEC, max_resident=4, text=TEXT)
    loop = EngineLoop(engine, LoopConfig(max_running=3, max_waiting=max_waiting))
    parts = ReplicaParts(name, SPEC, SPEC.fingerprint, loop, store, CODEC)
    return TurnRunner(parts, tunables or Tunables(limits=Limits(max_input_tokens=500)))


@dataclass
class Talk:
    """One conversation with its own idea of what is in it: every committed id, and the reply due."""

    store: ConversationStore
    conversation_id: str = field(default_factory=new_conversation_id)
    sink_tokens: int = 4
    replay_windows: int = 2
    turn: int = 0
    history: str = GENESIS
    head: str = GENESIS
    log: list[int] = field(default_factory=list)

    async def create(self, fingerprint: str = SPEC.fingerprint) -> Talk:
        window_tokens = SPEC.capacity - self.sink_tokens
        new = NewConversation(
            self.conversation_id,
            TENANT,
            fingerprint,
            self.sink_tokens,
            window_tokens,
            self.replay_windows,
        )
        await self.store.create(new)
        return self

    def call(
        self, text: str, max_tokens: int = 40, stop: tuple[str, ...] = (), **more: object
    ) -> TurnCall:
        message = Message("user", text)
        encode = CODEC.encode_turn if self.turn else CODEC.encode_opening
        fields: dict[str, object] = {
            "tenant": TENANT,
            "conversation_id": self.conversation_id,
            "input_ids": encode([message]),
            "messages": (message,),
            "history": history_hash(self.history, message.role, message.content),
            "sampling": SAMPLING,
            "max_tokens": max_tokens,
            "stop": stop,
            **more,
        }
        return TurnCall(**fields)  # type: ignore[arg-type]

    def due(self, call: TurnCall) -> list[int]:
        """The ids that the replica must sample, the end token included, by the slow oracle."""
        window = SinkWindow(
            self.sink_tokens, SPEC.capacity - self.sink_tokens, SPEC.slot_tokens - self.sink_tokens
        )
        eos_ids = frozenset() if call.ignore_eos else CODEC.eos_ids
        return toy_reply(
            ToyModel(SPEC.model.vocab_size, TEXT),
            window,
            [*self.log, *call.input_ids.tolist()],
            (call.sampling, self.turn + 1),
            call.max_tokens,
            eos_ids,
        )

    def due_text(self, call: TurnCall) -> str:
        """The reply's text: decoded, then cut at the first stop string."""
        text = CODEC.decode(self.due(call))
        cuts = [text.index(stop) for stop in call.stop if stop in text]
        return text[: min(cuts)] if cuts else text

    def accept(self, call: TurnCall, done: TurnDone) -> None:
        """Take a committed turn into the log, after comparing it with what was due."""
        text, due = self.due_text(call), self.due(call)
        assert CODEC.decode(done.output_ids) == text
        if not call.stop:
            assert done.output_ids.tolist() == due[: -1 if due[-1] in CODEC.eos_ids else None]
        assert done.turn == self.turn + 1
        closing = CODEC.close_reply([], []).closing_ids
        self.log += [*call.input_ids.tolist(), *done.output_ids.tolist(), *closing.tolist()]
        self.turn, self.head = done.turn, done.head
        self.history = history_hash(call.history, "assistant", text)

    async def adopt(self, call: TurnCall) -> None:
        """Take `call` into the log if it was committed although nobody was told."""
        record = await self.store.get(TENANT, self.conversation_id)
        if record.turn == self.turn:
            return
        reply = CODEC.close_reply(self.due(call), call.stop)
        output_ids = [*reply.output_ids.tolist(), *reply.closing_ids.tolist()]
        head = chain_head(self.head, call.input_ids, np.array(output_ids, np.int32))
        assert (record.turn, record.head) == (self.turn + 1, head)
        self.log += [*call.input_ids.tolist(), *output_ids]
        self.turn, self.head, self.history = record.turn, record.head, record.history

    async def idle(self) -> None:
        """Wait until no turn is claimed."""
        await until(self._is_idle)

    async def _is_idle(self) -> bool:
        return not (await self.store.get(TENANT, self.conversation_id)).running

    async def say(self, runner: TurnRunner, text: str, **more: object) -> TurnDone:
        """One whole turn, checked. Raises AssertionError unless it is committed as due."""
        call = self.call(text, **more)  # type: ignore[arg-type]
        items = await run_turn(runner, call)
        assert isinstance(items[-1], TurnDone), items[-1]
        self.accept(call, items[-1])
        return items[-1]


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Poll: neither the store nor the engine's thread has an event to wait for."""
    while not await check():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def run_turn(runner: TurnRunner, call: TurnCall) -> list[TurnItem]:
    async with aclosing(runner.turn(call)) as items:
        return [item async for item in items]


async def refusal(runner: TurnRunner, call: TurnCall) -> str:
    """The code of a turn that must be refused."""
    last = (await run_turn(runner, call))[-1]
    assert isinstance(last, TurnRefused), last
    return last.error.code
