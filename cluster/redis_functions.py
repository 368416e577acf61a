"""Calling a library of Redis functions: loading it, bounded repetition, errors turned into ours."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Self, TypeVar

from redis import exceptions as redis_errors

from cluster.redis_servers import Argument, Command, Servers, open_servers
from cluster.store import StoreError, StoreUnavailable, StoreVersionError

LIBRARY = "sinkserve"
LIBRARY_VERSION = 3

RESTARTED = b"RESTARTED"

Answer = list[Any]
Call = tuple[Sequence[str], Sequence[Argument]]
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
    between two of them doubling from `backoff_s`. `recovery_s`: see `StoreLimits`."""

    timeout_s: float = 1.0
    attempts: int = 3
    backoff_s: float = 0.05
    max_connections: int = 32
    recovery_s: float = 2.5


def library_text() -> str:
    """The Lua library as it is loaded, its own digest written into it."""
    text = resources.files("cluster").joinpath("conversation.lua").read_text(encoding="utf-8")
    return text.replace("@DIGEST@", hashlib.sha256(text.encode()).hexdigest())


class FunctionClient:
    """Calls the functions of one library. Every function must be safe to run twice."""

    def __init__(self, servers: Servers, options: RedisOptions, library: str | None = None) -> None:
        self._servers = servers
        self._options = options
        self._library = library or library_text()
        self._lives: dict[str, str] = {}

    @classmethod
    async def connect(cls, url: str, options: RedisOptions, library: str | None = None) -> Self:
        """Connect to a URL (see `cluster.redis_servers`) and load the library where it is missing or
        older. Raises ValueError for another URL, StoreUnavailable, StoreVersionError."""
        servers = open_servers(url, options.timeout_s, options.max_connections)
        functions = cls(servers, options, library)
        try:
            await functions.repeat(functions.load)
            # An empty server must be found to be empty before the first write.
            await functions.pulse()
        except BaseException:
            await functions.close()
            raise
        return functions

    async def call(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Answer:
        """The function's answer. Raises StoreUnavailable, StoreError for a fault in the library."""
        return await self.repeat(lambda: self.call_once(name, keys, args))

    async def call_once(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Answer:
        """One try, with redis-py's errors. A server that lost the library gets it back, and one that
        has restarted is told so."""
        command = _function(name, keys, args)
        answer = await self._execute_loaded(command)
        if answer[0] == RESTARTED:
            await self._execute_loaded(_function("wake", keys[:1], self._waking()))
            answer = await self._execute_loaded(command)
        if answer[0] == RESTARTED:
            raise redis_errors.ConnectionError("the server restarts again and again")
        return answer

    async def call_batch(self, name: str, batch: Sequence[Call]) -> list[Answer | StoreError]:
        """One function for many keys in one round trip, each with its own answer or error."""
        done: dict[int, Answer | StoreError] = {}

        async def attempt() -> None:
            left = [i for i in range(len(batch)) if i not in done]
            answers = await self._servers.execute_batch([_function(name, *batch[i]) for i in left])
            trouble: redis_errors.RedisError | None = None
            for i, answer in zip(left, answers, strict=True):
                if not isinstance(answer, Exception) and answer[0] != RESTARTED:
                    done[i] = answer
                    continue
                try:
                    done[i] = await self.call_once(name, *batch[i])
                except redis_errors.RedisError as error:
                    if _is_transient(error):
                        trouble = error
                    else:
                        done[i] = _translated(error)
            if trouble is not None:
                raise trouble

        try:
            await self.repeat(attempt)
        except StoreError as error:
            return [done.get(i, error) for i in range(len(batch))]
        return [done[i] for i in range(len(batch))]

    async def pulse(self) -> str:
        """Names this life of every server."""
        return await self.repeat(self._pulse)

    async def _pulse(self) -> str:
        lives: dict[str, str] = {}
        for server in await self._servers.names():
            answer = await self._execute_loaded(_function("pulse", [], []), server)
            if answer[0] == RESTARTED:
                wake = _function("wake", [], self._waking())
                answer = await self._execute_loaded(wake, server)
            lives[server] = answer[1].decode()
        self._lives = lives
        return ",".join(lives.values())

    def _waking(self) -> list[Argument]:
        """A life's name, how long its owners have for repairs, whether there was one before."""
        recovery = round(self._options.recovery_s * 1e6)
        return [secrets.token_hex(8), recovery, "1" if self._lives else ""]

    async def _execute_loaded(self, command: Command, server: str | None = None) -> Answer:
        """Load the library and try again where it is missing."""
        try:
            answer: Answer = await self._execute(command, server)
        except redis_errors.ResponseError as error:
            if "Function not found" not in str(error):
                raise
            await self.load()
            answer = await self._execute(command, server)
        return answer

    async def _execute(self, command: Command, server: str | None) -> Any:
        if server is None:
            return await self._servers.execute(*command)
        return await self._servers.execute_on(server, *command)

    async def get(self, key: str) -> bytes | None:
        """The string at `key`. Raises StoreUnavailable."""
        return await self.repeat(lambda: self._servers.execute("GET", key))

    async def ping(self) -> None:
        """Raises StoreUnavailable."""
        await self.repeat(lambda: self._servers.execute("PING"))

    async def close(self) -> None:
        """Close connections; idempotent."""
        await self._servers.close()

    async def repeat(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run `operation` until it gets an answer, a bounded number of times."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await operation()
            except redis_errors.RedisError as error:
                if not _is_transient(error) or attempt >= self._options.attempts:
                    raise _translated(error) from error
            await asyncio.sleep(self._options.backoff_s * 2 ** (attempt - 1))

    async def load(self) -> None:
        """Load the library on every server unless it is there; replace an older one, never a newer."""
        for server in await self._servers.names():
            await self._load(server)

    async def _load(self, server: str) -> None:
        execute = self._servers.execute_on
        digest = self._library_digest()
        for _ in range(self._options.attempts):
            command: tuple[str, ...] = ("FUNCTION", "LOAD", self._library)
            try:
                found = await execute(server, "FCALL", f"{LIBRARY}_version", 0)
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
                await execute(server, *command)
                log.info("loaded function library version %d", LIBRARY_VERSION)
            except redis_errors.ResponseError as error:
                if "already exists" not in str(error):
                    raise
        raise StoreUnavailable("another process keeps replacing the store's function library")

    def _library_digest(self) -> str:
        return self._library.rsplit("DIGEST = '", 1)[1].split("'", 1)[0]


def _function(name: str, keys: Sequence[str], args: Sequence[Argument]) -> Command:
    return ("FCALL", f"{LIBRARY}_{name}", len(keys), *keys, *args)


def _is_transient(error: redis_errors.RedisError) -> bool:
    """Whether the same call may work a moment later."""
    return isinstance(error, _TRANSIENT) and not isinstance(error, _REFUSED)


def _translated(error: redis_errors.RedisError) -> StoreError:
    known = isinstance(error, (*_TRANSIENT, *_REFUSED))
    if not known and not str(error).startswith(_SERVER_TROUBLE):
        return StoreError(f"the conversation store failed: {error}")
    message = str(error) or type(error).__name__
    hint = next((f"; {hint}" for sign, hint in _HINTS if sign in message), "")
    return StoreUnavailable(f"the conversation store is unavailable: {message}{hint}")
