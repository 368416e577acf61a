"""Calling a library of Redis functions: loading it, bounded repetition, errors turned into ours."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Self, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.store import StoreError, StoreUnavailable, StoreVersionError

LIBRARY = "sinkserve"
LIBRARY_VERSION = 1

Answer = list[Any]
Argument = str | int | bytes
T = TypeVar("T")

log = logging.getLogger(__name__)

_TRANSIENT = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.ClusterDownError,
    redis_errors.TryAgainError,
)
_REFUSED = (
    redis_errors.AuthenticationError,
    redis_errors.AuthorizationError,
    redis_errors.NoPermissionError,
    redis_errors.OutOfMemoryError,
)
_HINTS = (
    ("used memory > 'maxmemory'", "raise its maxmemory, or keep conversations for less time"),
    ("read only replica", "point the URL at the primary"),
    ("MISCONF", "it cannot write to its disk: see its log"),
    ("BUSY", "it is busy with a long script: retry"),
    ("NOREPLICAS", "it has too few replicas to accept writes"),
    ("permission", "its user needs FCALL, FUNCTION and the keys sinkserve:*"),
    ("password", "put the right user and password into the URL"),
)
_SERVER_TROUBLE = (
    "OOM",
    "READONLY",
    "MISCONF",
    "BUSY",
    "NOREPLICAS",
    "NOPERM",
    "NOAUTH",
    "LOADING",
)


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """How to talk to the server: at most `attempts` tries of at most `timeout_s` each, the pause
    between two of them doubling from `backoff_s`."""

    timeout_s: float = 1.0
    attempts: int = 3
    backoff_s: float = 0.05
    max_connections: int = 32


def library_text() -> str:
    """The Lua library as it is loaded, its own digest written into it."""
    text = resources.files("cluster").joinpath("conversation.lua").read_text(encoding="utf-8")
    return text.replace("@DIGEST@", hashlib.sha256(text.encode()).hexdigest())


class FunctionClient:
    """Calls the functions of one library. Every function must be safe to run twice."""

    def __init__(self, client: Redis, options: RedisOptions, library: str | None = None) -> None:
        self._client = client
        self._options = options
        self._library = library or library_text()

    @classmethod
    async def connect(cls, url: str, options: RedisOptions, library: str | None = None) -> Self:
        """Connect to redis://, rediss:// or unix:// and load the library if it is missing or older.

        Raises ValueError for another URL, StoreUnavailable, StoreVersionError.
        """
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=options.max_connections,
            timeout=options.timeout_s,
            socket_timeout=options.timeout_s,
            socket_connect_timeout=options.timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        functions = cls(Redis.from_pool(pool), options, library)
        try:
            await functions.repeat(functions.load)
        except BaseException:
            await functions.close()
            raise
        return functions

    async def call(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Answer:
        """The function's answer. Raises StoreUnavailable, StoreError for a fault in the library."""
        return await self.repeat(lambda: self.call_once(name, keys, args))

    async def call_once(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Answer:
        """One try, with redis-py's errors. A server that lost the library gets it back."""
        command = ("FCALL", f"{LIBRARY}_{name}", len(keys), *keys, *args)
        try:
            answer: Answer = await self._execute(*command)
        except redis_errors.ResponseError as error:
            if "Function not found" not in str(error):
                raise
            await self.load()
            answer = await self._execute(*command)
        return answer

    async def get(self, key: str) -> bytes | None:
        """The string at `key`. Raises StoreUnavailable."""
        return await self.repeat(lambda: self._execute("GET", key))

    async def ping(self) -> None:
        """Raises StoreUnavailable."""
        await self.repeat(lambda: self._execute("PING"))

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def repeat(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run `operation` until it gets an answer, a bounded number of times."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await operation()
            except _REFUSED as error:
                raise _unavailable(error) from error
            except _TRANSIENT as error:
                if attempt >= self._options.attempts:
                    raise _unavailable(error) from error
            except redis_errors.RedisError as error:
                if str(error).startswith(_SERVER_TROUBLE):
                    raise _unavailable(error) from error
                raise StoreError(f"the conversation store failed: {error}") from error
            await asyncio.sleep(self._options.backoff_s * 2 ** (attempt - 1))

    async def load(self) -> None:
        """Load the library unless it is there; replace an older one, never a newer one."""
        digest = self._library_digest()
        for _ in range(self._options.attempts):
            command: tuple[str, ...] = ("FUNCTION", "LOAD", self._library)
            try:
                found = await self._execute("FCALL", f"{LIBRARY}_version", 0)
            except redis_errors.ResponseError as error:
                if "Function not found" not in str(error):
                    raise
            else:
                version, found_digest = int(found[1]), found[2].decode()
                if version > LIBRARY_VERSION:
                    raise StoreVersionError(
                        f"the store's function library has version {version}, this release of "
                        f"SinkServe knows {LIBRARY_VERSION}: upgrade this node, or use another store"
                    )
                if (version, found_digest) == (LIBRARY_VERSION, digest):
                    return
                command = ("FUNCTION", "LOAD", "REPLACE", self._library)
            try:
                await self._execute(*command)
                log.info("loaded function library version %d", LIBRARY_VERSION)
            except redis_errors.ResponseError as error:
                if "already exists" not in str(error):
                    raise
        raise StoreUnavailable("another process keeps replacing the store's function library")

    async def _execute(self, *command: Argument) -> Any:
        return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    def _library_digest(self) -> str:
        return self._library.rsplit("DIGEST = '", 1)[1].split("'", 1)[0]


def _unavailable(error: Exception) -> StoreUnavailable:
    message = str(error) or type(error).__name__
    hint = next((f"; {hint}" for sign, hint in _HINTS if sign in message), "")
    return StoreUnavailable(f"the conversation store is unavailable: {message}{hint}")
