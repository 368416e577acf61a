"""The conversation store: the contract on each implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.store_contract import LIMITS, StoreContract
from tests.store_envs import MemoryEnv, RedisEnv
from tests.store_failover_contract import (
    CheckpointContract,
    KeyContract,
    RebaseContract,
    RecoveryContract,
)
from tests.valkey_fixture import ValkeyServer


class WholeContract(
    StoreContract, KeyContract, CheckpointContract, RecoveryContract, RebaseContract
):
    pass


class TestMemoryStore(WholeContract):
    @pytest.fixture
    def env(self) -> MemoryEnv:
        return MemoryEnv.make(LIMITS)


class TestRedisStore(WholeContract):
    @pytest.fixture
    async def env(self, valkey_server: ValkeyServer, redis_url: str) -> AsyncIterator[RedisEnv]:
        env = await RedisEnv.make(valkey_server, LIMITS)
        yield env
        await env.close()
