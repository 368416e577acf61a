"""The protocol under seeded faults, interleaved at every store call: see tests/sim/world.py.

One seed by hand:  python -m tests.sim SEED --trace   (and --real for production's replica)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from cluster.redis_functions import library_text
from tests.sim.backends import MemoryBackend, RedisBackend
from tests.sim.real_replica import HASTY, REAL
from tests.sim.world import KINDS, SMALL, Cast, OpenBackend, Plan, simulate
from tests.valkey_fixture import ValkeyServer

FEW, MANY = 36, 252


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Replicas warn of every fault, and there are thousands."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def on_redis(valkey_server: ValkeyServer) -> OpenBackend:
    library = library_text()
    return lambda network: RedisBackend(valkey_server, network, library)


def hold(seeds: Iterable[int], open_backend: OpenBackend, players: Cast = SMALL) -> Counter[str]:
    """Every promise holds under every seed; what happened, counted."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        outcome = simulate(Plan.of(seed), open_backend, players)
        assert not outcome.problem, outcome.report()
        # Only a store that went back in time under dead owners may lose anything.
        assert outcome.plan.kind == "storm" or not outcome.counts["lost"]
        counts += outcome.counts
    return counts


@pytest.mark.parametrize("chunk", range(6))
def test_promises_hold_on_redis(chunk: int, on_redis: OpenBackend) -> None:
    counts = hold(range(chunk * FEW, (chunk + 1) * FEW), on_redis)
    assert counts["committed"] > 5 * FEW
    # Most of what can go wrong did.
    for event in ("crash", "pause", "forward", "restart", "resumed", "repaired", "turn_conflict"):
        assert counts[event] > 0


def test_promises_hold_on_the_reference() -> None:
    counts = hold(range(9000, 9000 + 2 * FEW), MemoryBackend)
    assert counts["committed"] > 10 * FEW


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(8))
def test_promises_hold_on_redis_at_length(chunk: int, on_redis: OpenBackend) -> None:
    """2,016 seeds and 10,000 committed turns together."""
    counts = hold(range(1000 + chunk * MANY, 1000 + (chunk + 1) * MANY), on_redis)
    assert counts["committed"] > 1250
    # Double faults do lose turns, or their refusals would prove nothing; poison does kill.
    for event in ("lost", "poisoned", "quarantined", "key_reused", "delete", "expire", "outage"):
        assert counts[event] > 0


@pytest.mark.parametrize("chunk", range(4))
def test_production_holds_them(chunk: int, on_redis: OpenBackend) -> None:
    """TurnRunner, output gate, store watch and engine loop as they ship, on the same faults."""
    counts = hold(range(chunk * 18, (chunk + 1) * 18), on_redis, REAL)
    assert counts["committed"] > 5 * 18
    for event in ("crash", "restart", "resumed", "repaired"):
        assert counts[event] > 0


def test_a_reply_that_a_client_saw_and_the_store_lost_is_a_conflict(on_redis: OpenBackend) -> None:
    """Its owner was stopped, the store went back, and another one said something else: seeds that were
    found among 3,000."""
    counts: Counter[str] = Counter()
    for seed in (41, 214, 405, 733, 793, 880, 888, 942, 1213, 1219, 1228, 1377, 1443):
        for noisy in (False, True):
            outcome = simulate(Plan(seed, "storm", noisy), on_redis, REAL)
            assert not outcome.problem, outcome.report()
            counts += outcome.counts
    assert counts["contradicted"] > 0


@pytest.mark.parametrize("kind", ["crash", "pause"])
def test_production_holds_them_without_checkpoints(kind: str, on_redis: OpenBackend) -> None:
    """`durability: turn`: a client that keeps what it has seen is shown no other reply."""
    counts: Counter[str] = Counter()
    for seed in range(24):
        outcome = simulate(Plan(seed, kind, noisy=seed % 4 > 0), on_redis, HASTY)
        assert not outcome.problem, outcome.report()
        counts += outcome.counts
    assert counts["resumed"] > 0
    assert counts["committed"] > 5 * 24


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(4))
def test_production_holds_them_at_length(chunk: int, on_redis: OpenBackend) -> None:
    counts = hold(range(1000 + chunk * 126, 1000 + (chunk + 1) * 126), on_redis, REAL)
    assert counts["committed"] > 625
    for event in ("lost", "poisoned", "quarantined", "key_reused", "delete", "outage"):
        assert counts[event] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_run(kind: str, on_redis: OpenBackend) -> None:
    plan = Plan(7, kind, noisy=True)
    first, second = simulate(plan, on_redis), simulate(plan, on_redis)
    assert first.trace == second.trace
    assert simulate(plan, on_redis, REAL).trace == simulate(plan, on_redis, REAL).trace
    assert len(first.trace) > 30
    assert simulate(Plan(8, kind, noisy=True), on_redis).trace != first.trace
