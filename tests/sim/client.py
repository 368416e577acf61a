"""Clients of the simulation: they insist, forget, overlap, leave, lie about the past, and log everything."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cluster.conversation import Conversation, Message, NewConversation
from cluster.store import ConversationStore, NotFound, StoreUnavailable
from deployments.turn_call import (
    TurnAccepted,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
    TurnTokens,
)
from engine.sampling import SamplingParams
from tests.sim.claims import Violation
from tests.sim.ledger import Ledger
from tests.sim.network import Network
from tests.sim.toy import FIRST_WORD, POISON, VOCAB
from tests.sim.virtual import Process

MAX_TRIES = 120
WAIT_AND_RETRY = (
    *("store_unavailable", "store_recovering", "replica_lost", "conversation_busy"),
    *("overloaded", "timeout", "not_ready"),
)


class Runner(Protocol):
    """A replica's front: `deployments.turn_runner.TurnRunner` or the small one of the simulation."""

    def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]: ...


class ReplicaDied(Exception):
    """The connection broke."""


class Silence(Exception):
    """Nothing has come for so long that the client takes the replica for dead."""


@dataclass(frozen=True, slots=True)
class Server:
    """One replica as clients reach it."""

    process: Process
    runner: Runner


async def listen(
    server: Server, call: TurnCall, patience_s: float
) -> AsyncGenerator[TurnItem, None]:
    """The items of a call over a network. Raises ReplicaDied, Silence."""
    arrived: asyncio.Queue[TurnItem | None] = asyncio.Queue()

    async def send() -> None:
        await server.process.gate()
        async with aclosing(server.runner.turn(call)) as items:
            async for item in items:
                await server.process.gate()
                arrived.put_nowait(item)

    async def tell_death() -> None:
        await server.process.died.wait()
        arrived.put_nowait(None)

    sender = server.process.spawn(send())
    watcher = asyncio.create_task(tell_death())
    try:
        while True:
            try:
                item = await asyncio.wait_for(arrived.get(), patience_s)
            except TimeoutError as error:
                raise Silence from error
            if item is None:
                raise ReplicaDied
            yield item
            if isinstance(item, TurnDone | TurnRefused):
                return
    finally:
        watcher.cancel()
        sender.cancel()


