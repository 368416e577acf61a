"""What is done to the cluster while clients talk. Every fault proves that it happened, or NotHappened."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from benchmarks.chaos.app import POISON, REFUSED
from benchmarks.chaos.client import ChaosClient
from benchmarks.chaos.oracle import Asked
from benchmarks.chaos.rig import Actor, NotHappened, is_alive, kill
from benchmarks.chaos.stage import Stage, Wound

Json = dict[str, Any]


async def owner_of(stage: Stage, client: ChaosClient, replicas: dict[str, Actor]) -> Actor:
    """The replica that runs the client's turn. Raises NotHappened."""
    owner = await stage.owner(client)
    if owner not in replicas:
        raise NotHappened(f"the owner {owner!r} is no living replica")
    return replicas[owner]


@dataclass(slots=True)
class Calm:
    """Nothing: what the checker says then, it says of everything."""

    name: str = "calm"
    is_invisible: bool = True
    lasts_s: float = 8.0

    async def strike(self, stage: Stage) -> Json:
        before = await stage.aside(stage.rig.replicas)
        await stage.workload.reach(0)
        await stage.wound(None)
        await asyncio.sleep(self.lasts_s)
        after = await stage.aside(stage.rig.replicas)
        if before != after:
            raise NotHappened("something happened by itself")
        return {"nothing_for_s": self.lasts_s}


@dataclass(slots=True)
class ReplicaKills:
    """SIGKILL of the replica that streams, at a random k, again and again."""

    times: int = 30
    name: str = "replica"
    is_invisible: bool = True

    async def strike(self, stage: Stage) -> Json:
        killed: list[int] = []
        cuts: list[int] = []
        back_s: list[float] = []
        while len(killed) < self.times:
            replicas = await stage.aside(stage.rig.replicas)
            client = await stage.workload.reach(stage.workload.random_k())
            log = client.live
            victim = await owner_of(stage, client, replicas)
            num_hit = await stage.wound(victim.name)
            if log is None or log.ended_s or not num_hit:
                continue
            cuts.append(log.num_chars)
            kill(victim.pid)
            killed.append(victim.pid)
            back_s.append(await stage.until(partial(_is_replaced, stage, victim.name)))
        return {
            "killed": len(killed),
            "distinct_pids": len(set(killed)),
            "pids_gone": sum(not is_alive(pid) for pid in killed),
            "cut_after_characters": cuts,
            "turns_hit": len(stage.wounds),
            "replaced_after_s": [round(one, 1) for one in back_s],
        }


@dataclass(slots=True)
class RankKill:
    """SIGKILL of a tensor-parallel rank of the replica that streams: its replica must go, and no other."""

    name: str = "rank"
    is_invisible: bool = True

    async def strike(self, stage: Stage) -> Json:
        replicas = await stage.aside(stage.rig.replicas)
        client = await stage.workload.reach(stage.workload.random_k())
        victim = await owner_of(stage, client, replicas)
        ranks = ranks_of(victim)
        if not ranks:
            raise NotHappened(f"the replica {victim.name!r} has no ranks")
        num_hit = await stage.wound(victim.name)
        kill(ranks[0])
        replaced_s = await stage.until(partial(_is_replaced, stage, victim.name))
        now = await stage.aside(stage.rig.replicas)
        kept = {one.pid for one in replicas.values()} & {one.pid for one in now.values()}
        if is_alive(victim.pid) or any(map(is_alive, ranks)):
            raise NotHappened("the replica outlived its rank")
        if len(kept) != len(replicas) - 1:
            stage.complain(f"the rank took {len(replicas) - len(kept)} replicas with it")
        return {
            "rank_gone": not is_alive(ranks[0]),
            "replica_gone": not is_alive(victim.pid),
            "turns_hit": num_hit,
            "replaced_after_s": round(replaced_s, 1),
            "replicas_kept": len(kept),
            "ranks_of_the_new_replicas": [len(ranks_of(one)) for one in now.values()],
        }


def ranks_of(replica: Actor) -> list[int]:
    """Processes of the other ranks of a replica."""
    started = psutil.Process(replica.pid).children(recursive=True)
    return [one.pid for one in started if any("toy_ranks" in word for word in one.cmdline())]


def _is_replaced(stage: Stage, name: str) -> bool:
    found = stage.rig.healthy()
    return name not in found and len(found) == stage.rig.num_replicas


