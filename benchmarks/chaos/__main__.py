"""Kill everything that can be killed, under clients that log every byte, and say what they saw.

    python -m benchmarks.chaos                                every fault and its control
    python -m benchmarks.chaos --faults replica --kills 5     one of them
    python -m benchmarks.chaos --record                       also writes results/chaos-DATE.json

A Ray cluster of five nodes runs on this machine, with a toy engine whose every reply can be computed
from the requests alone. Nothing of it outlives the run. Ray's complaints about dead workers go to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from benchmarks import report
from benchmarks.chaos import faults
from benchmarks.chaos.client import ClientOptions
from benchmarks.chaos.controls import Control, controls
from benchmarks.chaos.rig import DEMO_FIELDS, FIELDS, NotHappened, Rig
from benchmarks.chaos.stage import Episode, Fault, run_episode
from benchmarks.chaos.workload import Scale
from deployments.config import DEMO_MODEL, TOY_MODEL

Json = dict[str, Any]

GAP_BAR_S = 3.0
PATIENCE_S = 90.0
CONTROL_PATIENCE_S = 20.0
ENGINES = {"toy": (TOY_MODEL, 128), "demo": (DEMO_MODEL, 60)}
"""Model and longest turn, tokens."""


def all_faults(kills: int) -> dict[str, Fault]:
    """In the order of the run; the head comes last."""
    found: list[Fault] = [
        faults.Calm(),
        faults.ReplicaKills(kills),
        faults.RankKill(),
        faults.ReplicaStop(),
        faults.NodeKill(),
        faults.ControllerKill(),
        faults.FrontKill("proxy"),
        faults.FrontKill("ingress"),
        faults.StoreRestart(),
        faults.StoreRollback(),
        faults.Redeploy(),
        faults.Poison(),
        faults.HeadKill(),
    ]
    return {fault.name: fault for fault in found}


DEPLOYED_WITH: dict[str, Json] = {"rank": {"has_ranks": True}}
"""Faults that need another deployment than the rest."""


@dataclass(slots=True)
class Run:
    """Options and what has come of them so far."""

    scale: Scale
    say: Callable[[str], None]
    model: str = TOY_MODEL
    logs: Path | None = None
    durability: str = "token"
    episodes: dict[str, Episode] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    complaints: dict[str, Json] = field(default_factory=dict)

    def fault(self, rig: Rig, fault: Fault) -> None:
        """With every safeguard on."""
        self.say(f"{fault.name} ...")
        options = ClientOptions(rig.url, PATIENCE_S, model=self.model)
        try:
            episode = asyncio.run(run_episode(rig, fault, options, self.scale))
        except NotHappened as error:
            self.failed[fault.name] = str(error)
            self.say(f"{fault.name}: did not happen: {error}")
            return
        self.episodes[fault.name] = episode
        worst = max(episode.gaps_s, default=0.0)
        self.say(
            f"{fault.name}: {episode.turns} turns, longest gap {worst:.1f} s, "
            f"{episode.violations.total} violations"
        )
        for note in episode.violations.notes[:5]:
            self.say(f"    {note}")

    def control(self, rig: Rig, name: str, control: Control) -> None:
        """With a safeguard off: the checker must complain."""
        self.say(f"control of {name}, without {control.without} ...")
        options = ClientOptions(
            rig.url, CONTROL_PATIENCE_S, sends_key=control.client_sends_key, model=self.model
        )
        found: Json
        happened: Json = {}
        try:
            episode = asyncio.run(run_episode(rig, control.fault, options, self.scale))
            found = {name: n for name, n in episode.violations.counts().items() if n}
            happened = episode.evidence
        except NotHappened as error:
            # The cluster did not come back, or the fault's own check failed.
            found = {"did_not_recover": str(error)}
        self.complaints[name] = {
            "without": control.without,
            "happened": happened,
            "complaints": found,
        }
        self.say(f"control of {name}: {found or 'NO COMPLAINT'}")

    def verdict(self, options: Json) -> Json:
        """One JSON for everything."""
        counts: dict[str, int] = {}
        for episode in self.episodes.values():
            for name, count in episode.violations.counts().items():
                counts[name] = counts.get(name, 0) + count
        killed = self.episodes.get("replica")
        beyond_s = (
            [gap - restore for gap, restore in zip(killed.gaps_s, killed.restores_s, strict=True)]
            if killed
            else []
        )
        gap_p95_s = report.percentile(beyond_s, 95) if beyond_s else None
        silent = [name for name, one in self.complaints.items() if not one["complaints"]]
        passed = not self.failed and not any(counts.values()) and not silent
        passed = passed and (gap_p95_s is None or gap_p95_s <= GAP_BAR_S)
        return {
            "passed": passed,
            "violations": counts,
            "conversations": sum(one.conversations for one in self.episodes.values()),
            "turns": sum(one.turns for one in self.episodes.values()),
            "replica_gap_beyond_restore_p95_s": gap_p95_s,
            "bar_s": GAP_BAR_S,
            "faults": {name: one.as_json() for name, one in self.episodes.items()},
            "did_not_happen": self.failed,
            "controls": self.complaints,
            "controls_without_complaint": silent,
            "options": options,
            "ray": ray.__version__,
        }


def run(state: Run, kills: int, names: Sequence[str], with_controls: bool) -> None:
    """Faults, then controls, then the head, then controls that need a cluster of their own."""
    wanted = {name: one for name, one in all_faults(kills).items() if name in names}
    chosen = {name: one for name, one in controls().items() if name in wanted and with_controls}
    # Those of one deployment one after the other; what is deployed already first.
    shared = sorted((one for one in chosen.items() if one[1].keeps_gcs), key=lambda one: one[1].off)
    with started(state) as rig:
        for name, fault in wanted.items():
            if name != "head" and name not in DEPLOYED_WITH:
                state.fault(rig, fault)
        for name in sorted(wanted.keys() & DEPLOYED_WITH.keys()):
            rig.deploy(DEPLOYED_WITH[name])
            state.fault(rig, wanted[name])
        for name, control in shared:
            rig.deploy({**control.fields, "switched_off": list(control.off)})
            state.control(rig, name, control)
        if "head" in wanted:
            rig.deploy()
            state.fault(rig, wanted["head"])
    for name, control in chosen.items():
        if not control.keeps_gcs:
            with started(state, keeps_gcs=False) as rig:
                state.control(rig, name, control)


@contextlib.contextmanager
def started(state: Run, keeps_gcs: bool = True) -> Iterator[Rig]:
    """A cluster with the service on it, and none of its processes afterwards."""
    state.say("starting a cluster ...")
    fields = {**(FIELDS if state.model == TOY_MODEL else DEMO_FIELDS)}
    fields["durability"] = state.durability
    with Rig(keeps_gcs=keeps_gcs, fields=fields, logs=state.logs) as rig:
        rig.deploy()
        state.say(f"{rig.num_replicas} replicas are up")
        yield rig
    left = rig.stragglers()
    if left:
        state.say(f"processes left behind: {[one.pid for one in left]}")


def main() -> int:
    names = list(all_faults(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--faults", nargs="+", choices=names, default=names, metavar="FAULT", help=" ".join(names)
    )
    parser.add_argument("--kills", type=int, default=30, help="of replicas")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--engine", choices=ENGINES, default="toy")
    parser.add_argument("--durability", choices=("token", "turn"), default="token")
    parser.add_argument("--no-controls", dest="controls", action="store_false")
    parser.add_argument("--logs", type=Path, help="folder that gets Serve's logs")
    parser.add_argument("--record", action="store_true", help="save the verdict")
    args = parser.parse_args()
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {text}", flush=True)

    model, max_tokens = ENGINES[args.engine]
    state = Run(Scale(args.clients, max_tokens, args.seed), say, model, args.logs, args.durability)
    try:
        # Every control needs the oracle.
        run(state, args.kills, args.faults, args.controls and model == TOY_MODEL)
    except Exception:
        traceback.print_exc()
        state.failed["run"] = "it ended early; see stderr"
    options = {
        name: vars(args)[name] for name in ("engine", "durability", "kills", "clients", "seed")
    }
    verdict = state.verdict(options)
    verdict["lasted_s"] = round(time.monotonic() - started_s)
    print(json.dumps(verdict, indent=2))
    if args.record:
        print(report.save("chaos" if model == TOY_MODEL else "chaos-demo", verdict))
    return 0 if verdict["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
