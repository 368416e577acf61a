"""Deliberate faults of the protocol: the simulation that finds none of them proves nothing.

The tables are tests/sim/replica_mutants.py and store_mutants.py, with the faults that nobody could
notice and why. Where a fault shows itself with one toy engine only, the other one is tried as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from cluster.conversation import Ownership
from cluster.redis_functions import library_text
from deployments.output_gate import Lane, OutputGate
from deployments.store_watch import StoreWatch
from deployments.turn_begin import TurnBegin
from deployments.turn_claim import TurnClaim
from deployments.turn_task import TurnTask
from engine.turn import TurnEvent
from tests.sim.backends import RedisBackend
from tests.sim.mutants import Mutant
from tests.sim.real_replica import HASTY, REAL
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
            plan, lambda network: RedisBackend(server, network, library), mutant.players
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


async def repair_whatever(task: TurnTask) -> bool:
    """Takes a turn that waits for its claim for one that has been put back."""
    if task._owned is not None:
        await task._owned.repair()
    return True


async def repair_nothing(watch: StoreWatch) -> None:
    """A restart of the store is nobody's business."""


def let_through(gate: OutputGate, lane: Lane, event: TurnEvent) -> None:
    """Shows what the engine says, and stores it later."""
    lane.deliver([event])


@pytest.mark.parametrize(
    ("kind", "where", "name", "fault"),
    [
        ("rollback", TurnTask, "repair", repair_whatever),
        ("rollback", StoreWatch, "_repair_all", repair_nothing),
        ("calm", OutputGate, "put", let_through),
    ],
)
def test_a_fault_of_production_is_noticed(
    kind: str,
    where: type,
    name: str,
    fault: object,
    valkey_server: ValkeyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, fault)
    for seed in range(40):
        plan = Plan(seed, kind, noisy=False)
        outcome = simulate(plan, lambda network: RedisBackend(valkey_server, network), REAL)
        if outcome.problem:
            assert outcome.problem.startswith("Violation"), outcome.report()
            return
    pytest.fail("nobody noticed")


def test_recovery_time_is_not_for_nothing(valkey_server: ValkeyServer) -> None:
    """A recovery window of 0: production's owners come too late with what they know."""
    library = STORE_MUTANTS["no time for recovery"].library(library_text())
    for seed in range(40):
        plan = Plan(seed, "rollback", noisy=False)
        outcome = simulate(
            plan, lambda network: RedisBackend(valkey_server, network, library), REAL
        )
        if outcome.problem:
            assert outcome.problem.startswith("Violation"), outcome.report()
            return
    pytest.fail("nobody noticed")


def test_without_checkpoints_what_was_shown_binds(
    valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`durability: turn`, and a takeover that draws again what the client has seen."""
    claim = TurnBegin.claim

    def unbound(begin: TurnBegin, ownership: Ownership) -> TurnClaim:
        begin._call = replace(begin._call, shown_ids=())
        return claim(begin, ownership)

    monkeypatch.setattr(TurnBegin, "claim", unbound)
    for seed in range(40):
        plan = Plan(seed, "crash", noisy=True)
        outcome = simulate(plan, lambda network: RedisBackend(valkey_server, network), HASTY)
        if outcome.problem:
            assert outcome.problem.startswith("Violation"), outcome.report()
            return
    pytest.fail("nobody noticed")


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
