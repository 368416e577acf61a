"""The Redis store when the server, the network or the library is not as it should be."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import redis

from cluster.conversation import (
    Checkpoint,
    CommittedTurn,
    Fence,
    Message,
    Ownership,
    new_conversation_id,
)
from cluster.redis_codec import keys_of, pack
from cluster.redis_functions import LIBRARY_VERSION, FunctionClient, RedisOptions, library_text
from cluster.redis_store import ORPHAN_AGE_S, RedisStore
from cluster.store import (
    Conflict,
    NotFound,
    Quarantined,
    StoreError,
    StoreLimits,
    StoreUnavailable,
    StoreVersionError,
)
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.store_contract import (
    ANN,
    LEASE_S,
    checkpoint,
    claim,
    commit_of,
    ids,
    largest_record,
    new_conversation,
    own,
    run_turn,
)
from tests.store_envs import RedisEnv, movable_clock
from tests.store_failover_contract import again, rebase_of, running_snapshot
from tests.valkey_fixture import ValkeyServer, start_valkey

NO_RECOVERY = StoreLimits(recovery_s=0.0)
QUICK = RedisOptions(timeout_s=0.2, attempts=2, backoff_s=0.01)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_url)
    yield store
    await store.close()


@pytest.fixture
def admin(valkey_server: ValkeyServer) -> Iterator[redis.Redis]:
    with valkey_server.client() as client:
        yield client


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that the test may break."""
    with TemporaryDirectory(prefix="ss-") as directory:
        server = start_valkey(Path(directory))
        yield server
        server.process.kill()
        server.process.wait()


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultyProxy]:
    with TemporaryDirectory(prefix="ss-") as directory:
        async with faulty_proxy(redis_url, f"{directory}/proxy.sock") as proxy:
            yield proxy


def with_version(number: int) -> str:
    text = library_text()
    assert text.count(f"local VERSION = {LIBRARY_VERSION}\n") == 1
    return text.replace(f"local VERSION = {LIBRARY_VERSION}\n", f"local VERSION = {number}\n")


def loaded_version(client: redis.Redis) -> int:
    return int(client.fcall("sinkserve_version", 0)[1])


# --- the function library ------------------------------------------------------------------------


async def test_an_older_library_is_replaced(redis_url: str, admin: redis.Redis) -> None:
    admin.function_load(with_version(LIBRARY_VERSION - 1))
    assert loaded_version(admin) == LIBRARY_VERSION - 1
    await (await RedisStore.connect(redis_url)).close()
    assert loaded_version(admin) == LIBRARY_VERSION


async def test_a_newer_library_is_left_alone(redis_url: str, admin: redis.Redis) -> None:
    admin.function_load(with_version(LIBRARY_VERSION + 1))
    with pytest.raises(StoreVersionError, match="upgrade this node"):
        await RedisStore.connect(redis_url)
    assert loaded_version(admin) == LIBRARY_VERSION + 1


async def test_many_replicas_start_at_once(redis_url: str) -> None:
    stores = await asyncio.gather(*(RedisStore.connect(redis_url) for _ in range(8)))
    await stores[0].create(new_conversation())
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_server_that_lost_the_library_gets_it_back(
    redis_url: str, admin: redis.Redis
) -> None:
    store = await RedisStore.connect(redis_url, NO_RECOVERY)
    record = await store.create(new_conversation())
    admin.function_flush()
    assert (await run_turn(store, record)).turn == 1
    await store.close()


async def test_a_fault_in_the_library_is_not_an_outage(
    store: RedisStore, admin: redis.Redis
) -> None:
    identifier = new_conversation_id()
    admin.set(f"sinkserve:{{{identifier}}}:rec", "not a hash")
    with pytest.raises(StoreError, match="WRONGTYPE") as failure:
        await store.get(ANN, identifier)
    assert not isinstance(failure.value, StoreUnavailable)


# --- lost replies --------------------------------------------------------------------------------


