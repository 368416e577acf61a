"""The store under random interleavings; and faulty stores, each of which the checker must catch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from cluster.conversation import (
    BeginTurn,
    Checkpoint,
    Fence,
    Ownership,
    RememberedTurn,
    Snapshot,
    TurnCommit,
)
from cluster.memory_record import NO_IDS, Record, RunningTurn
from cluster.memory_store import MemoryStore
from cluster.redis_functions import library_text
from cluster.store import Fenced, HistoryMatch, RolledBack, StoreLimits
from tests.store_checker import Checker, Violation
from tests.store_contract import StoreEnv
from tests.store_envs import MemoryEnv, RedisEnv
from tests.valkey_fixture import ValkeyServer

LIMITS = StoreLimits(ttl_s=1e9, recovery_s=25.0)
STEPS = 400


async def test_memory_store_keeps_the_protocol() -> None:
    count = Counter[str]()
    for seed in range(80):
        checker = Checker(MemoryEnv.make(LIMITS), seed, LIMITS)
        await checker.run(STEPS)
        count += checker.count
    assert count["commits"] > 1000
    assert count["takeovers"] > 100
    assert count["roll-backs"] > 300
    assert count["repairs"] > 150


async def test_redis_store_keeps_the_protocol(valkey_server: ValkeyServer, redis_url: str) -> None:
    count = Counter[str]()
    env = await RedisEnv.make(valkey_server, LIMITS)
    for seed in range(1000, 1012):
        checker = Checker(env, seed, LIMITS)
        await checker.run(STEPS)
        count += checker.count
    await env.close()
    assert count["commits"] > 100
    assert count["takeovers"] > 10
    assert count["roll-backs"] > 40
    assert count["repairs"] > 20


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


class CounterEpoch(MemoryStore):
    """A store that went back issues an epoch for the second time."""

    def _next_epoch(self, record: Record, now_s: float) -> int:
        return record.epoch + 1


class NoTombstone(MemoryStore):
    """What was deleted comes back."""

    def _tombstone(self, conversation_id: str) -> int:
        return -1


class ForgetsKeys(MemoryStore):
    """A request sent again makes another turn."""

    def _remember(self, record: Record, result: RememberedTurn) -> None:
        pass


class AnyRequest(MemoryStore):
    """Another request under the same key gets the first one's reply."""

    def _check_request(self, turn: BeginTurn, request_hash: str) -> None:
        pass


class AnyModel(MemoryStore):
    """A replica of another model goes on with these token ids."""

    def _check_model(self, record: Record, turn: BeginTurn) -> None:
        pass


class TokensLostOnTheWay(MemoryStore):
    """A takeover starts the reply again, after some of it was shown."""

    def _take_over(self, record: Record, running: RunningTurn, turn: BeginTurn) -> Ownership:
        return super()._take_over(record, replace(running, output_ids=NO_IDS), turn)


class EndlessAttempts(MemoryStore):
    """A request that kills its engine goes from one to the next."""

    def _take_over(self, record: Record, running: RunningTurn, turn: BeginTurn) -> Ownership:
        return super()._take_over(record, replace(running, attempts=-1), turn)


class GapAccepted(MemoryStore):
    """Tokens are stored after others that were lost."""

    def _store_tokens(self, record: Record, running: RunningTurn, one: Checkpoint) -> None:
        k = min(one.k, len(running.output_ids))
        super()._store_tokens(record, running, replace(one, k=k))


class TokensNotCompared(MemoryStore):
    """An owner shows something else than what is stored."""

    def _store_tokens(self, record: Record, running: RunningTurn, one: Checkpoint) -> None:
        running.output_ids = running.output_ids[: one.k]
        super()._store_tokens(record, running, one)


class NoRecovery(MemoryStore):
    """After a roll-back anybody may begin before the owner has repaired."""

    def _check_recovered(self) -> None:
        pass


