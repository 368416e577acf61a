"""The embedded server: one per data directory, found again, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import redis

from cluster import embedded
from cluster.conversation import (
    BeginTurn,
    NewConversation,
    Ownership,
    TurnCommit,
    new_conversation_id,
)
from cluster.redis_store import RedisStore
from cluster.store import StoreLimits

TENANT = "tenant"
NO_RECOVERY = StoreLimits(recovery_s=0.0)


@pytest.fixture
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # pytest's own directories are too long for a unix socket when the test's name is.
    directory = tmp_path_factory.mktemp("e")
    yield directory
    embedded.stop(directory)


def server_of(url: str) -> psutil.Process:
    with redis.Redis.from_url(url) as client:
        return psutil.Process(int(client.info("server")["process_id"]))


def kill(process: psutil.Process) -> None:
    process.kill()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


async def commit_turns(url: str, conversation_id: str, turns: int) -> None:
    store = await RedisStore.connect(url, NO_RECOVERY)
    new = NewConversation(conversation_id, TENANT, "model", 2, 8, 4)
    await store.create(new)
    ids = np.arange(5, dtype=np.int32)
    for turn in range(turns):
        claim = BeginTurn(conversation_id, TENANT, "replica", ids, "model", 10.0)
        ownership = await store.begin(claim)
        assert isinstance(ownership, Ownership)
        head = f"{turn + 1:064x}"
        commit = TurnCommit(conversation_id, TENANT, ownership.fence, ids, head, head, ())
        await store.commit(commit)
    await store.close()


async def committed_turns(url: str, conversation_id: str) -> int:
    store = await RedisStore.connect(url, NO_RECOVERY)
    record = await store.get(TENANT, conversation_id)
    await store.close()
    return record.turn


def test_starts_once_and_is_found_again(data_dir: Path) -> None:
    assert embedded.running_url(data_dir) is None
    url = embedded.ensure_running(data_dir)
    server = server_of(url)
    assert url.startswith("unix://")
    assert embedded.ensure_running(data_dir) == url
    assert embedded.running_url(data_dir) == url
    assert server_of(url) == server


def test_many_starters_share_one_server(data_dir: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        urls = list(pool.map(lambda _: embedded.ensure_running(data_dir), range(4)))
    assert len(set(urls)) == 1
    inside = [p for p in psutil.process_iter() if working_directory(p) == data_dir / "store"]
    assert inside == [server_of(urls[0])]


def working_directory(process: psutil.Process) -> Path | None:
    try:
        return Path(process.cwd())
    except psutil.Error:
        return None


def test_stop_ends_the_server_and_keeps_the_data(data_dir: Path) -> None:
    url = embedded.ensure_running(data_dir)
    conversation_id = new_conversation_id()
    asyncio.run(commit_turns(url, conversation_id, 1))
    server = server_of(url)
    assert embedded.stop(data_dir)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    assert embedded.running_url(data_dir) is None
    assert not embedded.stop(data_dir)
    url = embedded.ensure_running(data_dir)
    assert asyncio.run(committed_turns(url, conversation_id)) == 1


def test_stop_of_a_directory_that_was_never_used(tmp_path: Path) -> None:
    assert not embedded.stop(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_killed_service_leaves_a_server_that_is_taken_over(data_dir: Path) -> None:
    script = (
        "import sys, os, signal; from cluster import embedded;"
        "print(embedded.ensure_running(sys.argv[1]), flush=True);"
        "os.killpg(0, signal.SIGKILL)"
    )
    service = subprocess.run(
        [sys.executable, "-c", script, str(data_dir)],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert service.returncode == -signal.SIGKILL
    url = service.stdout.strip()
    server = server_of(url)
    assert embedded.ensure_running(data_dir) == url
    assert server_of(url) == server


def test_killed_server_loses_no_acknowledged_commit(data_dir: Path) -> None:
    conversation_id = new_conversation_id()
    url = embedded.ensure_running(data_dir)
    asyncio.run(commit_turns(url, conversation_id, 20))
    kill(server_of(url))
    assert embedded.running_url(data_dir) is None
    url = embedded.ensure_running(data_dir)
    assert asyncio.run(committed_turns(url, conversation_id)) == 20


def test_settings_that_the_promises_need(data_dir: Path) -> None:
    url = embedded.ensure_running(data_dir, max_memory_bytes=64 << 20)
    with redis.Redis.from_url(url) as client:
        settings = client.config_get("*")
    expected = {
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
        "maxmemory": str(64 << 20),
        "port": "0",
    }
    assert {name: settings[name] for name in expected} == expected
    assert stat.S_IMODE(os.stat(data_dir / "store").st_mode) == 0o700


def test_long_path_falls_back_to_a_protected_loopback_port(data_dir: Path) -> None:
    deep = data_dir / ("a long directory name \"with' quotes " + "x" * 60) / ("y" * 40)
    url = embedded.ensure_running(deep)
    try:
        assert url.startswith("redis://:")
        server_of(url)
        stranger = redis.Redis.from_url("redis://" + url.split("@")[1])
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert stat.S_IMODE(os.stat(deep / "store" / "address.json").st_mode) == 0o600
        assert embedded.ensure_running(deep) == url
        kill(server_of(url))
        assert embedded.ensure_running(deep) == url
        server_of(url)
    finally:
        embedded.stop(deep)


def test_a_taken_loopback_port_is_replaced(data_dir: Path) -> None:
    deep = data_dir / ("x" * 100)
    url = embedded.ensure_running(deep)
    embedded.stop(deep)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int(url.rsplit(":", 1)[1].split("/")[0])))
        thief.listen()
        try:
            moved = embedded.ensure_running(deep)
            assert moved != url
            server_of(moved)
        finally:
            embedded.stop(deep)


def test_special_characters_in_the_path(data_dir: Path) -> None:
    odd = data_dir / 'q? "%20" é'
    url = embedded.ensure_running(odd)
    try:
        assert url.startswith("unix://")
        server_of(url)
    finally:
        embedded.stop(odd)


def test_unreadable_data_is_reported_with_the_log(data_dir: Path) -> None:
    embedded.ensure_running(data_dir)
    embedded.stop(data_dir)
    manifest = next((data_dir / "store" / "appendonlydir").glob("*.manifest"))
    manifest.write_text("broken")
    with pytest.raises(embedded.EmbeddedError, match=r"(?s)does not answer.*AOF"):
        embedded.ensure_running(data_dir)


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(embedded.EmbeddedError, match="Choose another data directory"):
        embedded.ensure_running(tmp_path / "file")
