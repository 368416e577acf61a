"""Connections to the store's Redis by URL: one server, a primary that Sentinel names, or a cluster.

    redis://[user:password@]host[:port][/db]        rediss:// the same with TLS
    unix://[user:password@]/path/to.sock
    redis+sentinel://[user:password@]host[:port],host[:port].../service[/db]
    redis+cluster://[user:password@]host[:port],host[:port]...

The last two also with rediss+. User and password are those of the data servers; what Sentinel itself
asks for are the parameters `sentinel_username` and `sentinel_password`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from redis import Redis as SyncRedis
from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode as SyncClusterNode
from redis.cluster import RedisCluster as SyncCluster
from redis.sentinel import Sentinel as SyncSentinel

Argument = str | int | bytes
Command = Sequence[Argument]

PLAIN_SCHEMES = ("redis", "rediss", "unix")
SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
SCHEMES = (*PLAIN_SCHEMES, *SENTINEL_SCHEMES, *CLUSTER_SCHEMES)

REDIS_PORT, SENTINEL_PORT = 6379, 26379


@dataclass(frozen=True, slots=True)
class Address:
    """A URL of several servers, taken apart."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    username: str | None
    password: str | None
    path: tuple[str, ...]
    parameters: dict[str, str]

    @property
    def credentials(self) -> dict[str, Any]:
        """What every connection to a data server is made with."""
        return {
            "username": self.username,
            "password": self.password,
            "ssl": self.scheme.startswith("rediss"),
        }

    @property
    def sentinel_credentials(self) -> dict[str, Any]:
        """What every connection to a Sentinel is made with."""
        return {
            "username": self.parameters.get("sentinel_username"),
            "password": self.parameters.get("sentinel_password"),
            "ssl": self.scheme.startswith("rediss"),
        }

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing or too much."""
        if self.scheme in CLUSTER_SCHEMES:
            return not self.path
        number = self.path[1:]
        return len(self.path) in (1, 2) and all(part.isdecimal() for part in number)

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ValueError, without the password, for what is no such URL."""
        parts = urlsplit(url)
        user, _, hosts = parts.netloc.rpartition("@")
        name, _, password = user.partition(":")
        port = SENTINEL_PORT if parts.scheme in SENTINEL_SCHEMES else REDIS_PORT
        return cls(
            scheme=parts.scheme,
            hosts=tuple(_host(text, port) for text in hosts.split(",")),
            username=unquote(name) or None,
            password=unquote(password) or None,
            path=tuple(part for part in parts.path.split("/") if part),
            parameters={key: values[-1] for key, values in parse_qs(parts.query).items()},
        )


def url_problem(url: str) -> str | None:
    """What is wrong with a URL and what to use instead, as a sentence without its end; None if nothing
    is. Never tells the password."""
    scheme = url.partition("://")[0]
    try:
        if scheme in PLAIN_SCHEMES:
            return None
        if scheme in SCHEMES and Address.parse(url).is_complete:
            return None
    except ValueError:
        pass
    return (
        f"a URL with the scheme {scheme!r} is not one of a Redis store. Use redis://host:6379/0, "
        "rediss://, unix:///path, redis+sentinel://host:26379,host:26379/service, "
        "redis+cluster://host:6379,host:6379"
    )


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a Redis URL names its servers as host:port,host:port")
    return parts.hostname, parts.port or default_port


class Servers(Protocol):
    """One or more data servers. All methods raise redis-py's errors."""

    async def execute(self, *command: Argument) -> Any:
        """The answer of the server that has the command's keys."""
        ...

    async def execute_batch(self, commands: Sequence[Command]) -> list[Any]:
        """Answers or errors, one for each command, after one round trip to each server."""
        ...

    async def names(self) -> list[str]:
        """The servers that take writes now, in a stable order."""
        ...

    async def execute_on(self, name: str, *command: Argument) -> Any:
        """The answer of the server `name`."""
        ...

    async def close(self) -> None:
        """Close connections; idempotent."""
        ...


