"""The store under random interleavings; and faulty stores, each of which the checker must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from cluster.conversation import BeginTurn, Fence, TurnCommit
from cluster.memory_record import Record, RunningTurn
from cluster.memory_store import MemoryStore
from cluster.redis_functions import library_text
from cluster.store import HistoryMatch, StoreLimits
from tests.store_checker import Checker, Violation
from tests.store_contract import StoreEnv
from tests.store_envs import MemoryEnv, RedisEnv
from tests.valkey_fixture import ValkeyServer

LIMITS = StoreLimits(ttl_s=1e9)
STEPS = 400


async def test_memory_store_keeps_the_protocol() -> None:
    commits = takeovers = 0
    for seed in range(40):
        checker = Checker(MemoryEnv.make(LIMITS), seed)
        await checker.run(STEPS)
        commits += checker.commits
        takeovers += checker.takeovers
    assert commits > 1000
    assert takeovers > 100


async def test_redis_store_keeps_the_protocol(valkey_server: ValkeyServer, redis_url: str) -> None:
    commits = takeovers = 0
    env = await RedisEnv.make(valkey_server, LIMITS)
    for seed in range(1000, 1008):
        checker = Checker(env, seed)
        await checker.run(STEPS)
        commits += checker.commits
        takeovers += checker.takeovers
    await env.close()
    assert commits > 150
    assert takeovers > 15


class NoFence(MemoryStore):
    """Whoever ends a turn is believed."""

    def _fenced(self, record: Record, fence: Fence) -> RunningTurn:
        return record.running or super()._fenced(record, fence)


class FenceWithoutEpoch(MemoryStore):
    """A claim that was sent again much later lets its earlier self write."""

    def _fenced(self, record: Record, fence: Fence) -> RunningTurn:
        return super()._fenced(record, replace(fence, epoch=record.epoch))


class NoExpectation(MemoryStore):
    """A client with a stale view is let in."""

    def _check_expected(self, record: Record, turn: BeginTurn) -> None:
        pass


class NoTombstone(MemoryStore):
    """The epoch starts again when an id is deleted and created again."""

    def _next_epoch(self, record: Record, now_s: float) -> int:
        return record.epoch + 1

    def _tombstone(self, conversation_id: str) -> int:
        return -1


class SameEpochForAll(MemoryStore):
    """A take-over does not fence."""

    def _next_epoch(self, record: Record, now_s: float) -> int:
        return record.epoch or super()._next_epoch(record, now_s)


class InputNotReplayed(MemoryStore):
    """Replay ids advance by the output alone."""

    def _advance(self, record: Record, running: RunningTurn, commit: TurnCommit) -> None:
        super()._advance(record, replace(running, input_ids=running.input_ids[:0]), commit)


class SinksForgotten(MemoryStore):
    """The sinks of the last turn replace those of the first."""

    def _advance(self, record: Record, running: RunningTurn, commit: TurnCommit) -> None:
        nothing = record.replay.sink_ids[:0]
        record.replay = replace(record.replay, sink_ids=nothing)
        super()._advance(record, running, commit)


class RecentGrows(MemoryStore):
    """Replay ids are never trimmed."""

    def _advance(self, record: Record, running: RunningTurn, commit: TurnCommit) -> None:
        ids = np.concatenate([running.input_ids, commit.output_ids])
        record.replay = record.replay.advanced(ids, record.new.sink_tokens, 10**9)


class LeaseNeverEnds(MemoryStore):
    """A crashed owner keeps its conversation."""

    def _extend_lease(self, record: Record, running: RunningTurn, lease_s: float) -> None:
        super()._extend_lease(record, running, 1e6)


class NoLease(MemoryStore):
    """A running turn is stolen at once."""

    def _extend_lease(self, record: Record, running: RunningTurn, lease_s: float) -> None:
        super()._extend_lease(record, running, 0.0)


class ForgetsHowTurnsEnded(MemoryStore):
    """A commit whose reply was lost looks fenced when it is repeated."""

    def _end(self, record: Record, fence: Fence, how: Literal["commit", "abort"]) -> None:
        super()._end(record, fence, how)
        record.ended = None


class AbortCommits(MemoryStore):
    """An aborted turn leaves its input in the replay ids."""

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        record = self._owned(tenant, conversation_id)
        if record.running and record.running.fence == fence:
            ids = record.running.input_ids
            record.replay = record.replay.advanced(ids, record.new.sink_tokens, 10)
        await super().abort(tenant, conversation_id, fence)


class OpenTenants(MemoryStore):
    """Whoever knows an id may use it."""

    def _owned(self, tenant: str, conversation_id: str) -> Record:
        return super()._owned(self._tenant_of(conversation_id) or tenant, conversation_id)

    def _tenant_of(self, conversation_id: str) -> str | None:
        record = self._records.get(conversation_id)
        return record.new.tenant if record else None


class IndexNotTiedToLife(MemoryStore):
    """A history of a deleted conversation matches its id's next life."""

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        match, _ = self._histories.get((tenant, history), (None, None))
        return match if match and self._find(match.conversation_id) else None


async def seeds_until_caught(make: Callable[[], StoreEnv], limit: int) -> int:
    """The number of seeds that the store survives, at most `limit`."""
    for seed in range(limit):
        try:
            await Checker(make(), seed).run(STEPS)
        except Violation:
            return seed
    return limit


MUTANTS = [
    *(NoFence, FenceWithoutEpoch, NoExpectation, NoTombstone, SameEpochForAll),
    *(InputNotReplayed, SinksForgotten, RecentGrows, LeaseNeverEnds, NoLease),
    *(ForgetsHowTurnsEnded, AbortCommits, OpenTenants, IndexNotTiedToLife),
]


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_every_fault_in_the_protocol_is_caught(mutant: type[MemoryStore]) -> None:
    assert await seeds_until_caught(lambda: MemoryEnv.make(LIMITS, mutant), 40) < 40


LUA_MUTANTS = {
    "no fence": ("if fields.run_nonce == nonce and fields.epoch == epoch", "if fields.run_nonce"),
    "no epoch in the fence": (" and fields.epoch == epoch then", " then"),
    "no expected turn": ("args[10] ~= '' and args[10] ~= fields.turn", "false"),
    "no expected hash": ("(args[11] ~= '' and args[11] ~= fields.head)", "false"),
    "input not replayed": ("fields.run_input .. args[5]", "args[5]"),
    "recent ids short by one": ("-4 * tonumber(", "4 - 4 * tonumber("),
    "lease ignored": ("local live = is_live(fields, now)", "local live = false"),
    "lease never ends": ("and now < tonumber(fields.run_until)", ""),
    "foreign tenants": ("if fields.tenant == tenant then", "if fields.tenant then"),
    "commit of an ended claim": ("elseif state ~= 'commit' then", "elseif true then"),
    "owner forgotten": ("'owner', fields.run_owner,", "'owner', '',"),
    "running after its end": ("redis.call('HDEL', key, unpack(RUNNING))", ""),
}


@pytest.mark.parametrize("fault", LUA_MUTANTS)
async def test_every_fault_in_the_functions_is_caught(
    fault: str, valkey_server: ValkeyServer, redis_url: str
) -> None:
    library, (right, wrong) = library_text(), LUA_MUTANTS[fault]
    assert library.count(right) == 1
    env = await RedisEnv.make(valkey_server, LIMITS, library.replace(right, wrong))
    try:
        assert await seeds_until_caught(lambda: env, 10) < 10
    finally:
        await env.close()
