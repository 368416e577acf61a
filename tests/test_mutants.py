"""Deliberate faults of the protocol: the simulation that finds none of them proves nothing.

The tables are tests/sim/replica_mutants.py and store_mutants.py, with the faults that nobody could
notice and why. Where a fault shows itself with one toy engine only, the other one is tried as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import pytest

from cluster.redis_functions import library_text
from tests.sim.backends import RedisBackend
from tests.sim.mutants import Mutant
from tests.sim.replica_mutants import REPLICA_MUTANTS
from tests.sim.store_mutants import STORE_MUTANTS
from tests.sim.world import Outcome, Plan, simulate
from tests.valkey_fixture import ValkeyServer


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def first_kill(mutant: Mutant, plans: Iterable[Plan], server: ValkeyServer) -> Outcome | None:
    """The run that notices the fault."""
    library = mutant.library(library_text())
    for plan in plans:
        outcome = simulate(
            plan, lambda network: RedisBackend(server, network, library), mutant.make
        )
        if outcome.problem:
            return outcome
    return None


@pytest.mark.parametrize("name", [*REPLICA_MUTANTS, *STORE_MUTANTS])
def test_a_fault_is_noticed(name: str, valkey_server: ValkeyServer) -> None:
    mutant = (REPLICA_MUTANTS | STORE_MUTANTS)[name]
    outcome = first_kill(mutant, mutant.plans(), valkey_server)
    assert outcome is not None, f"{name}: nobody noticed"
    # By a broken promise, or by code that refuses what cannot be.
    assert outcome.problem.startswith(("Violation", "ValueError")), outcome.report()


def test_one_toy_is_not_enough(valkey_server: ValkeyServer) -> None:
    """Who draws a lost token again draws the same one, if tokens do not depend on who draws."""
    mutant = REPLICA_MUTANTS["forgets the stored output"]
    plans = list(mutant.plans(noisy=False))[:5]
    assert first_kill(mutant, plans, valkey_server) is None
    assert first_kill(mutant, mutant.plans(noisy=True), valkey_server) is not None
    # And who draws other numbers is noticed by recomputation, which needs the deterministic one.
    mutant = REPLICA_MUTANTS["draws a new seed at takeover"]
    assert first_kill(mutant, mutant.plans(noisy=True), valkey_server) is None
    assert first_kill(mutant, mutant.plans(noisy=False), valkey_server) is not None
