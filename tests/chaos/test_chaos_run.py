"""The chaos run itself, small: a process of its own, for it is a driver of its own cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]

REPO = Path(__file__).resolve().parent.parent.parent
CLEAN = {
    "conversations_lost",
    "turns_lost",
    "turns_duplicated",
    "tokens_missing",
    "tokens_repeated",
    "tokens_contradicted",
    "records_wrong",
}


def verdict(*arguments: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--seed", "7", "--clients", "3", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert "processes left behind" not in ran.stdout
    start = ran.stdout.find("\n{\n")
    assert start >= 0, ran.stdout + ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout[start:])
    assert not found["did_not_happen"], ran.stdout
    return found


def test_kills_and_a_restart_of_the_store_go_unnoticed_and_the_control_does_not() -> None:
    found = verdict("--faults", "replica", "store_restart", "proxy", "--kills", "3")
    assert {name: found["violations"][name] for name in CLEAN} == dict.fromkeys(CLEAN, 0)
    assert found["faults"]["replica"]["happened"]["killed"] == 3
    assert found["faults"]["replica"]["attempts_that_broke"] == {}
    assert found["controls_without_complaint"] == []
