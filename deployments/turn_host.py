"""What the turns of one replica share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Protocol

from cluster.store import ConversationStore, StoreError
from deployments.config import Tunables
from deployments.output_gate import OutputGate
from deployments.store_watch import StoreWatch
from deployments.turn_progress import ReplyCodec
from engine.loop import EngineLoop
from engine_build.spec import EngineSpec


@dataclass(frozen=True, slots=True)
class ReplicaParts:
    """What a replica is made of. `fingerprint` names model, tokenizer and window."""

    replica: str
    spec: EngineSpec
    fingerprint: str
    loop: EngineLoop
    store: ConversationStore
    codec: ReplyCodec


@dataclass(slots=True)
class TurnFigures:
    """Turns by what became of them."""

    committed_turns: int = 0
    refused_turns: int = 0
    cancelled_turns: int = 0
    joined_turns: int = 0
    resumed_turns: int = 0
    fenced_turns: int = 0
    handed_over_turns: int = 0


class Claimant(Protocol):
    """A turn that holds the replica's only place for its conversation."""

    @property
    def over(self) -> asyncio.Event:
        """Set once nothing of the turn is left here."""
        ...

    def lose(self, error: StoreError) -> None:
        """The store says that the turn belongs to another owner, or to nobody."""
        ...


@dataclass(frozen=True, slots=True)
class TurnHost:
    """`claims` are by conversation; `chores` outlive the turns that left them. Turns resume one at a time
    (`resuming`), each until it has stored a token, so that one which kills its engine takes the blame
    alone."""

    parts: ReplicaParts
    tunables: Callable[[], Tunables]
    gate: OutputGate
    watch: StoreWatch
    figures: TurnFigures
    claims: dict[str, Claimant] = field(default_factory=dict)
    resuming: asyncio.Lock = field(default_factory=asyncio.Lock)
    chores: set[asyncio.Task[None]] = field(default_factory=set)

    def do_later(self, chore: Coroutine[None, None, None]) -> None:
        """In a task of its own."""
        task = asyncio.create_task(chore)
        self.chores.add(task)
        task.add_done_callback(self.chores.discard)