async def test_a_turn_survives_the_loss_of_every_reply(proxy: FaultyProxy) -> None:
    store = await RedisStore.connect(proxy.url)
    new = new_conversation()
    calls = ["enlist", "create", "begin", "renew", "checkpoint", "commit", "remember", "keep"]
    calls += ["get", "abort"]
    proxy.lose += calls
    record = await store.create(new)
    turn = claim(record)
    ownership = await own(store, turn)
    await store.renew(ANN, new.conversation_id, ownership.fence, LEASE_S)
    await checkpoint(store, turn, ownership, 0, ids(7, 8))
    done = await store.commit(commit_of(turn, ownership))
    assert await store.get(ANN, new.conversation_id) == done
    assert (done.turn, done.token_count) == (1, 6)
    assert len((await store.transcript(ANN, new.conversation_id))[1]) == 2
    match = await store.match_history(ANN, done.history)
    assert match is not None
    again = await own(store, claim(record))
    await store.abort(ANN, new.conversation_id, again.fence)
    assert proxy.lost == len(calls)
    proxy.lose.append("delete")
    await store.delete(ANN, new.conversation_id)
    assert proxy.lost == len(calls) + 1
    with pytest.raises(NotFound):
        await store.delete(ANN, new.conversation_id)
    await store.close()


async def test_takeovers_repairs_and_rebases_survive_the_loss_of_their_replies(
    proxy: FaultyProxy,
) -> None:
    store = await RedisStore.connect(proxy.url)
    record = await store.create(new_conversation())
    turn = claim(record, key="k")
    await own(store, turn)
    proxy.lose.append("begin")
    taken_by = again(turn, steal=True)
    taken = await own(store, taken_by)
    assert taken.attempt == 1
    proxy.lose += ["begin", "repair", "rebase", "forget"]
    with pytest.raises(Quarantined):
        await store.begin(again(turn, steal=True))
    after = await store.get(ANN, record.conversation_id)
    ahead = dataclasses.replace(after, epoch=after.epoch + 1)
    lost = dataclasses.replace(taken, conversation=ahead)
    await store.repair(running_snapshot(taken_by, lost, ids(7)))
    fence = Fence(ahead.epoch, taken_by.nonce)
    await store.abort(ANN, record.conversation_id, fence)
    for _ in range(2):
        done = await run_turn(store, record)
    assert (await store.rebase(rebase_of(done))).token_count == 0
    assert proxy.lose == []
    await store.close()


async def test_a_batch_of_checkpoints_survives_the_loss_of_its_reply(
    proxy: FaultyProxy, admin: redis.Redis
) -> None:
    store = await RedisStore.connect(proxy.url, NO_RECOVERY, QUICK)
    records = [await store.create(new_conversation()) for _ in range(5)]
    turns = [claim(record, key="k") for record in records]
    owned = [await own(store, turn) for turn in turns]

    def batch(k: int, token: int) -> list[Checkpoint]:
        return [
            Checkpoint(turn.conversation_id, ANN, claimed.fence, k, ids(token), LEASE_S)
            for turn, claimed in zip(turns, owned, strict=True)
        ]

    proxy.lose.append("checkpoint")
    assert list(await store.checkpoint(batch(0, 5))) == [None] * 5
    admin.function_flush()
    assert list(await store.checkpoint(batch(1, 6))) == [None] * 5
    proxy.lose += ["checkpoint"] * QUICK.attempts
    answers = await store.checkpoint(batch(2, 7))
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 5
    assert list(await store.checkpoint(batch(2, 7))) == [None] * 5
    admin.set(f"sinkserve:{{{records[2].conversation_id}}}:rec", "no hash")
    kinds = [type(answer) for answer in await store.checkpoint(batch(3, 8))]
    assert kinds == [type(None), type(None), StoreError, type(None), type(None)]
    found = await own(store, turns[0])
    assert found.output_ids.tolist() == [5, 6, 7, 8]
    await store.close()


async def test_a_commit_that_is_never_heard_of_can_be_sent_again(proxy: FaultyProxy) -> None:
    store = await RedisStore.connect(proxy.url, options=QUICK)
    record = await store.create(new_conversation())
    turn = claim(record)
    commit = commit_of(turn, await own(store, turn))
    proxy.lose += ["commit"] * QUICK.attempts
    with pytest.raises(StoreUnavailable):
        await store.commit(commit)
    assert (await store.commit(commit)).turn == 1
    assert await store.match_history(ANN, commit.history) is not None
    await store.close()


async def test_a_cancelled_call_does_not_confuse_the_next(redis_url: str) -> None:
    store = await RedisStore.connect(redis_url, options=RedisOptions(max_connections=1))
    records = [await store.create(new_conversation()) for _ in range(2)]
    for _ in range(50):
        call = asyncio.create_task(store.get(ANN, records[0].conversation_id))
        for _ in range(np.random.default_rng(0).integers(1, 6)):
            await asyncio.sleep(0)
        call.cancel()
        assert await store.get(ANN, records[1].conversation_id) == records[1]
    await store.close()


# --- a server in trouble -------------------------------------------------------------------------