@dataclass(slots=True)
class ReplicaStop:
    """SIGSTOP of the replica that streams, until another has stolen its turns; then SIGCONT."""

    name: str = "split_brain"
    is_invisible: bool = True
    stolen_within_s: float = 60.0
    settles_s: float = 3.0

    async def strike(self, stage: Stage) -> Json:
        rig = stage.rig
        replicas = await stage.aside(rig.replicas)
        client = await stage.workload.reach(stage.workload.random_k() // 2)
        victim = await owner_of(stage, client, replicas)
        num_hit = await stage.wound(victim.name)
        before = (await stage.aside(rig.healthy))[victim.name]
        os.kill(victim.pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        try:
            log = client.turns[-1]
            while await stage.owner(client) == victim.name and not log.ended_s:
                if time.monotonic() - stopped_s > self.stolen_within_s:
                    raise NotHappened("nobody took the stopped replica's turn")
                await asyncio.sleep(0.05)
            stolen_s = time.monotonic() - stopped_s
            new_owner = await stage.owner(client)
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        await asyncio.sleep(self.settles_s)
        if not is_alive(victim.pid):
            raise NotHappened("the stopped replica did not survive")
        after = (await stage.aside(rig.healthy))[victim.name]
        # One refused step tells the old owner; more would mean that it went on.
        if after[REFUSED] > 1:
            stage.complain(f"the old owner went on for {after[REFUSED]:.0f} refused checkpoints")
        ended = {
            name: after[name] - before[name]
            for name in ("fenced_turns", "cancelled_turns", "handed_over_turns")
        }
        return {
            "stopped": victim.name,
            "turns_hit": num_hit,
            "stolen_after_s": round(stolen_s, 1),
            "new_owner": new_owner,
            "checkpoints_refused_to_the_old_owner": after[REFUSED],
            "turns_the_old_owner_ended": ended,
            "same_pid_alive": is_alive(victim.pid),
        }


@dataclass(slots=True)
class NodeKill:
    """All of a node with a replica that streams: raylet and workers."""

    name: str = "node"
    is_invisible: bool = True

    async def strike(self, stage: Stage) -> Json:
        rig = stage.rig
        replicas = await stage.aside(rig.replicas)
        nodes_before = await stage.aside(rig.alive_nodes)
        client = await stage.workload.reach(stage.workload.random_k())
        victim = await owner_of(stage, client, replicas)
        there = [one for one in replicas.values() if one.node_id == victim.node_id]
        for one in there:
            await stage.wound(one.name)
        node = rig.node(victim.node_id)
        await stage.aside(lambda: rig.cluster.remove_node(node, allow_graceful=False))
        dead_s = await stage.until(lambda: victim.node_id not in rig.alive_nodes())
        replaced_s = await stage.until(lambda: _is_replaced(stage, victim.name))
        evidence = {
            "nodes_before": len(nodes_before),
            "nodes_after": len(await stage.aside(rig.alive_nodes)),
            "pids_gone": [one.pid for one in there if not is_alive(one.pid)] != [],
            "noticed_after_s": round(dead_s, 1),
            "replaced_after_s": round(replaced_s, 1),
        }
        # Leave the cluster as large as it was.
        await stage.aside(rig.add_engine_node)
        return evidence


@dataclass(slots=True)
class ControllerKill:
    """Serve's controller; meanwhile a replica too, which only a controller can replace."""

    name: str = "controller"
    is_invisible: bool = True

    async def strike(self, stage: Stage) -> Json:
        rig = stage.rig
        replicas = await stage.aside(rig.replicas)
        old = await stage.aside(rig.controller)
        client = await stage.workload.reach(stage.workload.random_k())
        victim = await owner_of(stage, client, replicas)
        await stage.wound(victim.name)
        kill(old.pid)
        kill(victim.pid)
        back_s = await stage.until(lambda: rig.controller().pid != old.pid)
        replaced_s = await stage.until(lambda: _is_replaced(stage, victim.name))
        now = await stage.aside(rig.replicas)
        survivors = {one.pid for one in replicas.values()} & {one.pid for one in now.values()}
        return {
            "pid_gone": not is_alive(old.pid),
            "controller_back_after_s": round(back_s, 1),
            "replica_killed_too": not is_alive(victim.pid),
            "replaced_after_s": round(replaced_s, 1),
            "replicas_kept": len(survivors),
        }


@dataclass(slots=True)
class FrontKill:
    """The HTTP proxy, or the ingress, through which every stream flows: clients come again."""

    name: str
    is_invisible: bool = False

    async def strike(self, stage: Stage) -> Json:
        find = stage.rig.proxy if self.name == "proxy" else stage.rig.ingress
        old = await stage.aside(find)
        await stage.workload.reach(stage.workload.random_k())
        num_hit = await stage.wound(None)
        kill(old.pid)
        back_s = await stage.until(lambda: find().pid != old.pid)
        ready_s = await stage.aside(stage.rig.await_ready)
        return {
            "pid_gone": not is_alive(old.pid),
            "turns_hit": num_hit,
            "back_after_s": round(back_s + ready_s, 1),
        }


@dataclass(slots=True)
class HeadKill:
    """The head node: GCS, raylet, controller and proxy; then a new head on the same address.

    GCS fault tolerance: its tables are in a Redis that lives on.
    """

    name: str = "head"
    is_invisible: bool = False
    within_s: float = 120.0

    async def strike(self, stage: Stage) -> Json:
        rig = stage.rig
        replicas = await stage.aside(rig.replicas)
        controller, proxy = await stage.aside(rig.controller), await stage.aside(rig.proxy)
        await stage.workload.reach(stage.workload.random_k())
        num_hit = await stage.wound(None)
        await stage.aside(rig.disconnect)
        killed_s = time.monotonic()
        await stage.aside(rig.replace_head)
        await stage.aside(lambda: rig.await_ready(self.within_s))
        ready_s = time.monotonic() - killed_s
        now = await stage.aside(rig.replicas)
        return {
            "pids_gone": not is_alive(controller.pid) and not is_alive(proxy.pid),
            "turns_hit": num_hit,
            "back_after_s": round(ready_s, 1),
            "replicas_kept": len(
                {one.pid for one in replicas.values()} & {one.pid for one in now.values()}
            ),
        }


@dataclass(slots=True)
class StoreRestart:
    """SIGKILL of the store, and the same server on the same data after `down_s`."""

    name: str = "store_restart"
    down_s: float = 0.5
    is_invisible: bool = False

    async def strike(self, stage: Stage) -> Json:
        store = stage.rig.store
        await stage.workload.reach(stage.workload.random_k())
        num_hit = await stage.wound(None)
        life, pid, size = store.life(), store.pid, store.log_bytes()
        await stage.aside(store.kill)
        await asyncio.sleep(self.down_s)
        await stage.aside(store.start)
        await stage.aside(stage.rig.await_ready)
        return {
            "pid_gone": not is_alive(pid),
            "another_life": store.life() != life,
            "log_bytes_before": size,
            "turns_hit": num_hit,
        }


@dataclass(slots=True)
class StoreRollback:
    """As a restart, but the data come back older than what was acknowledged ("" : empty)."""

    name: str = "store_rollback"
    age_s: float = 2.0
    down_s: float = 0.5
    is_empty: bool = False
    is_invisible: bool = False

    async def strike(self, stage: Stage) -> Json:
        store = stage.rig.store
        copied = await stage.aside(lambda: store.save_copy("older"))
        await asyncio.sleep(self.age_s)
        await stage.workload.reach(stage.workload.random_k())
        num_hit = await stage.wound(None)
        life, size = store.life(), store.log_bytes()
        await stage.aside(store.kill)
        await asyncio.sleep(self.down_s)
        await stage.aside(lambda: store.put_back("" if self.is_empty else "older"))
        await stage.aside(store.start)
        if not size > copied:
            raise NotHappened("nothing was written since the copy")
        await stage.aside(stage.rig.await_ready)
        return {
            "another_life": store.life() != life,
            "acknowledged_bytes_lost": size - (0 if self.is_empty else copied),
            "turns_hit": num_hit,
        }


@dataclass(slots=True)
class Redeploy:
    """A rolling update: every replica is replaced while clients talk."""

    name: str = "redeploy"
    is_invisible: bool = True

    async def strike(self, stage: Stage) -> Json:
        rig = stage.rig
        before = await stage.aside(rig.replicas)
        await stage.workload.reach(stage.workload.random_k())
        num_hit = await stage.wound(None)
        started_s = time.monotonic()
        await stage.aside(rig.redeploy)
        after = await stage.aside(rig.replicas)
        if {one.pid for one in before.values()} & {one.pid for one in after.values()}:
            raise NotHappened("some replica was not replaced")
        return {
            "replicas_replaced": len(after),
            "turns_hit": num_hit,
            "took_s": round(time.monotonic() - started_s, 1),
        }


@dataclass(slots=True)
class Poison:
    """One more client sends what kills any engine that reads it; the others must not notice."""

    name: str = "poison"
    is_invisible: bool = True
    most_replicas: int = 2

    async def strike(self, stage: Stage) -> Json:
        rig, workload = stage.rig, stage.workload
        before = await stage.aside(rig.replicas)
        poisoned = ChaosClient(workload.clients[0].options, lambda _: None)
        stage.guests.append(poisoned)
        await poisoned.create()
        await poisoned.say(workload.ask())
        await workload.reach(workload.random_k() // 2)
        wounded_s = time.monotonic()
        log = await poisoned.say(Asked("a" + chr(POISON) + "b", 20, 1))
        stage.wounds += [
            Wound(client.live, wounded_s) for client in workload.clients if client.live is not None
        ]
        dead = [one.pid for one in before.values() if not is_alive(one.pid)]
        await stage.aside(rig.await_ready)
        after = await poisoned.say(workload.ask())
        if not dead:
            raise NotHappened("the poison killed nobody")
        if len(dead) > self.most_replicas or log.error != "turn_quarantined" or not after.is_done:
            stage.complain(
                f"the poison killed {len(dead)} replicas and ended with {log.error!r}; "
                f"the next turn with {after.error or 'its end'!r}"
            )
        return {
            "replicas_killed": len(dead),
            "the_poisoned_turn_ended_with": log.error,
            "the_next_turn_is_done": after.is_done,
            "requests_of_the_poisoned_turn": len(log.attempts),
        }