class RolledBackIsFenced(MemoryStore):
    """An owner gives up instead of repairing."""

    def _fenced(self, record: Record, fence: Fence) -> RunningTurn:
        try:
            return super()._fenced(record, fence)
        except RolledBack as error:
            raise Fenced from error


class RepairNever(MemoryStore):
    """What was lost stays lost."""

    async def repair(self, snapshot: Snapshot) -> None:
        pass


class RepairAlways(MemoryStore):
    """A late repair undoes what came after it."""

    async def repair(self, snapshot: Snapshot) -> None:
        self._records.pop(snapshot.conversation.conversation_id, None)
        await super().repair(snapshot)


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
            await Checker(make(), seed, LIMITS).run(STEPS)
        except Violation:
            return seed
    return limit


MUTANTS = [
    *(NoFence, FenceWithoutEpoch, NoExpectation, NoTombstone, SameEpochForAll),
    *(InputNotReplayed, SinksForgotten, RecentGrows, LeaseNeverEnds, NoLease),
    *(CounterEpoch, ForgetsKeys, AnyRequest, AnyModel, TokensLostOnTheWay, EndlessAttempts),
    *(GapAccepted, TokensNotCompared, NoRecovery, RolledBackIsFenced, RepairNever, RepairAlways),
    *(ForgetsHowTurnsEnded, AbortCommits, OpenTenants, IndexNotTiedToLife),
]


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_every_fault_in_the_protocol_is_caught(mutant: type[MemoryStore]) -> None:
    assert await seeds_until_caught(lambda: MemoryEnv.make(LIMITS, mutant), 40) < 40


LUA_MUTANTS = {
    "no fence": ("if fields.run_nonce == nonce and fields.epoch == epoch", "if fields.run_nonce"),
    "no epoch in the fence": (" and fields.epoch == epoch then", " then"),
    "plain counter epoch": ("math.max(tonumber(fields.epoch) + 1, now)", "fields.epoch + 1"),
    "recovery ignored": ("if woken <= now and now < recovered then", "if false then"),
    "theft refused": ("elseif live and args[7] ~= '1' then", "elseif live then"),
    "any request of a known key": ("if result[HASH] ~= hash then", "if false then"),
    "any request of a running key": ("if fields.run_hash ~= args[6] then", "if false then"),
    "results forgotten": ("table.insert(results, 1, result)", ""),
    "never given up": ("if too_many then\n      end_claim", "if false then\n      end_claim"),
    "given up only when it dies": (" or lapses >= tonumber(args[16] or args[12])", ""),
    "any loss is a death": ("args[7] == '1' and args[15] ~= '1'", "true"),
    "losses forgotten with the turn": (
        "if fields.run_key then\n    redis",
        "if false then\n    redis",
    ),
    "a token is no progress": ("tail .. ids, 'run_attempts', 0, 'run_lapses', 0)", "tail .. ids)"),
    "takeover loses tokens": ("'run_resumed', 1\n", "'run_resumed', 1, 'run_tail', ''\n"),
    "gap accepted": ("if first > folded + #tail then", "if false then"),
    "tokens not compared": ("if again ~= ids:sub(1, #again) then", "if false then"),
    "tokens stored twice": ("ids = ids:sub(#again + 1)", ""),
    "no tombstone": ("redis.call('HSET', keys[1], 'gone', fields.epoch)", ""),
    "a roll-back looks like a fence": ("return 'unknown'", "return nil"),
    "any repair": ("if order >= 0 then", "if false then"),
    "repair despite a later epoch": ("tonumber(record.epoch) - tonumber(given.epoch)", "-1"),
    "repair despite a later turn": ("tonumber(record.turn) - tonumber(given.turn)", "-1"),
    "repair of an ended turn": ("#output_of(record) or math.huge", "#output_of(record) or -1"),
    "rebase keeps the owner": ("'token_count', 0, 'owner', '',", "'token_count', 0,"),
    "rebase keeps token ids": ("'sinks', '', 'recent', '', 'token_count', 0,", "'token_count', 0,"),
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