async def test_no_server() -> None:
    for url in ("redis://127.0.0.1:1/0", "unix:///nowhere/at/all.sock"):
        with pytest.raises(StoreUnavailable, match="the conversation store is unavailable"):
            await RedisStore.connect(url, options=QUICK)
    with pytest.raises(ValueError, match="redis://"):
        await RedisStore.connect("http://127.0.0.1:1")


async def test_a_restarted_server_is_found_again(own_server: ValkeyServer) -> None:
    store = await RedisStore.connect(own_server.url, NO_RECOVERY, QUICK)
    await store.create(new_conversation())
    own_server.process.kill()
    own_server.process.wait()
    with pytest.raises(StoreUnavailable):
        await store.ping()
    with pytest.raises(StoreUnavailable):
        await store.create(new_conversation())
    again = start_valkey(Path(own_server.url.removeprefix("unix://")).parent)
    try:
        record = await store.create(new_conversation())
        assert (await run_turn(store, record)).turn == 1
    finally:
        again.process.kill()
        again.process.wait()
        await store.close()


async def test_a_silent_server_costs_a_bounded_wait(own_server: ValkeyServer) -> None:
    store = await RedisStore.connect(own_server.url, options=QUICK)
    record = await store.create(new_conversation())
    own_server.process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(5.0):  # two tries of 0.2 s; far below the client's own default
        with pytest.raises(StoreUnavailable, match="Timeout"):
            await store.get(ANN, record.conversation_id)
    own_server.process.send_signal(signal.SIGCONT)
    assert await store.get(ANN, record.conversation_id) == record
    await store.close()


async def test_a_full_server_refuses_new_turns_and_ends_running_ones(
    store: RedisStore, admin: redis.Redis
) -> None:
    records = [await store.create(new_conversation()) for _ in range(4)]
    turns = [claim(record) for record in records[:3]]
    owned = [await own(store, turn) for turn in turns]
    admin.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreUnavailable, match="raise its maxmemory"):
            await store.begin(claim(records[3]))
        with pytest.raises(StoreUnavailable, match="raise its maxmemory"):
            await store.create(new_conversation())
        await store.renew(ANN, records[0].conversation_id, owned[0].fence, LEASE_S)
        await checkpoint(store, turns[0], owned[0], 0, ids(7))
        await store.repair(running_snapshot(turns[0], owned[0], ids(7, 8)))
        assert (await store.commit(commit_of(turns[0], owned[0]))).turn == 1
        await store.abort(ANN, records[1].conversation_id, owned[1].fence)
        await store.delete(ANN, records[2].conversation_id)
        assert (await store.get(ANN, records[0].conversation_id)).turn == 1
    finally:
        admin.config_set("maxmemory", 0)
    assert (await run_turn(store, records[3])).turn == 1