def open_servers(url: str, timeout_s: float, max_connections: int) -> Servers:
    """Connects to nothing yet. Raises ValueError for a URL of another form."""
    if problem := url_problem(url):
        raise ValueError(problem)
    scheme = url.partition("://")[0]
    times: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    if scheme in SENTINEL_SCHEMES:
        return _sentinel(Address.parse(url), times, max_connections)
    if scheme in CLUSTER_SCHEMES:
        return ClusterServers(Address.parse(url), times, max_connections)
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        **times,
    )
    return OneServer(Redis.from_pool(pool))


def primaries(url: str, timeout_s: float) -> dict[str, SyncRedis]:
    """Blocking clients of the servers that take writes now, by name, for a look behind the store's
    back. The caller closes them. Raises ValueError, redis-py's errors."""
    if problem := url_problem(url):
        raise ValueError(problem)
    times: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    if url.partition("://")[0] in PLAIN_SCHEMES:
        return {"": SyncRedis.from_url(url, **times)}
    address = Address.parse(url)
    to_data = {**times, **address.credentials}
    if address.scheme in SENTINEL_SCHEMES:
        asked = SyncSentinel(  # type: ignore[no-untyped-call]
            address.hosts, sentinel_kwargs={**times, **address.sentinel_credentials}
        )
        host, port = asked.discover_master(address.path[0])  # type: ignore[no-untyped-call]
        return {f"{host}:{port}": SyncRedis(host=host, port=port, **to_data)}
    nodes = [
        SyncClusterNode(host, port)  # type: ignore[no-untyped-call]
        for host, port in address.hosts
    ]
    try:
        with SyncCluster(startup_nodes=nodes, **to_data) as cluster:
            found = [(node.host, node.port) for node in cluster.get_primaries()]
    except redis_errors.RedisClusterException as error:
        raise redis_errors.ConnectionError(str(error)) from error
    return {
        f"{host}:{port}": SyncRedis(host=host, port=port, **to_data) for host, port in sorted(found)
    }


def _sentinel(address: Address, times: dict[str, Any], max_connections: int) -> OneServer:
    asking = {**times, **address.sentinel_credentials, "retry": Retry(NoBackoff(), 0)}
    sentinel = Sentinel(address.hosts, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    client: Redis = sentinel.master_for(
        address.path[0],
        db=int(address.path[1]) if len(address.path) > 1 else 0,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        **address.credentials,
        **times,
    )
    return OneServer(client, list(sentinel.sentinels), max_connections)


class OneServer:
    """A single primary, whoever names it. Sentinel's pool has no limit of its own."""

    def __init__(
        self, client: Redis, others: Sequence[Redis] = (), max_connections: int = 1 << 20
    ) -> None:
        self._client = client
        self._others = others
        self._free = asyncio.Semaphore(max_connections)

    async def execute(self, *command: Argument) -> Any:
        async with self._free:
            return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def execute_batch(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        async with self._free:
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def names(self) -> list[str]:
        return [""]

    async def execute_on(self, name: str, *command: Argument) -> Any:
        return await self.execute(*command)

    async def close(self) -> None:
        for client in (self._client, *self._others):
            await client.aclose()
            await client.connection_pool.disconnect()


class ClusterServers:
    """The primaries of a Redis Cluster; keys with one hash tag are on one of them."""

    def __init__(self, address: Address, times: dict[str, Any], max_connections: int) -> None:
        # Its pools refuse what is above their limit instead of making it wait.
        self._free = asyncio.Semaphore(max_connections)
        self._client = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
            max_connections=max_connections,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            **address.credentials,
            **times,
        )

    async def execute(self, *command: Argument) -> Any:
        async with self._use():
            return await self._client.execute_command(*command)

    async def execute_batch(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        async with self._use():
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def names(self) -> list[str]:
        async with self._use():
            await self._client.initialize()
        return sorted(node.name for node in self._client.get_primaries())

    async def execute_on(self, name: str, *command: Argument) -> Any:
        node = self._client.get_node(node_name=name)
        if node is None:
            raise redis_errors.ConnectionError(f"{name} is no longer part of the cluster")
        async with self._use():
            return await self._client.execute_command(*command, target_nodes=node)

    @contextlib.asynccontextmanager
    async def _use(self) -> AsyncIterator[None]:
        async with self._free:
            try:
                yield
            except redis_errors.RedisClusterException as error:
                # redis-py's own base of all errors does not cover it.
                raise redis_errors.ConnectionError(str(error)) from error

    async def close(self) -> None:
        await self._client.aclose()
