"""Replicas that come and go with the load, and a ledger of which replica ran every turn.

ScaleIn     replicas are taken away while all of them hold conversations and stream, again and again
Autoscale   Serve itself adds and takes away replicas as clients come and fall silent
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from benchmarks.chaos.client import ChaosClient, TurnLog
from benchmarks.chaos.rig import NotHappened
from benchmarks.chaos.stage import Stage, Wound

Json = dict[str, Any]

PHASES = ("growing", "steady", "shrinking", "returning")
LOOK_S = 0.25
PATIENCE_S = 60.0
LAG_S = 1.0
"""A replica that a router no longer sees may still be on the list for so long."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One turn: when its client sent it and saw its end, and the replica that committed it."""

    started_s: float
    ended_s: float
    replica: str


@dataclass(slots=True)
class Ledger:
    """`seen` are the replicas that the ingress could reach, each time somebody looked."""

    ran: dict[str, list[Ran]] = field(default_factory=dict)
    seen: list[tuple[float, frozenset[str]]] = field(default_factory=list)

    def left_s(self, replica: str) -> float:
        """When it was seen no more, infinity if it is still there."""
        after = None
        for at_s, names in reversed(self.seen):
            if replica in names:
                break
            after = at_s
        return float("inf") if after is None else after

    def changes(self, since_s: float = 0.0) -> tuple[int, int]:
        """Turns on another replica than the turn before, as (moved, orphaned): moved is a turn that could
        have run where the last one ran, orphaned one whose replica went before the turn was over."""
        moved = orphaned = 0
        for turns in self.ran.values():
            for before, turn in pairwise(turns):
                if before.replica != turn.replica and turn.started_s >= since_s:
                    is_gone = self.left_s(before.replica) <= turn.ended_s + LAG_S
                    orphaned += is_gone
                    moved += not is_gone
        return moved, orphaned

    def replica_of(self, client: ChaosClient) -> str:
        """Where its last turn ran, "" for none."""
        turns = self.ran.get(client.conversation_id)
        return turns[-1].replica if turns else ""

    async def note(self, stage: Stage, client: ChaosClient) -> None:
        """The turn that has just ended."""
        log = client.turns[-1]
        if log.is_done:
            ran = Ran(log.started_s, log.ended_s, await stage.owner(client))
            self.ran.setdefault(client.conversation_id, []).append(ran)

    async def watch(self, url: str) -> None:
        """Look who is there, until cancelled."""
        async with httpx.AsyncClient(base_url=url, timeout=10.0) as http:
            while True:
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    health: Json = (await http.get("/healthz")).json()
                    found = frozenset(one["replica"] for one in health.get("replicas", []))
                    if found:
                        self.seen.append((time.monotonic(), found))
                await asyncio.sleep(LOOK_S)


def restored(logs: Iterable[TurnLog]) -> tuple[int, int]:
    """Turns that did not find their cache, and tokens that were computed again for them."""
    turns = tokens = 0
    for log in logs:
        usage = log.usage.get("sinkserve")
        if log.is_done and usage and usage["recovery"] != "none":
            own = log.usage["prompt_tokens"] - usage["context_tokens"]
            turns += 1
            tokens += max(0, usage["prefill_tokens"] - own)
    return turns, tokens


def first_tokens_s(logs: Iterable[TurnLog]) -> list[float]:
    """From sending to the first text, seconds."""
    return [log.texts[0][0] - log.started_s for log in logs if log.texts]


@contextlib.asynccontextmanager
async def keeping(stage: Stage, ledger: Ledger) -> AsyncIterator[None]:
    """Write the ledger from here on; after this block turns are still noted, but nobody looks."""
    stage.workload.turn_ended = lambda client: ledger.note(stage, client)
    look = asyncio.create_task(ledger.watch(stage.rig.url))
    try:
        yield
    finally:
        look.cancel()
        await asyncio.gather(look, return_exceptions=True)


def complain_of_moves(stage: Stage, ledger: Ledger) -> Json:
    """No turn may leave a replica that could have run it."""
    moved, orphaned = ledger.changes()
    if moved:
        stage.complain(f"{moved} turns ran elsewhere although their replica was there")
    return {"moved_off_a_living_owner": moved, "moved_off_a_removed_replica": orphaned}


@dataclass(slots=True)
class ScaleIn:
    """From three replicas to two and to one, in turns, while each holds conversations and streams."""

    times: int = 4
    newcomers: int = 4
    name: str = "scale_in"
    is_invisible: bool = True

    async def strike(self, stage: Stage) -> Json:
        ledger = Ledger()
        async with keeping(stage, ledger):
            lefts = [2 - number % 2 for number in range(self.times)]
            rounds = [await self._round(stage, ledger, left) for left in lefts]
        return {"rounds": rounds, **complain_of_moves(stage, ledger)}

    async def _round(self, stage: Stage, ledger: Ledger, left: int) -> Json:
        rig, workload = stage.rig, stage.workload
        # A new replica gets new conversations alone, and Serve takes the newest away first.
        joined = await workload.join(self.newcomers)
        replicas = set(await stage.aside(rig.healthy))
        await _all_stream(stage, ledger, replicas)
        holds = {one.conversation_id: ledger.replica_of(one) for one in workload.clients}
        streams = {one.conversation_id: one.turns[-1] for one in workload.live()}
        struck_s = time.monotonic()
        await stage.aside(lambda: rig.scale(left))
        removed = replicas - set(await stage.aside(rig.healthy))
        struck = [one for one, replica in holds.items() if replica in removed]
        cut = [streams[one] for one in struck if one in streams]
        if not cut:
            raise NotHappened("what was removed streamed nothing")
        stage.wounds += [Wound(log, struck_s) for log in cut]
        took_s = time.monotonic() - struck_s
        await stage.aside(lambda: rig.scale(3))
        workload.rest(joined)
        await _until(lambda: all(log.ended_s for log in cut), "a turn of the removed does not end")
        resumed = [log for log in cut if _was_resumed(log)]
        return {
            "replicas": [len(replicas), left],
            "conversations_on_the_removed": len(struck),
            "streams_on_the_removed": len(cut),
            "of_these_resumed_elsewhere": len(resumed),
            "took_s": round(took_s, 1),
        }


