"""The store on more than one server: a promoted replica, Sentinel, Redis Cluster; and their URLs."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory

import pytest
import redis

from cluster import preflight
from cluster.conversation import BusyTurn, Checkpoint
from cluster.redis_functions import LIBRARY, RedisOptions
from cluster.redis_servers import Address, url_problem
from cluster.redis_store import RedisStore
from cluster.store import Recovering, RolledBack, StoreUnavailable
from tests.redis_processes import (
    cluster,
    command,
    is_in_step,
    kill,
    replicated,
    sentinel,
    wait_for,
)
from tests.store_contract import (
    ANN,
    LEASE_S,
    checkpoint,
    claim,
    commit_of,
    ids,
    new_conversation,
    own,
    run_turn,
)
from tests.store_failover_contract import again, running_snapshot
from tests.valkey_fixture import ValkeyServer

PATIENT = RedisOptions(timeout_s=2.0, attempts=4)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:1/0",
        "rediss://user:secret@h",
        "unix:///a/b.sock",
        "redis+sentinel://:secret@a:1,b/service",
        "rediss+sentinel://a,b,[::1]:7/service/3",
        "redis+cluster://u:secret@a:1,b:2",
        "rediss+cluster://a",
    ],
)
def test_urls_of_every_kind(url: str) -> None:
    assert url_problem(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "h:6379",
        "",
        "redis+sentinel://secret@a:1",
        "redis+sentinel://secret@a/service/db",
        "redis+sentinel://secret@a/service/1/2",
        "redis+sentinel://secret@a:port/service",
        "redis+cluster://secret@a:1/1",
        "redis+cluster://secret@",
        "redis+cluster://secret@a,,b",
    ],
)
def test_other_urls_are_refused_without_their_password(url: str) -> None:
    problem = url_problem(url)
    assert problem is not None
    assert "secret" not in problem
    assert "redis+sentinel://" in problem


def test_an_address_is_taken_apart() -> None:
    found = Address.parse(
        "rediss+sentinel://us%40er:pa%3Ass@a:1,[::1]/service/2?sentinel_password=x"
    )
    assert found.hosts == (("a", 1), ("::1", 26379))
    assert (found.username, found.password) == ("us@er", "pa:ss")
    assert (found.path, found.parameters) == (("service", "2"), {"sentinel_password": "x"})
    assert found.credentials["ssl"] is True
    assert Address.parse("redis+cluster://a").hosts == (("a", 6379),)


# --- a cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_servers() -> Iterator[tuple[str, Sequence[ValkeyServer]]]:
    with cluster() as running:
        yield running


async def test_conversations_spread_over_a_cluster(
    three_servers: tuple[str, Sequence[ValkeyServer]],
) -> None:
    url, servers = three_servers
    store = await RedisStore.connect(url, options=PATIENT)
    life = await store.pulse()
    assert len(set(life.split(","))) == 3
    records = [await store.create(new_conversation()) for _ in range(24)]
    turns = [claim(record, key="k") for record in records]
    owned = [await own(store, turn) for turn in turns]
    batch = [
        Checkpoint(turn.conversation_id, ANN, claimed.fence, 0, ids(7), LEASE_S)
        for turn, claimed in zip(turns, owned, strict=True)
    ]
    assert list(await store.checkpoint([*batch, *batch])) == [None] * 48
    for turn, claimed in zip(turns, owned, strict=True):
        done = await store.commit(commit_of(turn, claimed))
        match = await store.match_history(ANN, done.history)
        assert match is not None
    found = {record.conversation_id for record in await store.list(ANN, limit=100)}
    assert found == {record.conversation_id for record in records}
    holding = [server.client().dbsize() for server in servers]
    assert all(holding)
    assert await store.ping() > 0
    await store.delete(ANN, records[0].conversation_id)
    assert await store.pulse() == life
    await store.close()
    await store.close()


async def test_each_server_of_a_cluster_has_a_life_of_its_own(
    three_servers: tuple[str, Sequence[ValkeyServer]],
) -> None:
    url, servers = three_servers
    store = await RedisStore.connect(url, options=PATIENT)
    records = [await store.create(new_conversation()) for _ in range(24)]
    before = (await store.pulse()).split(",")
    with servers[0].client() as client:
        client.function_flush()
    turns = [claim(record, key="k") for record in records]
    answers = await asyncio.gather(*(store.begin(t) for t in turns), return_exceptions=True)
    refused = sum(isinstance(answer, Recovering) for answer in answers)
    assert 0 < refused < len(records)
    after = (await store.pulse()).split(",")
    assert sum(x != y for x, y in zip(before, after, strict=True)) == 1
    await store.close()


def test_doctor_asks_every_server_of_a_cluster(
    three_servers: tuple[str, Sequence[ValkeyServer]],
) -> None:
    url, servers = three_servers
    roles = [check for check in preflight.store(url) if check.name.startswith("store role ")]
    assert [check.verdict for check in roles] == ["ok"] * 3
    assert len({check.name for check in roles}) == 3
    alone = {check.name: check for check in preflight.store(servers[0].url)}
    assert alone["store role"].verdict == "fail"
    assert "redis+cluster://" in alone["store role"].advice


# --- a replica takes over ------------------------------------------------------------------------


async def test_a_promoted_replica_is_another_life_that_may_lack_what_was_acknowledged() -> None:
    with TemporaryDirectory(prefix="ss-") as directory, replicated() as servers:
        link = f"{directory}/current.sock"
        os.symlink(servers.primary.url.removeprefix("unix://"), link)
        store = await RedisStore.connect(f"unix://{link}", options=PATIENT)
        life = await store.pulse()
        record = await store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(store, turn)
        await checkpoint(store, turn, ownership, 0, ids(5))
        with servers.primary.client() as primary, servers.replica.client() as replica:
            assert primary.wait(1, 5000) == 1
            command(replica, "REPLICAOF", "NO", "ONE")
        await checkpoint(store, turn, ownership, 1, ids(6))
        os.unlink(link)
        os.symlink(servers.replica.url.removeprefix("unix://"), link)
        kill(servers.primary.process)

        with pytest.raises(RolledBack):
            await checkpoint(store, turn, ownership, 2, ids(7))
        assert await store.pulse() != life
        with pytest.raises(Recovering):
            await store.begin(again(turn, steal=True))
        await store.repair(running_snapshot(turn, ownership, ids(5, 6)))
        await checkpoint(store, turn, ownership, 2, ids(7))
        done = await store.commit(commit_of(turn, ownership, output_ids=ids(5, 6, 7)))
        assert done.turn == 1
        await store.close()


async def test_a_primary_that_was_a_replica_for_a_while_is_another_life() -> None:
    """Its memory survived, its data did not: another primary's took their place."""
    with replicated() as servers:
        store = await RedisStore.connect(servers.primary.url, options=PATIENT)
        life = await store.pulse()
        with servers.primary.client() as primary, servers.replica.client() as replica:
            command(replica, "REPLICAOF", "NO", "ONE")
            primary.replicaof("127.0.0.1", str(servers.ports[1]))
            wait_for(functools.partial(is_in_step, primary), "the link")
            command(primary, "REPLICAOF", "NO", "ONE")
        assert await store.pulse() != life
        await store.close()


