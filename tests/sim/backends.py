"""The stores that a simulation can run on: the real Redis functions on a real server, or the reference.

A backend can be set back to an earlier state, as a server that lost its latest writes is, and restarted
without loss; either way it begins a new life.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import redis
from redis.connection import UnixDomainSocketConnection

from cluster.memory_store import MemoryStore
from cluster.redis_functions import FunctionClient, RedisOptions, library_text
from cluster.redis_servers import Argument, Command
from cluster.redis_store import RedisStore
from cluster.store import ConversationStore, StoreLimits
from tests.sim.network import Lost, Network
from tests.sim.virtual import Process
from tests.sim.watched import RemoteStore
from tests.store_envs import CLOCK_KEY, EXPIRE
from tests.valkey_fixture import ValkeyServer

LIMITS = StoreLimits(ttl_s=3600.0)
OPTIONS = RedisOptions(attempts=2, backoff_s=0.02, recovery_s=LIMITS.recovery_s)

SAVE = """
local saved = {}
for _, key in ipairs(redis.call('KEYS', 'sinkserve:*')) do
  table.insert(saved, key)
  table.insert(saved, redis.call('DUMP', key))
  table.insert(saved, redis.call('PEXPIRETIME', key))
end
return saved
"""
ROLL_BACK = """
for _, key in ipairs(redis.call('KEYS', 'sinkserve:*')) do redis.call('DEL', key) end
for i = 1, #ARGV, 3 do
  if ARGV[i + 2] == '-1' then
    redis.call('RESTORE', ARGV[i], 0, ARGV[i + 1])
  else
    redis.call('RESTORE', ARGV[i], ARGV[i + 2], ARGV[i + 1], 'ABSTTL')
  end
end
"""


class Backend(Protocol):
    """One store for one run."""

    def open(self, process: Process, network: Network) -> ConversationStore:
        """The store as this process reaches it."""
        ...

    def save(self) -> Any:
        """Its state now."""
        ...

    def restart(self, saved: Any | None) -> None:
        """Begin a new life, from `saved` if given, else with nothing lost."""
        ...

    def clock_moved(self) -> None:
        """Drop what has expired by the network's clock."""
        ...

    def close(self) -> None:
        """After the run."""
        ...


class MemoryBackend:
    """The reference, its state copied whole for each `save`."""

    def __init__(self, network: Network, kind: type[MemoryStore] = MemoryStore) -> None:
        self._store = kind(LIMITS, network.store_now_s)

    def open(self, process: Process, network: Network) -> ConversationStore:
        return RemoteStore(self._store, process, network)

    def save(self) -> Any:
        store = self._store
        return copy.deepcopy((store._records, store._tombstones, store._histories))

    def restart(self, saved: Any | None) -> None:
        store = self._store
        if saved is not None:
            store._records, store._tombstones, store._histories = copy.deepcopy(saved)
        store.restart()

    def clock_moved(self) -> None:
        """It looks at the clock itself."""

    def close(self) -> None:
        """Nothing is left."""


class RedisBackend:
    """`library` is loaded into the server, which is emptied first."""

    def __init__(self, server: ValkeyServer, network: Network, library: str | None = None) -> None:
        self._library = hand_clock(library or library_text())
        self._network = network
        path = server.url.removeprefix("unix://")
        kind: Any = UnixDomainSocketConnection  # in part untyped
        self._connection = kind(path=path, protocol=2)
        self._run("FLUSHALL")
        self._load()

    def open(self, process: Process, network: Network) -> ConversationStore:
        wire = Wire(process, network, self._run_at_hand_time)
        return RedisStore(FunctionClient(wire, OPTIONS, self._library), LIMITS)

    def save(self) -> Any:
        return self._run("EVAL", SAVE, 0)

    def restart(self, saved: Any | None) -> None:
        if saved is not None:
            self._run("EVAL", ROLL_BACK, 0, *saved)
        self._load()

    def clock_moved(self) -> None:
        self._run("EVAL", EXPIRE, 0, round(self._network.store_now_s() * 1000))

    def close(self) -> None:
        self._connection.disconnect()

    def _load(self) -> None:
        self._run("FUNCTION", "LOAD", "REPLACE", self._library)

    def _run_at_hand_time(self, commands: Sequence[Command]) -> list[Any]:
        now = round(self._network.store_now_s() * 1e6)
        return self._run_all([("SET", CLOCK_KEY, now), *commands])[1:]

    def _run(self, *command: Argument) -> Any:
        [answer] = self._run_all([command])
        if isinstance(answer, redis.ResponseError):
            raise answer
        return answer

    def _run_all(self, commands: Sequence[Command]) -> list[Any]:
        """One round trip. What the server refuses is an answer too."""
        self._connection.send_packed_command(self._connection.pack_commands(commands))
        answers: list[Any] = []
        for _ in commands:
            try:
                answers.append(self._connection.read_response())
            except redis.ResponseError as error:
                answers.append(error)
        return answers


class Wire:
    """`cluster.redis_servers.Servers`: each command, or batch of them, is one place to interleave."""

    def __init__(
        self, process: Process, network: Network, run: Callable[[Sequence[Command]], list[Any]]
    ) -> None:
        self._process = process
        self._network = network
        self._run = run

    async def execute(self, *command: Argument) -> Any:
        [answer] = await self.execute_batch([command])
        if isinstance(answer, redis.ResponseError):
            raise answer
        return answer

    async def execute_batch(self, commands: Sequence[Command]) -> list[Any]:
        try:
            await self._network.request(self._process)
            answers = self._run(commands)
            await self._network.reply(self._process)
        except Lost as lost:
            raise redis.ConnectionError(str(lost)) from lost
        return answers

    async def names(self) -> list[str]:
        return [""]

    async def execute_on(self, name: str, *command: Argument) -> Any:
        return await self.execute(*command)

    async def close(self) -> None:
        """The connection is everybody's."""


def hand_clock(library: str) -> str:
    """The library with a clock that the simulation alone moves."""
    reading = "tonumber(time[1]) * 1000000 + tonumber(time[2])"
    if library.count(reading) != 1:
        raise ValueError("the library reads the time in another way now: change hand_clock")
    return library.replace(reading, f"tonumber(redis.call('GET', '{CLOCK_KEY}'))")
