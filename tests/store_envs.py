"""Stores whose clock a test moves by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import redis

from cluster.memory_store import MemoryStore
from cluster.redis_functions import FunctionClient, RedisOptions, library_text
from cluster.redis_store import RedisStore
from cluster.store import StoreLimits
from tests.valkey_fixture import ValkeyServer

CLOCK_KEY = "test:clock"
EXPIRE = """
for _, key in ipairs(redis.call('KEYS', 'sinkserve:*')) do
  local at = redis.call('PEXPIRETIME', key)
  if at >= 0 and at <= tonumber(ARGV[1]) then redis.call('DEL', key) end
end
"""


@dataclass(slots=True)
class HandClock:
    """Seconds since an arbitrary start; every look at it takes a microsecond."""

    now_s: float = 1_000_000.0

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


@dataclass(slots=True)
class MemoryEnv:
    """The reference in a test's hands."""

    store: MemoryStore
    clock: HandClock

    @classmethod
    def make(cls, limits: StoreLimits, kind: Callable[..., MemoryStore] = MemoryStore) -> MemoryEnv:
        clock = HandClock()
        return cls(kind(limits, clock), clock)

    async def advance(self, seconds: float) -> None:
        self.clock.now_s += seconds

    async def restart(self) -> None:
        self.store.restart()

    async def save(self) -> object:
        store = self.store
        return copy.deepcopy((store._records, store._tombstones, store._histories))

    async def roll_back(self, saved: object) -> None:
        store = self.store
        kept: Any = copy.deepcopy(saved)
        store._records, store._tombstones, store._histories = kept
        store.restart()

    async def record_bytes(self, conversation_id: str) -> int:
        record = self.store._records[conversation_id]
        parts = [record.replay.sink_ids, record.replay.recent_ids]
        if record.running:
            parts += [record.running.input_ids, record.running.output_ids]
        return sum(part.nbytes for part in parts)


@dataclass(slots=True)
class RedisEnv:
    """A real server whose functions read the time plus an offset kept in a key."""

    store: RedisStore
    client: redis.Redis

    @classmethod
    async def make(
        cls, server: ValkeyServer, limits: StoreLimits, library: str | None = None
    ) -> Self:
        library = movable_clock(library or library_text())
        functions = await FunctionClient.connect(
            server.url, RedisOptions(timeout_s=10.0, recovery_s=limits.recovery_s), library
        )
        return cls(RedisStore(functions, limits), server.client())

    async def advance(self, seconds: float) -> None:
        offset = self.client.incrby(CLOCK_KEY, round(seconds * 1e6))
        now_ms = self.client.time()[0] * 1000 + int(offset) // 1000
        self.client.eval(EXPIRE, 0, now_ms)

    async def restart(self) -> None:
        self.client.function_flush()

    async def save(self) -> object:
        keys = list(self.client.scan_iter("sinkserve:*"))
        return {key: (self.client.dump(key), self.client.pexpiretime(key)) for key in keys}

    async def roll_back(self, saved: object) -> None:
        for key in self.client.scan_iter("sinkserve:*"):
            self.client.delete(key)
        kept: Any = saved
        for key, (data, expires_ms) in kept.items():
            self.client.restore(key, expires_ms, data, absttl=True)
        await self.restart()

    async def record_bytes(self, conversation_id: str) -> int:
        key = f"sinkserve:{{{conversation_id}}}:rec"
        return cast(int, self.client.memory_usage(key, samples=0))

    async def close(self) -> None:
        await self.store.close()
        self.client.close()


def movable_clock(library: str) -> str:
    """The library with a clock that a test can move forward."""
    reading = "tonumber(time[1]) * 1000000 + tonumber(time[2])"
    if library.count(reading) != 1:
        raise ValueError("the library reads the time in another way now: change movable_clock")
    offset = f"tonumber(redis.call('GET', '{CLOCK_KEY}') or 0)"
    return library.replace(reading, f"{reading} + {offset}")