async def test_sentinel_leads_to_the_primary_of_the_hour() -> None:
    with replicated() as servers, sentinel(servers.ports[0]) as url:
        [role] = [check for check in preflight.store(url) if check.name.startswith("store role")]
        assert (role.name, role.verdict) == (f"store role 127.0.0.1:{servers.ports[0]}", "ok")
        store = await RedisStore.connect(url, options=PATIENT)
        life = await store.pulse()
        record = await store.create(new_conversation())
        done = await run_turn(store, record)
        turn = claim(record, key="k")
        ownership = await own(store, turn)
        await checkpoint(store, turn, ownership, 0, ids(5))
        with servers.primary.client() as primary:
            assert primary.wait(1, 5000) == 1
        kill(servers.primary.process)
        async with asyncio.timeout(30.0):
            while True:
                try:
                    if await store.pulse() != life:
                        break
                except StoreUnavailable:
                    await asyncio.sleep(0.1)
        with servers.replica.client() as replica:
            assert replica.info("replication")["role"] == "master"
        with pytest.raises(Recovering):
            await store.begin(again(turn, steal=True))
        await checkpoint(store, turn, ownership, 1, ids(6))
        after = await store.commit(commit_of(turn, ownership, output_ids=ids(5, 6)))
        assert (after.turn, after.epoch) == (done.turn + 1, ownership.fence.epoch)
        await store.close()


async def test_no_server_behind_these_urls() -> None:
    quick = RedisOptions(timeout_s=0.2, attempts=2, backoff_s=0.01)
    for url in ("redis+sentinel://127.0.0.1:1,127.0.0.1:2/service", "redis+cluster://127.0.0.1:1"):
        with pytest.raises(StoreUnavailable):
            await RedisStore.connect(url, options=quick)
        assert [check.verdict for check in preflight.store(url)] == ["fail"]


async def test_a_life_survives_calls_and_ends_with_its_library(redis_url: str) -> None:
    store = await RedisStore.connect(redis_url)
    other = await RedisStore.connect(redis_url)
    life = await store.pulse()
    assert await other.pulse() == life
    record = await store.create(new_conversation())
    turn = claim(record, key="k")
    await own(store, turn)
    assert isinstance(await other.begin(again(turn)), BusyTurn)
    assert await store.pulse() == life
    await command_function_reload(redis_url)
    assert await store.pulse() != life
    assert await other.pulse() == await store.pulse()
    await store.close()
    await other.close()


async def command_function_reload(url: str) -> None:
    """The same library in place of itself, as an upgrade does."""
    with redis.Redis.from_url(url) as client:
        [library] = client.function_list(library=LIBRARY, withcode=True)
        code = dict(zip(library[::2], library[1::2], strict=True))[b"library_code"]
        client.function_load(code, replace=True)
