"""A cold cache copied back from host memory against rebuilding it by replay, on the CPU engine.

    python -m benchmarks.host_tier [--model DIR] [--threads N] [--record]

Prints the time of either, and the cross-over: how many replayed tokens cost as much as one copy. On a CPU
the copy stays in one memory; on a GPU it crosses PCIe, and benchmarks/gpu measures that.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import report
from engine.onnx_engine import OnnxEngine
from engine.protocol import Row, SlotCopy, StepPlan
from engine.window import SinkWindow
from engine_build.demo import ensure_demo_engine
from engine_build.files import sinkserve_home
from engine_build.manifest import load_engine_spec

WINDOWS = (1, 2, 4)
SINK_TOKENS = 4
COPIES = 40


def replay_s(engine: OnnxEngine, window: SinkWindow, windows: int) -> float:
    """Seconds to run the sinks and the last `windows` windows of a long conversation into kv_slot 0."""
    rng = np.random.default_rng(0)
    vocab, chunk = engine.spec.model.vocab_size, engine.spec.max_chunk
    end = 10 * window.window_tokens
    start = end - windows * window.window_tokens
    places = [(0, SINK_TOKENS)]
    places += [(at, min(at + chunk, end)) for at in range(start, end, chunk)]
    began_s = time.perf_counter()
    for begin, stop in places:
        tokens = rng.integers(0, vocab, stop - begin).astype(np.int32)
        engine.step(StepPlan((Row(0, begin, tokens, window, start),)))
    return time.perf_counter() - began_s


def copy_s(engine: OnnxEngine, direction: str) -> list[float]:
    """Seconds of single copies, after one that touches the memory."""
    copy = SlotCopy("save" if direction == "save" else "restore", 0, 0)
    times = []
    for _ in range(COPIES + 1):
        began_s = time.perf_counter()
        engine.step(StepPlan((), (copy,)))
        times.append(time.perf_counter() - began_s)
    return times[1:]


def measure(engine_dir: Path, threads: int, rounds: int) -> dict[str, Any]:
    spec = load_engine_spec(engine_dir, None)
    slot = spec.slot_bytes
    engine = OnnxEngine(
        engine_dir, memory_budget_bytes=slot, threads=threads, host_memory_bytes=slot
    )
    window = SinkWindow(SINK_TOKENS, spec.capacity - SINK_TOKENS, spec.slot_tokens - SINK_TOKENS)
    replay_s(engine, window, 1)
    replays = {
        windows: report.median([replay_s(engine, window, windows) for _ in range(rounds)])
        for windows in WINDOWS
    }
    save, restore = (report.median(copy_s(engine, one)) for one in ("save", "restore"))
    engine.close()
    most = max(WINDOWS)
    per_token_s = replays[most] / (SINK_TOKENS + most * window.window_tokens)
    return {
        "capacity": spec.capacity,
        "slot_mib": slot / 2**20,
        "threads": threads,
        "rounds": rounds,
        "save_ms": 1e3 * save,
        "restore_ms": 1e3 * restore,
        "replay_ms": {str(windows): 1e3 * seconds for windows, seconds in replays.items()},
        "cross_over_tokens": (save + restore) / per_token_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--model", type=Path, help="an engine directory; the demo engine if left out"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="save JSON")
    options = parser.parse_args()
    engine_dir = options.model or ensure_demo_engine(sinkserve_home())
    found = measure(engine_dir, options.threads, options.rounds)
    console = Console()
    rows = [["to have the cache again", "ms"]]
    rows.append([f"copied back ({found['slot_mib']:.1f} MiB)", f"{found['restore_ms']:.2f}"])
    rows.append(["(copied away, once)", f"{found['save_ms']:.2f}"])
    rows += [[f"replay of {n} windows", f"{found['replay_ms'][str(n)]:.0f}"] for n in WINDOWS]
    console.print(report.table(rows))
    console.print(f"both copies cost as much as {found['cross_over_tokens']:.0f} replayed tokens")
    if options.record:
        console.print(report.save("host_tier", found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
