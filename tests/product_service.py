"""What a user does with an engine directory, in this process: verify it, start a replica, talk to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cluster.memory_store import MemoryStore
from deployments.chat_service import ChatService
from deployments.cli import app
from deployments.config import Tunables, load_config
from deployments.conversation_records import FrontConfig
from deployments.engine_files import EngineFiles, locate_engine, start_engine, warm_up
from deployments.openai_sampling import RequestLimits
from deployments.turn_runner import ReplicaParts, TurnRunner
from engine.loop import EngineLoop
from engine.protocol import Engine
from tests.fake_turns import HASTE
from tests.product import CAPACITY
from tests.test_front_to_engine import OneReplica

TENANT = "default"
QUESTIONS = ["hi", "and you?", "go on"]


def verify(engine_dir: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["verify", str(engine_dir), "--tokens", "128", *more])


def start(engine_dir: Path, **fields: Any) -> tuple[EngineFiles, Engine]:
    """As a replica does. Raises ConfigError."""
    config = load_config({"model": str(engine_dir), "memory_budget_bytes": 1 << 20, **fields})
    files = locate_engine(config)
    return files, start_engine(config, files, threads=1)


@dataclass
class Service:
    """The front, a replica and a store in this process, and what a conversation has been told."""

    engine_dir: Path
    replies: list[str] = field(default_factory=list)
    recoveries: list[str] = field(default_factory=list)

    async def converse(self, questions: list[str], dies_before: int | None = None) -> None:
        """One conversation. Another replica takes the place of its first one before that question."""
        store = MemoryStore()
        service, runner = self.begin(store)
        named: dict[str, str] = {}
        for number, question in enumerate(questions):
            if number == dies_before:
                await runner.close()
                service, runner = self.begin(store)
            message = {"role": "user", "content": question}
            body = {"model": "m", "messages": [message], "seed": 5, "temperature": 0.8, **named}
            reply = await service.chat({**body, "ignore_eos": True}, TENANT)
            named = {"conversation": reply["conversation"]["id"]}
            self.replies.append(reply["choices"][0]["message"]["content"])
            self.recoveries.append(reply["usage"]["sinkserve"]["recovery"])
        record = await store.get(TENANT, named["conversation"])
        assert record.token_count > 2 * CAPACITY
        await runner.close()
        await service.close()

    def begin(self, store: MemoryStore) -> tuple[ChatService, TurnRunner]:
        files, engine = start(self.engine_dir)
        warm_up(engine)
        parts = ReplicaParts(
            "replica", files.spec, files.fingerprint, EngineLoop(engine), store, files.codec
        )
        runner = TurnRunner(parts, Tunables())
        limits = RequestLimits(vocab_size=files.spec.model.vocab_size, default_max_tokens=12)
        front = FrontConfig(("m",), files.fingerprint, CAPACITY, limits, max_input_tokens=500)
        service = ChatService(front, store, files.codec, OneReplica(runner), None, HASTE)
        return service, runner
