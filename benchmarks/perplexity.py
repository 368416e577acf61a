"""What the sinks are for: perplexity of one long text, streamed through the engine in constant memory.

    python -m benchmarks.perplexity        # float32 and int8, about 10 minutes on two idle cores
    python -m benchmarks.perplexity --weights int8 --tokens 12000

Every token of the text is predicted once, in order, by

- sinks: the first S tokens and the most recent ones, `capacity` in all (StreamingLLM);
- no sinks: the most recent `capacity` tokens alone;
- dense: all tokens so far, as a plain transformer does (its memory grows with the text).

All three are the same engine: only the window differs (S = 0, or a capacity that holds everything).
Perplexities are over the whole text, over what follows the largest window, and over its last quarter.
The int8 engine must come within 1% of float32 in the same run, in the windows that are served (no
conversation goes without sinks: that row is shown for what it is).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from benchmarks.report import machine, save, table
from benchmarks.text_corpus import KING_JAMES, read_corpus
from engine.onnx_engine import OnnxEngine
from engine.protocol import Logits, Row, StepPlan, TokenIds
from engine.window import SinkWindow
from engine_build.build import BuildOptions
from engine_build.demo import ensure_demo_engine
from engine_build.files import sinkserve_home
from engine_build.manifest import load_engine_spec
from engine_build.spec import WeightFormat

INT8_BAR = 0.01
BLOCK = 1000

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """One way to bound the cache: `sinks` first tokens and the most recent, `capacity` in all."""

    kind: str
    sinks: int
    capacity: int


def windows(capacities: Sequence[int], sinks: int, tokens: int) -> list[Window]:
    """What is measured, the quickest first."""
    bounded = [
        Window(kind, count, capacity)
        for capacity in capacities
        for kind, count in (("sinks", sinks), ("no sinks", 0))
    ]
    return [*bounded, Window("dense", 0, tokens)]


def stream(engine_dir: Path, window: Window, tokens: TokenIds, threads: int, label: str) -> Losses:
    """Negative log-likelihood (nats) of tokens 1, 2, ... given those before them: float64 [n - 1]."""
    # The model may be taken past the length it was trained for: that is what dense shows.
    spec = dataclasses.replace(load_engine_spec(engine_dir), capacity=window.capacity)
    engine = OnnxEngine(
        engine_dir,
        memory_budget_bytes=spec.slot_bytes,
        threads=threads,
        capacity=window.capacity,
    )
    recent, ring = window.capacity - window.sinks, spec.slot_tokens - window.sinks
    sink_window = SinkWindow(window.sinks, recent, ring)
    losses = np.zeros(len(tokens) - 1)
    started = time.monotonic()
    for start in range(0, len(losses), spec.max_chunk):
        chunk = tokens[start : min(start + spec.max_chunk, len(losses))]
        row = Row(kv_slot=0, start=start, tokens=chunk, window=sink_window, logits="all")
        logits = engine.step(StepPlan((row,))).rows[0].logits
        if logits is None:
            raise RuntimeError("the engine returned no logits")
        end = start + len(chunk)
        losses[start:end] = _losses(logits, tokens[start + 1 : end + 1])
        speed = end / (time.monotonic() - started)
        _progress(f"{label}: {end}/{len(losses)} tokens, {speed:.0f}/s", losses[:end])
    engine.close()
    print(file=sys.stderr)
    return losses


def _losses(logits: Logits, targets: TokenIds) -> Losses:
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    picked: Losses = total - logits[np.arange(len(targets)), targets]
    return picked


def perplexity(losses: Losses) -> float:
    """exp of the mean loss; nan for none."""
    return math.exp(losses.mean()) if len(losses) else math.nan


def _progress(text: str, losses: Losses) -> None:
    print(f"\r{text}, perplexity {perplexity(losses):.2f}   ", end="", file=sys.stderr, flush=True)


def _summary(window: Window, weights: str, losses: Losses, after: int) -> dict[str, Any]:
    return {
        "weights": weights,
        "window": window.kind,
        "sink_tokens": window.sinks,
        "capacity": window.capacity,
        "perplexity": perplexity(losses),
        "perplexity_after_largest_window": perplexity(losses[after:]),
        "perplexity_last_quarter": perplexity(losses[-(len(losses) // 4) :]),
        "perplexity_per_1000_tokens": [
            perplexity(losses[start : start + BLOCK]) for start in range(0, len(losses), BLOCK)
        ],
    }


def _print(results: Sequence[dict[str, Any]], after: int) -> None:
    rows = [["weights", "cache", "tokens held", "whole text", f"after {after}", "last quarter"]]
    keys = ("perplexity", "perplexity_after_largest_window", "perplexity_last_quarter")
    for result in results:
        held = "all" if result["window"] == "dense" else str(result["capacity"])
        figures = [f"{result[key]:.2f}" for key in keys]
        rows.append([result["weights"], result["window"], held, *figures])
    print(table(rows))


def compare_int8(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """int8 over float32 perplexity, window by window, where both were run."""
    found = {
        (result["window"], result["capacity"], result["weights"]): result["perplexity"]
        for result in results
    }
    return [
        {"window": kind, "capacity": capacity, "ratio": value / found[kind, capacity, "float32"]}
        for (kind, capacity, weights), value in found.items()
        if weights == "int8" and (kind, capacity, "float32") in found
    ]


def main() -> int:
    """Stream the text through every window and write the JSON; 1 if int8 misses its bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=10_240, help="length of text (default 10240)")
    parser.add_argument("--capacity", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--weights", choices=["int8", "float32", "both"], default="both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-dense", action="store_true", help="leave out the growing cache")
    options = parser.parse_args()
    home = sinkserve_home()
    formats: list[WeightFormat] = ["float32", "int8"]
    if options.weights != "both":
        formats = [options.weights]
    text = read_corpus(home)
    print(f"{machine()}; {KING_JAMES.name} ({KING_JAMES.licence})", file=sys.stderr)
    after = max(options.capacity)
    results: list[dict[str, Any]] = []
    for weights in formats:
        engine_dir = ensure_demo_engine(home, BuildOptions(weight_format=weights))
        tokenizer: Tokenizer = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
        ids = tokenizer.encode(text[: options.tokens * 12], add_special_tokens=False).ids
        tokens = np.asarray(ids[: options.tokens + 1], dtype=np.int32)
        for window in windows(options.capacity, options.sinks, len(tokens)):
            if window.kind == "dense" and options.no_dense:
                continue
            label = f"{weights} {window.kind} {window.capacity}"
            losses = stream(engine_dir, window, tokens, options.threads, label)
            results.append(_summary(window, weights, losses, after))
    _print(results, after)
    ratios = compare_int8(results)
    for one in ratios:
        verdict = "within" if abs(one["ratio"] - 1) <= INT8_BAR else "NOT WITHIN"
        print(
            f"int8 / float32, {one['window']} {one['capacity']}: {one['ratio']:.4f} ({verdict} 1%)"
        )
    document = {
        "model": "SmolLM2-135M-Instruct",
        "corpus": dataclasses.asdict(KING_JAMES),
        "tokens": options.tokens,
        "results": results,
        "int8_over_float32": ratios,
    }
    print(f"\nwritten: {save('perplexity', document)}")
    return 0 if all(_is_close(one) for one in ratios if one["window"] != "no sinks") else 1


def _is_close(one: dict[str, Any]) -> bool:
    return abs(float(one["ratio"]) - 1) <= INT8_BAR


if __name__ == "__main__":
    sys.exit(main())
