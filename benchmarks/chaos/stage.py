"""What a fault acts on, and one episode: clients start, the fault strikes, clients end, all is checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from benchmarks.chaos.app import STEP_S, toy_model
from benchmarks.chaos.checker import (
    Stored,
    Violations,
    check_conversation,
    check_transcript,
    gap_summary,
    interruptions,
)
from benchmarks.chaos.client import ChaosClient, ClientOptions, TurnLog
from benchmarks.chaos.oracle import TrueLog
from benchmarks.chaos.rig import CAPACITY, FIELDS, NotHappened, Rig
from benchmarks.chaos.workload import Scale, Workload
from cluster.redis_store import RedisStore
from cluster.store import NotFound
from deployments.auth import DEFAULT_TENANT
from deployments.config import TOY_MODEL
from deployments.text import ChatCodec
from engine.toy_engine import BYTE_VOCAB

T = TypeVar("T")
Json = dict[str, Any]

IDLE_S = 15.0
TRANSCRIPT = 1000


@dataclass(frozen=True, slots=True)
class Wound:
    """A turn that was running where a fault struck, and when."""

    log: TurnLog
    at_s: float

    def gap_s(self) -> float:
        """Its longest silence from then on."""
        return max(
            length for start_s, length in self.log.silences() if start_s + length > self.at_s
        )

    def restore_s(self) -> float:
        """At least this long its new owner computed before the first new token."""
        prefilled = self.log.usage.get("sinkserve", {}).get("prefill_tokens", 0)
        return -(-int(prefilled) // int(FIELDS["max_chunk"])) * STEP_S


@dataclass(slots=True)
class Stage:
    """Handed to a fault. What blocks goes through `aside`."""

    rig: Rig
    workload: Workload
    wounds: list[Wound] = field(default_factory=list)
    guests: list[ChaosClient] = field(default_factory=list)
    """Clients of the fault's own, checked like the others; their turns may be quarantined."""
    complaints: list[str] = field(default_factory=list)

    def may_fail(self, client: ChaosClient) -> frozenset[str]:
        """The errors with which a turn of this client may end."""
        return frozenset({"turn_quarantined"} if client in self.guests else ())

    def complain(self, note: str) -> None:
        """Something only the fault itself can see is not as it should be."""
        self.complaints.append(note)

    async def aside(self, work: Callable[[], T]) -> T:
        """Run blocking work while the clients go on."""
        return await asyncio.to_thread(work)

    async def owner(self, client: ChaosClient) -> str:
        """The replica that has the client's conversation, by the store."""
        store = await RedisStore.connect(self.rig.store.url)
        try:
            return (await store.get(DEFAULT_TENANT, client.conversation_id)).owner
        finally:
            await store.close()

    async def wound(self, replica: str | None) -> int:
        """Note the turns that run at `replica` (None: anywhere) now; returns how many."""
        now_s, before = time.monotonic(), len(self.wounds)
        for client in self.workload.live():
            log = client.live
            if log is not None and replica in (None, await self.owner(client)):
                self.wounds.append(Wound(log, now_s))
        return len(self.wounds) - before

    async def until(self, check: Callable[[], bool], within_s: float = 60.0) -> float:
        """Wait for it without blocking; returns how long it took, seconds. Raises NotHappened."""
        started_s = time.monotonic()
        await self.aside(lambda: self.rig.wait(check, within_s))
        return time.monotonic() - started_s


class Fault(Protocol):
    """`is_invisible`: no client may have to send anything again."""

    name: str
    is_invisible: bool

    async def strike(self, stage: Stage) -> Json:
        """Do it while clients talk; returns the evidence. Raises NotHappened."""
        ...


@dataclass(frozen=True, slots=True)
class Episode:
    """One fault and what came of it."""

    fault: str
    evidence: Json
    violations: Violations
    turns: int
    conversations: int
    interrupted: dict[str, int]
    gaps_s: list[float]
    restores_s: list[float]
    lasted_s: float

    def as_json(self) -> Json:
        return {
            "happened": self.evidence,
            "conversations": self.conversations,
            "turns": self.turns,
            "violations": self.violations.counts(),
            "notes": self.violations.notes[:20],
            "attempts_that_broke": self.interrupted,
            "longest_gap_s": gap_summary(self.gaps_s),
            "restore_at_least_s": gap_summary(self.restores_s),
            "lasted_s": round(self.lasted_s, 1),
        }


async def run_episode(rig: Rig, fault: Fault, options: ClientOptions, scale: Scale) -> Episode:
    """Clients of their own, one fault, and the check. Raises NotHappened."""
    started_s = time.monotonic()
    workload = Workload(options, scale)
    stage = Stage(rig, workload)
    try:
        await workload.start()
        evidence = await fault.strike(stage)
        await workload.finish()
    finally:
        await workload.stop()
    violations = Violations()
    for complaint in stage.complaints:
        violations.note("other", complaint)
    violations.add(await check_clients(stage, [*workload.clients, *stage.guests]))
    logs = [log for client in workload.clients for log in client.turns]
    broken = interruptions(logs)
    if fault.is_invisible and broken:
        note = f"clients had to send again: {broken}"
        violations.note("visible", note, sum(broken.values()))
    violations.add(await _leaks(stage))
    healed = [wound for wound in stage.wounds if wound.log.ended_s]
    return Episode(
        fault=fault.name,
        evidence=evidence,
        violations=violations,
        turns=len(logs),
        conversations=len(workload.clients),
        interrupted=broken,
        gaps_s=[wound.gap_s() for wound in healed],
        # What the replay takes is known of the toy alone.
        restores_s=[wound.restore_s() if options.model == TOY_MODEL else 0.0 for wound in healed],
        lasted_s=time.monotonic() - started_s,
    )


async def check_clients(stage: Stage, clients: list[ChaosClient]) -> Violations:
    """Every conversation against the truth."""
    found = Violations()
    store = await RedisStore.connect(stage.rig.store.url)
    try:
        for client in clients:
            stored = await _stored(store, client.conversation_id)
            if client.options.model == TOY_MODEL:
                truth = TrueLog(toy_model(BYTE_VOCAB), CAPACITY, ChatCodec.for_toy())
                one = check_conversation(client.turns, stored, truth, stage.may_fail(client))
            else:
                one = check_transcript(client.turns, stored)
            one.notes = [f"{client.conversation_id[:13]} {note}" for note in one.notes]
            found.add(one)
    finally:
        await store.close()
    return found


async def _stored(store: RedisStore, conversation_id: str) -> Stored:
    try:
        record = await store.get(DEFAULT_TENANT, conversation_id)
        _, messages = await store.transcript(DEFAULT_TENANT, conversation_id, TRANSCRIPT)
    except NotFound:
        return Stored(None)
    return Stored(record, messages)


async def _leaks(stage: Stage) -> Violations:
    """Slots and turns that are still taken although no client asks for anything."""
    found = Violations()

    def is_idle() -> bool:
        figures = stage.rig.healthy().values()
        return stage.rig.has_all(len(figures)) and all(
            not one["running_turns"]
            and not one["waiting_turns"]
            and one["free_slots"] + one["resident_conversations"] == one["kv_slots"]
            for one in figures
        )

    try:
        await stage.until(is_idle, IDLE_S)
    except NotHappened:
        figures = await stage.aside(stage.rig.healthy)
        found.note("slots_leaked", f"not idle afterwards: {list(figures.values())}")
    return found