@dataclass(frozen=True, slots=True)
class Habits:
    """How likely a client does what it should not, or need not."""

    cancels: float = 0.0
    forgets_shown: float = 0.3
    second_reader: float = 0.15
    stale: float = 0.0
    asks_again: float = 0.15
    changes_body: float = 0.05
    without_expectation: float = 0.2
    steals: float = 0.0
    patience_s: float = 3.0
    poison: float = 0.0
    lies: float = 0.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a client has at hand. `servers` are those that it may call now."""

    ledger: Ledger
    network: Network
    store: ConversationStore
    servers: Callable[[], list[Server]]
    random: random.Random
    habits: Habits


class User:
    """One client of one conversation; `turn` and `head` are what it was told last."""

    def __init__(self, name: str, new: NewConversation, around: Surroundings) -> None:
        self.name = name
        self.gone = False
        self._new = new
        self._around = around
        self._turn: int | None = 0
        self._head: str | None = "0" * 64
        self._past: list[tuple[int | None, str | None]] = []
        self._number = 0
        self._owner = ""
        self._saw_death = False

    async def talk(self, turns: int) -> None:
        """So many turns, then stop."""
        for _ in range(turns):
            await asyncio.sleep(self._random.uniform(0.0, 0.5))
            await self.say()
            if self.gone:
                return

    async def say(self) -> None:
        """One turn until its fate is known, or until the client does not care any more."""
        call = self._new_call()
        self._past.append((self._turn, self._head))
        self._around.ledger.asked(call)
        self._saw_death = False
        seen: list[int] = []
        if self._chance(self._habits.second_reader):
            second = asyncio.create_task(self._read_along(call))
            await self._insist(call, seen)
            await second
        else:
            await self._insist(call, seen)
        if not self.gone and self._chance(self._habits.changes_body):
            await self._insist(replace(call, request_hash="another"), [])

    @property
    def _random(self) -> random.Random:
        return self._around.random

    @property
    def _habits(self) -> Habits:
        return self._around.habits

    def _chance(self, likelihood: float) -> bool:
        return self._random.random() < likelihood

    def _note(self, what: str) -> None:
        self._around.network.note(self.name, what)

    def _new_call(self) -> TurnCall:
        self._number += 1
        key = f"{self.name}.{self._number}"
        length = self._random.randrange(1, 6)
        ids = [self._random.randrange(FIRST_WORD, VOCAB) for _ in range(length)]
        if self._chance(self._habits.poison):
            ids[0] = POISON
        turn, head = self._turn, self._head
        if self._past and self._chance(self._habits.stale):
            turn, head = self._random.choice(self._past)
        if self._chance(self._habits.without_expectation):
            turn, head = None, None
        return TurnCall(
            tenant=self._new.tenant,
            conversation_id=self._new.conversation_id,
            input_ids=np.array(ids, np.int32),
            messages=(Message("user", key),),
            history=f"{self._random.getrandbits(256):064x}",
            sampling=SamplingParams(seed=self._random.getrandbits(64)),
            max_tokens=self._random.randrange(1, 13),
            expect_turn=turn,
            expect_head=head,
            key=key,
            request_hash=f"hash of {key}",
            on_disconnect="cancel" if self._chance(0.5) else "finish",
        )

    async def _insist(self, call: TurnCall, seen: list[int]) -> None:
        """Send the call until it gets an answer that ends it; `seen` grows by what is shown."""
        steal, quitting = False, self._chance(self._habits.cancels)
        for _ in range(MAX_TRIES):
            server = self._choose()
            if server is None:
                await asyncio.sleep(0.2)
                continue
            if self._chance(self._habits.forgets_shown):
                # As a client that lost its memory: it reads from the start again.
                seen.clear()
            steal = steal or self._saw_death
            now = replace(call, steal=steal, blameless=not self._saw_death, shown_ids=tuple(seen))
            steal = self._chance(self._habits.steals)
            try:
                end = await self._hear(server, now, seen, quitting)
            except (ReplicaDied, Silence) as trouble:
                self._note(f"{call.key} at {server.process.name}: {type(trouble).__name__}")
                # Whoever sees an owner die may take its turn away at once.
                steal = True
                self._saw_death |= isinstance(trouble, ReplicaDied)
                await asyncio.sleep(self._random.uniform(0.0, 0.4))
                continue
            if end is None:
                self._note(f"{call.key} given up after {len(seen)} tokens")
                await self._look()
                return
            if await self._ends(now, end, seen):
                return
            if isinstance(end, TurnRefused) and end.resumable:
                steal = True
                self._saw_death |= end.fatal
            await asyncio.sleep(self._random.uniform(0.05, 0.6))
        raise Violation(f"{call.key} got no answer in {MAX_TRIES} tries")

    async def _hear(
        self, server: Server, call: TurnCall, seen: list[int], quitting: bool
    ) -> TurnDone | TurnRefused | None:
        """The end of one call; None when the client left before it. Raises ReplicaDied, Silence."""
        patience_s = self._habits.patience_s * self._random.uniform(0.5, 1.5)
        async with aclosing(listen(server, call, patience_s)) as items:
            async for item in items:
                match item:
                    case TurnAccepted(replica=replica):
                        self._owner, self._saw_death = replica, False
                    case TurnTokens(k=k, token_ids=tokens):
                        if k != len(seen):
                            raise Violation(f"{call.key}: token {k} came after {len(seen)} tokens")
                        self._around.ledger.shown(server.process.name, call, k, tokens)
                        seen += tokens
                        if not quitting and self._chance(self._habits.lies):
                            await self._lie(server, call)
                        if quitting and self._chance(0.4):
                            return None
                    case TurnDone() | TurnRefused():
                        return item
        raise ReplicaDied

    async def _ends(self, call: TurnCall, end: TurnDone | TurnRefused, seen: list[int]) -> bool:
        """Whether that was the turn's end."""
        ledger = self._around.ledger
        if isinstance(end, TurnDone):
            self._note(f"{call.key} done as turn {end.turn}")
            ledger.done(call, seen, end, streamed=len(seen) > len(call.shown_ids))
            if end.output_ids.tolist()[: len(seen)] != seen:
                await self._look()
                return True
            if self._turn is None or end.turn > self._turn:
                self._turn, self._head = end.turn, end.head
            if self._chance(self._habits.asks_again):
                seen.clear()
                return False
            return True
        code = end.error.code
        self._note(f"{call.key} refused: {code}{' resumable' if end.resumable else ''}")
        if code in WAIT_AND_RETRY:
            return False
        if code == "idempotency_key_reused":
            ledger.key_reused(call)
            return True
        if code == "turn_conflict":
            await self._check_conflict(call)
            return True
        if code == "conversation_not_found":
            await self._check_gone()
            return True
        if code == "turn_quarantined":
            return True
        raise Violation(f"{call.key} was refused with {code}: {end.error.message}")

    async def _read_along(self, call: TurnCall) -> None:
        """A second reader of the same key, once: it must see the same."""
        await asyncio.sleep(self._random.uniform(0.0, 0.5))
        # Sometimes as one that took the owner for dead, so that two replicas run the turn.
        steal = self._chance(self._habits.steals)
        server = self._choose(0.2 if steal else 0.8)
        if server is None:
            return
        along = replace(call, on_disconnect="finish", steal=steal, blameless=True)
        try:
            async with aclosing(listen(server, along, self._habits.patience_s)) as items:
                async for item in items:
                    if isinstance(item, TurnTokens):
                        name = server.process.name
                        self._around.ledger.shown(name, call, item.k, item.token_ids)
        except (ReplicaDied, Silence):
            return

    async def _lie(self, server: Server, call: TurnCall) -> None:
        """Another request under the key of a turn that runs: it must not be shown the turn."""
        lie = replace(call, request_hash="a lie", shown_ids=(), steal=False, on_disconnect="finish")
        try:
            async with aclosing(listen(server, lie, self._habits.patience_s)) as items:
                async for item in items:
                    if not isinstance(item, TurnRefused):
                        raise Violation(f"{call.key}: another request was let in: {item}")
        except (ReplicaDied, Silence):
            return

    async def _check_conflict(self, call: TurnCall) -> None:
        """A 409 must be true; then go on from the state as it is."""
        ledger = self._around.ledger
        ledger.counts["turn_conflict"] += 1
        record = await self._look()
        known = ledger.known[call.conversation_id]
        if record is None or known.may_be_gone:
            return
        if call.expect_head == record.head:
            raise Violation(f"{call.key}: 409, although the client's view is the latest")
        if known.acknowledged.get(record.turn) == (record.head, call.key):
            raise Violation(f"{call.key}: 409, although it was committed last")

    async def _look(self) -> Conversation | None:
        """Read the record and go on from there."""
        try:
            record = await self._get()
        except NotFound:
            await self._check_gone()
            return None
        self._turn, self._head = record.turn, record.head
        return record

    async def _check_gone(self) -> None:
        known = self._around.ledger.known[self._new.conversation_id]
        self.gone = True
        if not known.deleted and not known.may_be_gone:
            raise Violation(f"{self._new.conversation_id} is gone")

    async def _get(self) -> Conversation:
        while True:
            try:
                return await self._around.store.get(self._new.tenant, self._new.conversation_id)
            except StoreUnavailable:
                await asyncio.sleep(0.2)

    def _choose(self, loyalty: float = 0.8) -> Server | None:
        """The owner, with this likelihood; else any, also one that does not answer."""
        servers = self._around.servers()
        owners = [server for server in servers if server.process.name == self._owner]
        if owners and self._chance(loyalty):
            return owners[0]
        return self._random.choice(servers) if servers else None
