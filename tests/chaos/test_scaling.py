"""The ledger of the scaling runs tells a needless move from a due one; the runs themselves, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.autoscaling import Run
from benchmarks.chaos.client import Attempt, TurnLog
from benchmarks.chaos.oracle import Asked
from benchmarks.chaos.scaling import LAG_S, Ledger, Ran, restored
from benchmarks.chaos.workload import Scale

REPO = Path(__file__).resolve().parent.parent.parent


def ledger(*replicas: str, there: dict[float, set[str]]) -> Ledger:
    """One conversation, a turn a second on each of `replicas` in order."""
    ran = [Ran(float(n), n + 0.5, replica) for n, replica in enumerate(replicas)]
    return Ledger({"c": ran}, [(at_s, frozenset(names)) for at_s, names in there.items()])


BOTH = {"a", "b"}


def test_a_turn_that_could_have_stayed_has_moved() -> None:
    there = {0.0: BOTH, 1.0: BOTH, 2.0: BOTH, 9.0: BOTH}
    assert ledger("a", "a", "b", there=there).changes() == (1, 0)
    assert ledger("a", "b", "a", there=there).changes() == (2, 0)
    assert ledger("a", "a", "a", there=there).changes() == (0, 0)
    assert ledger("a", "b", "b", there=there).changes(since_s=2.0) == (0, 0)


def test_a_turn_whose_replica_went_is_orphaned() -> None:
    # The second turn ends at 1.5 s.
    gone_before = {0.0: BOTH, 0.9: {"b"}}
    gone_during = {0.0: BOTH, 1.2: {"b"}, 3.0: {"b"}}
    gone_later = {0.0: BOTH, 1.5 + LAG_S + 0.1: {"b"}}
    assert ledger("a", "b", there=gone_before).changes() == (0, 1)
    assert ledger("a", "b", there=gone_during).changes() == (0, 1)
    assert ledger("a", "b", there=gone_later).changes() == (1, 0)


def test_a_replica_that_is_back_on_the_list_never_left() -> None:
    assert ledger("a", "b", there={0.0: BOTH, 1.0: {"b"}, 2.0: BOTH}).changes() == (1, 0)


def log(recovery: str, prefill_tokens: int) -> TurnLog:
    done = TurnLog(Asked("x", 5), "key", 0.0, 1.0, [Attempt(0.0, status=200, ending="done")])
    done.finish_reason = "stop"
    sinkserve = {"recovery": recovery, "prefill_tokens": prefill_tokens, "context_tokens": 90}
    done.usage = {"prompt_tokens": 100, "sinkserve": sinkserve}
    return done


def test_what_was_computed_again_is_without_the_turns_own_input() -> None:
    logs = [log("none", 10), log("exact", 100), log("replay", 74)]
    assert restored(logs) == (2, 90 + 64)


CLEAN: dict[str, Any] = {"without": "", "violations": {"turns_lost": 0, "other": 0}}
BAD: dict[str, Any] = {"without": "", "violations": {"turns_lost": 0, "other": 1}}


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        ({"a": CLEAN, "control": {**BAD, "without": "x"}}, True),
        ({"a": BAD}, False),
        ({"a": CLEAN, "control": {**CLEAN, "without": "x"}}, False),
        ({"a": {"without": "", "did_not_happen": "no"}}, False),
        ({}, False),
    ],
)
def test_a_run_passes_when_it_is_clean_and_its_controls_are_not(
    found: dict[str, Any], passes: bool
) -> None:
    run = Run(Scale(), print)
    run.found = found
    assert run.verdict({})["passed"] is passes


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("name", ["scale_in", "autoscale"])
def test_replicas_that_hold_and_stream_are_taken_away_and_no_client_notices(name: str) -> None:
    """With a control each: no time to end turns and no failover; Serve's own router."""
    options = ["--only", name, "--seed", "7", "--times", "2", "--controls", "1"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.autoscaling", *options],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    start = ran.stdout.find("\n{\n")
    assert start >= 0, ran.stdout + ran.stderr[-2000:]
    verdict: dict[str, Any] = json.loads(ran.stdout[start:])
    assert verdict["passed"], ran.stdout
    happened = verdict["cases"][name]["happened"]
    assert happened["moved_off_a_living_owner"] == 0
    assert happened["moved_off_a_removed_replica"] > 0
    if name == "scale_in":
        assert all(one["streams_on_the_removed"] > 0 for one in happened["rounds"])
