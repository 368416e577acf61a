"""Replicas come and go under load: what do clients see, and which turns lose their cache?

    python -m benchmarks.autoscaling                       about 6 minutes, three controls included
    python -m benchmarks.autoscaling --only autoscale      Serve scales: load rises, stays, falls silent
    python -m benchmarks.autoscaling --only scale_in       three replicas to two and to one, all streaming
    python -m benchmarks.autoscaling --record              also writes results/autoscaling-DATE.json

On the rig of benchmarks.chaos: real Ray nodes, a toy engine with an oracle for every byte, clients that
log them. A run passes when the checker finds nothing lost, doubled or changed, no client had to send
again, no turn left a replica that could have run it, and when it does complain of each control: Serve's own
routers, and replicas that are given no time to end their turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from benchmarks import report
from benchmarks.chaos.client import ClientOptions
from benchmarks.chaos.rig import FIELDS, NotHappened, Rig
from benchmarks.chaos.scaling import Autoscale, ScaleIn
from benchmarks.chaos.stage import Fault, run_episode
from benchmarks.chaos.workload import Scale

Json = dict[str, Any]

MAX_TOKENS = 128
ROOM = {"memory_budget_bytes": 8 * int(FIELDS["memory_budget_bytes"])}
"""Kv_slots for every conversation on any replica, so that none is evicted."""
AUTOSCALING: Mapping[str, Any] = {
    "min_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 4,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 3.0,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.0,
}
CONSISTENT_HASHING = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
POWER_OF_TWO = "ray.serve._private.request_router.pow_2_router.PowerOfTwoChoicesRequestRouter"


@dataclass(frozen=True, slots=True)
class Case:
    """A fault and how the service is deployed for it; `without` names the safeguard a control lacks."""

    fault: Fault
    fields: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, Any] | None = None
    router: str = ""
    without: str = ""
    patience_s: float = 90.0


def cases(times: int) -> dict[str, list[Case]]:
    """By fault: first as it is, then its controls."""
    # Shorter than a long reply, so that some end where they began and some are handed over.
    hasty: Json = {"drain_s": 1.0}
    off: Json = {**hasty, "switched_off": ["drain", "failover"]}
    plain = Case(Autoscale(), scaling=AUTOSCALING)
    return {
        "autoscale": [
            plain,
            Case(Autoscale(), scaling=AUTOSCALING, router=POWER_OF_TWO, without="affinity (pow-2)"),
            Case(
                Autoscale(),
                scaling=AUTOSCALING,
                router=CONSISTENT_HASHING,
                without="residency (consistent hashing)",
            ),
        ],
        "scale_in": [
            Case(ScaleIn(times), hasty),
            Case(ScaleIn(1), off, without="time to end turns, and failover", patience_s=20.0),
        ],
    }


@dataclass(slots=True)
class Run:
    """What has come of the cases so far."""

    scale: Scale
    say: Callable[[str], None]
    found: dict[str, Json] = field(default_factory=dict)

    def case(self, case: Case) -> None:
        """On a cluster of its own."""
        name = case.fault.name + (f", without {case.without}" if case.without else "")
        self.say(f"{name}: starting a cluster ...")
        own = {key: value for key, value in case.fields.items() if key != "switched_off"}
        with Rig(fields={**FIELDS, **ROOM, **own}) as rig:
            if case.scaling is not None:
                rig.num_replicas = int(case.scaling["min_replicas"])
            switches = {key: case.fields[key] for key in ("switched_off",) if key in case.fields}
            rig.deploy(switches, case.scaling, case.router)
            self.say(f"{name}: clients start")
            options = ClientOptions(rig.url, case.patience_s)
            try:
                episode = asyncio.run(run_episode(rig, case.fault, options, self.scale))
            except NotHappened as error:
                self.found[name] = {"without": case.without, "did_not_happen": str(error)}
                self.say(f"{name}: did not happen: {error}")
                return
        self.found[name] = {"without": case.without, **episode.as_json()}
        self.say(f"{name}: {episode.turns} turns, {episode.violations.total} violations")
        for note in episode.violations.notes[:5]:
            self.say(f"    {note}")

    def verdict(self, options: Json) -> Json:
        """Everything as one JSON. A control passes when it was complained of."""
        silent = [name for name, one in self.found.items() if one["without"] and not _is_bad(one)]
        bad = [name for name, one in self.found.items() if not one["without"] and _is_bad(one)]
        return {
            "passed": bool(self.found) and not silent and not bad,
            "bad": bad,
            "controls_without_complaint": silent,
            "cases": self.found,
            "autoscaling_config": dict(AUTOSCALING),
            "options": options,
            "ray": ray.__version__,
        }


def _is_bad(case: Json) -> bool:
    return "did_not_happen" in case or any(case["violations"].values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(cases(0)), help="one of the two")
    parser.add_argument("--times", type=int, default=4, help="how often scale_in takes replicas")
    parser.add_argument("--clients", type=int, default=5, help="at the start")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--controls", type=int, default=2, help="of each, at most")
    parser.add_argument("--record", action="store_true", help="save the verdict")
    args = parser.parse_args()
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {text}", flush=True)

    state = Run(Scale(args.clients, MAX_TOKENS, args.seed), say)
    for name, (plain, *controls) in cases(args.times).items():
        if args.only in (None, name):
            for case in (plain, *controls[: args.controls]):
                state.case(case)
    options = {name: vars(args)[name] for name in ("times", "clients", "seed")}
    verdict = state.verdict(options)
    verdict["lasted_s"] = round(time.monotonic() - started_s)
    print(json.dumps(verdict, indent=2))
    if args.record:
        print(report.save("autoscaling", verdict))
    return 0 if verdict["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