def _was_resumed(log: TurnLog) -> bool:
    return bool(log.usage.get("sinkserve", {}).get("recovery", "none") != "none")


async def _until(check: Callable[[], bool], otherwise: str) -> None:
    """Wait for what clients do. Raises NotHappened."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not check():
        if time.monotonic() > deadline_s:
            raise NotHappened(otherwise)
        await asyncio.sleep(0.02)


async def _all_stream(stage: Stage, ledger: Ledger, replicas: set[str]) -> None:
    """Wait until every one of them has had a turn and streams another. Raises NotHappened."""

    def is_so() -> bool:
        streaming = [one for one in stage.workload.live() if one.turns[-1].num_chars > 0]
        return replicas <= {ledger.replica_of(one) for one in streaming}

    await _until(is_so, "some replica got no conversation")


@dataclass(slots=True)
class Autoscale:
    """Clients come one by one until Serve runs `most` replicas, stay, and fall silent until it runs one.

    Some of the replicas that are taken away go on all the time; the others come back at once at the end.
    """

    ledger: Ledger = field(default_factory=Ledger)
    most: int = 3
    most_clients: int = 16
    every_s: float = 1.0
    stays_s: float = 10.0
    go_on: int = 3
    name: str = "autoscale"
    is_invisible: bool = True

    async def strike(self, stage: Stage) -> Json:
        workload, ledger = stage.workload, self.ledger
        async with keeping(stage, ledger):
            first = set(await stage.aside(stage.rig.healthy))
            started_s = time.monotonic()
            await stage.wound(None)
            while len(workload.clients) < self.most_clients:
                await workload.join(1)
                await asyncio.sleep(self.every_s)
            await stage.until(lambda: len(stage.rig.healthy()) == self.most)
            grown_s = time.monotonic()
            newcomers = await workload.join(self.most)
            await asyncio.sleep(self.stays_s)
            moved_by_growth = ledger.changes()
            on_new = [one for one in newcomers if ledger.replica_of(one) not in first | {""}]
            lasting = [
                one for one in workload.clients if ledger.replica_of(one) not in first | {""}
            ]
            lasting = lasting[: self.go_on]
            silent_s = time.monotonic()
            await stage.wound(None)
            workload.rest(one for one in workload.clients if one not in lasting)
            await stage.until(lambda: len(stage.rig.healthy()) == 1, 120.0)
            shrunk_s = time.monotonic()
            await _until(
                lambda: all(_went_on(one, shrunk_s) for one in lasting), "no turn after it"
            )
            back_s = time.monotonic()
            resting = [one for one in workload.clients if one not in lasting]
            await workload.return_once(resting)
        if not lasting:
            raise NotHappened("no conversation ran on a new replica")
        return {
            "grown_after_s": round(grown_s - started_s, 1),
            "shrunk_after_s": round(shrunk_s - silent_s, 1),
            "replicas_at_s": _sizes(ledger, started_s),
            "newcomers_on_new_replicas": [len(on_new), len(newcomers)],
            "moved_or_orphaned_while_growing": list(moved_by_growth),
            **complain_of_moves(stage, ledger),
            "phases": _phases(workload.clients, [grown_s, silent_s, back_s]),
        }


def _sizes(ledger: Ledger, since_s: float) -> list[tuple[float, int]]:
    """How many replicas there were, whenever that changed."""
    found: list[tuple[float, int]] = []
    for at_s, names in ledger.seen:
        if not found or found[-1][1] != len(names):
            found.append((round(at_s - since_s, 1), len(names)))
    return found


def _went_on(client: ChaosClient, since_s: float) -> bool:
    """Whether a turn that was sent after then has ended."""
    return any(log.started_s > since_s and log.ended_s for log in client.turns)


def _phases(clients: Iterable[ChaosClient], borders_s: Sequence[float]) -> Json:
    """Turns by when they were sent: their first tokens, and what was computed again."""
    found: dict[str, list[TurnLog]] = {name: [] for name in PHASES}
    for log in (log for client in clients for log in client.turns):
        found[PHASES[sum(log.started_s >= border_s for border_s in borders_s)]].append(log)
    return {name: _phase(turns) for name, turns in found.items()}


def _phase(logs: Sequence[TurnLog]) -> Json:
    turns, tokens = restored(logs)
    waits = sorted(first_tokens_s(logs))
    median_s = round(waits[len(waits) // 2], 3) if waits else None
    return {
        "turns": len(logs),
        "restored_turns": turns,
        "recomputed_tokens": tokens,
        "first_token_p50_s": median_s,
        "first_token_max_s": round(waits[-1], 3) if waits else None,
    }