async def test_a_commit_stands_when_its_history_cannot_be_indexed(
    store: RedisStore, admin: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    record = await store.create(new_conversation())
    turn = claim(record)
    ownership = await own(store, turn)
    admin.config_set("maxmemory", 1)
    try:
        with caplog.at_level(logging.WARNING):
            done = await store.commit(commit_of(turn, ownership))
    finally:
        admin.config_set("maxmemory", 0)
    assert done.turn == 1
    assert "its indexes are not" in caplog.text
    assert await store.match_history(ANN, done.history) is None


async def test_a_commit_stands_whatever_its_index_meets(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = await store.create(new_conversation())
    turn = claim(record)
    ownership = await own(store, turn)
    call = store._functions.call

    async def without_index(name: str, keys: Any, args: Any) -> Any:
        if name == "remember":
            raise StoreError("the conversation store failed: ERR")
        return await call(name, keys, args)

    monkeypatch.setattr(store._functions, "call", without_index)
    assert (await store.commit(commit_of(turn, ownership))).turn == 1


async def test_a_read_only_replica_is_named(own_server: ValkeyServer) -> None:
    store = await RedisStore.connect(own_server.url, options=QUICK)
    record = await store.create(new_conversation())
    with own_server.client() as client:
        client.replicaof("127.0.0.1", "1")
    assert await store.get(ANN, record.conversation_id) == record
    with pytest.raises(StoreUnavailable, match="point the URL at the primary"):
        await own(store, claim(record))
    await store.close()


async def test_a_user_without_rights_is_told(redis_url: str, admin: redis.Redis) -> None:
    admin.acl_setuser("narrow", enabled=True, passwords=["+secret"], commands=["+ping"])
    url = redis_url.replace("unix://", "unix://narrow:secret@")
    with pytest.raises(StoreUnavailable, match="needs FCALL"):
        await RedisStore.connect(url)
    with pytest.raises(StoreUnavailable, match="right user and password") as refusal:
        await RedisStore.connect(url.replace("secret", "hunter2"))
    assert "hunter2" not in str(refusal.value)
    admin.acl_deluser("narrow")


# --- what is stored ------------------------------------------------------------------------------


async def test_every_key_expires_and_a_conversation_shares_a_hash_tag(
    store: RedisStore, admin: redis.Redis
) -> None:
    record = await store.create(new_conversation())
    await run_turn(store, record)
    turn = claim(record)
    ownership = await own(store, turn)
    admin.delete(f"sinkserve:{{{record.conversation_id}}}:log")
    admin.delete(f"sinkserve:{{{record.conversation_id}}}:rec")
    said = (Message("user", "q0"), Message("assistant", "a0"))
    snapshot = running_snapshot(turn, ownership, ids(7))
    await store.repair(dataclasses.replace(snapshot, messages=said, first_message=0))
    keys = [str(key, "ascii") for key in admin.scan_iter()]
    assert len(keys) == 4
    assert all(key.startswith("sinkserve:") for key in keys)
    assert sum(f"{{{record.conversation_id}}}" in key for key in keys) == 2
    limits = StoreLimits()
    for key in keys:
        remaining_s = admin.pttl(key) / 1000
        assert limits.ttl_s / 2 < remaining_s <= limits.ttl_s * 2 + 1


async def test_a_deleted_conversation_leaves_what_expires(
    store: RedisStore, admin: redis.Redis
) -> None:
    record = await store.create(new_conversation())
    await run_turn(store, record)
    await store.delete(ANN, record.conversation_id)
    keys = [key for key in admin.scan_iter() if b"sinkserve:history:" not in key]
    assert keys == [f"sinkserve:{{{record.conversation_id}}}:rec".encode()]
    assert set(admin.hgetall(keys[0])) == {b"gone"}
    assert admin.pttl(keys[0]) > 0


async def test_the_record_has_the_last_word_over_the_index(
    store: RedisStore, admin: redis.Redis
) -> None:
    """The index may be ahead of a record that was rolled back, and the turn may be another now."""
    record = await store.create(new_conversation())
    done = await run_turn(store, record)
    key = f"sinkserve:{{{record.conversation_id}}}:rec"
    assert await store.match_history(ANN, done.history) is not None
    admin.hset(key, "history", "ab" * 32)
    assert await store.match_history(ANN, done.history) is None
    admin.hset(key, mapping={"turn": 0, "history": done.history})
    assert await store.match_history(ANN, done.history) is None


async def test_a_list_forgets_conversations_that_expired(
    valkey_server: ValkeyServer, redis_url: str
) -> None:
    env = await RedisEnv.make(valkey_server, StoreLimits())
    index = f"sinkserve:tenant:{ANN}"
    records = [await env.store.create(new_conversation()) for _ in range(4)]
    for record in records[:2]:
        env.client.delete(f"sinkserve:{{{record.conversation_id}}}:rec")
    assert list(await env.store.list(ANN)) == records[:1:-1]
    assert env.client.zcard(index) == 4  # too young to tell from one being created
    await env.advance(ORPHAN_AGE_S + 1)
    assert list(await env.store.list(ANN)) == records[:1:-1]
    assert env.client.zcard(index) == 2
    await env.close()


async def test_a_tenant_who_never_lists_keeps_a_small_index(
    valkey_server: ValkeyServer, redis_url: str
) -> None:
    env = await RedisEnv.make(valkey_server, StoreLimits(ttl_s=1000.0))
    for _ in range(300):
        await env.store.create(new_conversation())
        await env.advance(100.0)
    # Ten conversations are alive at any time; of 300, 290 are gone.
    assert env.client.zcard(f"sinkserve:tenant:{ANN}") < 60
    await env.close()


async def test_an_index_that_nobody_uses_is_forgotten(
    valkey_server: ValkeyServer, redis_url: str
) -> None:
    env = await RedisEnv.make(valkey_server, StoreLimits(ttl_s=1000.0))
    record = await env.store.create(new_conversation())
    for _ in range(5):
        await env.advance(900.0)
        await run_turn(env.store, record)
    assert [r.conversation_id for r in await env.store.list(ANN)] == [record.conversation_id]
    await env.advance(2001.0)
    assert env.client.keys("sinkserve:*") == []
    await env.close()


async def test_a_clock_that_goes_back_does_not_lock_a_conversation(
    valkey_server: ValkeyServer, redis_url: str
) -> None:
    env = await RedisEnv.make(valkey_server, StoreLimits())
    record = await env.store.create(new_conversation())
    await env.advance(3600.0)
    before = await own(env.store, claim(record))
    await env.advance(-3600.0)
    after = await own(env.store, claim(record))
    assert after.fence.epoch == before.fence.epoch + 1
    await env.close()


async def test_a_clock_that_goes_back_does_not_reorder_the_list(
    valkey_server: ValkeyServer, redis_url: str
) -> None:
    env = await RedisEnv.make(valkey_server, StoreLimits())
    records = []
    for _ in range(4):
        records.append(await env.store.create(new_conversation()))
        await env.advance(-60.0)
    assert list(await env.store.list(ANN)) == records[::-1]
    assert list(await env.store.list(ANN, 2, records[2].conversation_id)) == records[1::-1]
    await env.close()


async def test_a_record_of_version_1_is_read(valkey_server: ValkeyServer, redis_url: str) -> None:
    env = await RedisEnv.make(valkey_server, StoreLimits())
    record = await env.store.create(new_conversation())
    await run_turn(env.store, record)
    lost = await own(env.store, claim(record, key="k"))
    key = f"sinkserve:{{{record.conversation_id}}}:rec"
    newer = {"born", "previous", "results", "run_key", "run_hash", "run_attempts", "run_resumed"}
    newer |= {"run_output", "run_tail", "run_folded"}
    assert env.client.hdel(key, *newer) == 6
    with pytest.raises(Conflict):
        await env.store.begin(claim(record, key="k"))
    await checkpoint(env.store, claim(record), lost, 0, ids(7))
    done = await env.store.commit(commit_of(claim(record), lost))
    assert (done.turn, done.token_count) == (2, 12)
    assert (await run_turn(env.store, record, key="k")).turn == 3
    assert isinstance(await env.store.begin(claim(record, key="k")), CommittedTurn)
    assert env.client.hdel(key, "results") == 1
    assert isinstance(await env.store.begin(claim(record, key="k")), Ownership)
    await env.close()


@pytest.mark.slow
async def test_ten_thousand_turns_as_large_as_can_be(
    valkey_server: ValkeyServer, redis_url: str
) -> None:
    env = await RedisEnv.make(valkey_server, StoreLimits())
    assert await largest_record(env, sink_tokens=4, window_tokens=2044, turns=10_000) <= 100 * 1024
    await env.close()


async def test_the_library_can_be_given(redis_url: str) -> None:
    functions = await FunctionClient.connect(redis_url, QUICK, library_text())
    assert (await functions.call("version", [], []))[1] == LIBRARY_VERSION
    await functions.close()


async def test_a_replica_of_version_2_goes_on_under_this_library(
    valkey_server: ValkeyServer, redis_url: str
) -> None:
    """In the midst of an update: it knows neither the third key nor the last arguments."""
    env = await RedisEnv.make(valkey_server, StoreLimits(transcript_messages=2))
    record = await env.store.create(new_conversation(messages=(Message("system", "s"),)))
    functions = await FunctionClient.connect(redis_url, QUICK, movable_clock(library_text()))
    keys, minute = keys_of(record.conversation_id)[:2], 60 * 10**6

    async def begin(nonce: str) -> list[Any]:
        args: list[Any] = [ANN, "old", record.fingerprint, nonce, "k", "r", 1, minute, minute]
        return await functions.call("begin", keys, [*args, "", "", 2, 3000, pack(ids(1, 2))])

    assert (await begin("n1"))[0] == b"OK"
    answer = await begin("n2")
    assert answer[0] == b"OK"
    epoch = answer[1][9]
    stored = await functions.call(
        "checkpoint", keys, [ANN, epoch, "n2", minute, minute, 0, pack(ids(7))]
    )
    assert stored == [b"OK"]
    messages = [Message(role, "x").encode() for role in ("user", "assistant")]
    args: list[Any] = [
        ANN,
        epoch,
        "n2",
        minute,
        pack(ids(7)),
        4,
        "0" * 64,
        "1" * 64,
        "{}",
        3000,
        2,
        10**6,
    ]
    done = await functions.call("commit", keys, [*args, *messages])
    assert (done[0], done[1][4]) == (b"OK", b"1")
    assert (await begin("n3"))[0] == b"DONE"
    assert (await run_turn(env.store, record, key="new")).turn == 2
    await functions.close()
    await env.close()
