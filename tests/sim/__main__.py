"""Run seeds by hand:  python -m tests.sim 17 [--to 40] [--store redis|memory] [--trace]"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.sim.backends import MemoryBackend, RedisBackend
from tests.sim.real_replica import REAL
from tests.sim.world import SMALL, OpenBackend, Outcome, Plan, simulate
from tests.valkey_fixture import start_valkey

MAX_FAILURES = 8


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--to", type=int, help="run all seeds from SEED up to this one")
    parser.add_argument("--store", choices=("redis", "memory"), default="redis")
    parser.add_argument("--real", action="store_true", help="production's replica")
    parser.add_argument("--trace", action="store_true", help="print the trace of every run")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.store == "memory":
        return _run(args, MemoryBackend)
    folder = Path(tempfile.mkdtemp(prefix="ss-sim-"))
    server = start_valkey(folder)
    try:
        return _run(args, lambda network: RedisBackend(server, network))
    finally:
        server.process.kill()
        server.process.wait()
        shutil.rmtree(folder)


def _run(args: argparse.Namespace, open_backend: OpenBackend) -> int:
    began_s = time.perf_counter()
    counts: Counter[str] = Counter()
    failed: list[Outcome] = []
    for seed in range(args.seed, (args.to or args.seed) + 1):
        outcome = simulate(Plan.of(seed), open_backend, REAL if args.real else SMALL)
        counts += outcome.counts
        if args.trace or (outcome.problem and not failed):
            print("\n".join(outcome.trace))
        if outcome.problem:
            failed.append(outcome)
            print(f"seed {seed}, {outcome.plan.kind}: {outcome.problem}")
        if len(failed) == MAX_FAILURES:
            break
    print(f"{len(failed)} failed; {dict(counts)}; {time.perf_counter() - began_s:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
