"""The CPU part of docs/performance.md, from the other benchmarks' results. Pure: documents in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.report import table

Document = Mapping[str, Any]


def cpu_part(documents: Mapping[str, Document]) -> str:
    """A heading and a table for each benchmark of `documents` (newest of each, by name) that has one here."""
    parts = []
    for name, (title, rows_of) in _TABLES.items():
        found = documents.get(name)
        if found is not None:
            source = f"`python -m benchmarks.{name.split('-', 1)[0]}`"
            where = f"{source}, {found['date']}, {found['machine']}."
            parts.append(f"### {title}\n\n{where}\n\n{table(list(rows_of(found)))}")
    return "\n\n".join(parts)


def _cpu_engine(found: Document) -> Iterator[list[str]]:
    yield ["8-bit SmolLM2-135M, window of 512, full and sliding", "SinkServe", "llama.cpp", "ratio"]
    for one in found["decode_one"]:
        yield [
            f"one conversation, {one['threads']} threads, tokens/s",
            f"{one['sinkserve_tokens_per_s']:.0f}",
            f"{one['llama_cpp_tokens_per_s']:.0f}",
            f"{one['ratio']:.2f}",
        ]
    many = found["decode_many"]
    best = many["llama_best_at"]
    yield [
        f"16 conversations, {many['threads']} threads, tokens/s (llama.cpp at its best, {best} at once)",
        f"{many['tokens_per_s']['ours_16']:.0f}",
        f"{many['tokens_per_s'][f'llama_{best}']:.0f}",
        f"{many['ratio_16_over_best']:.2f}",
    ]
    turn = found["turn"]
    for peer, label in (("llama_cpp", "context shift"), ("llama_server", "llama-server")):
        yield [
            f"first token of a {turn['turn_tokens']}-token turn, ms (llama.cpp: {label})",
            f"{turn['ttft_ms']['ours']:.0f}",
            f"{turn['ttft_ms'][peer]:.0f}",
            f"{turn[f'ratio_to_{peer}']:.2f}",
        ]


def _parts(found: Document) -> Iterator[list[str]]:
    columns = list(found["milliseconds_per_step"])
    yield ["ms of a decode step", *columns]
    for name in found["milliseconds_per_step"][columns[0]]:
        yield [name, *(f"{found['milliseconds_per_step'][c][name]:.2f}" for c in columns)]


def _endurance(found: Document) -> Iterator[list[str]]:
    summary = found["summary"]
    yield ["one conversation over HTTP", ""]
    yield ["turns, tokens", f"{summary['turns']}, {summary['age_tokens']:,}"]
    for name, label in (("ttft_ms", "first token, ms"), ("ms_per_token", "further token, ms")):
        yield [f"{label}, p50 / p99", f"{summary[name]['p50']:.0f} / {summary[name]['p99']:.0f}"]
    growth = summary["growth"]
    for name, label in (
        ("ttft", "time to first token"),
        ("ms_per_token", "time per further token"),
        ("rss", "memory"),
    ):
        yield [f"{label}, last quarter over second", f"{growth[name]:.3f}"]


def _overhead(found: Document) -> Iterator[list[str]]:
    milliseconds = found["milliseconds"]
    yield ["time to first token, ms", "p50", "p99"]
    for name in ("service, whole", "floor, whole", "engine", "store: begin", "store: commit"):
        yield [name, *(f"{milliseconds[name][p]:.1f}" for p in ("p50", "p99"))]
    yield ["added by the service over the floor, times", *_ratios(found["ratio"])]


def _ratios(ratio: Document) -> list[str]:
    return [f"{ratio['p50']:.2f}", f"{ratio['p99']:.2f}"]


def _checkpoint(found: Document) -> Iterator[list[str]]:
    yield ["disk write", "turns at once", "step p50, ms", "step p99, ms", "checkpoints/s"]
    for fsync, rows in found["appendfsync"].items():
        for row in rows:
            yield [
                fsync,
                str(row["batch"]),
                f"{row['step_ms_p50']:.2f}",
                f"{row['step_ms_p99']:.2f}",
                f"{row['checkpoints_per_s']:,.0f}",
            ]


def _affinity(found: Document) -> Iterator[list[str]]:
    yield ["router", "moved off a living owner", "tokens computed again"]
    for name, phases in found["routers"].items():
        moved = sum(phase["moved"] for phase in phases.values())
        again = sum(phase["recomputed_tokens"] for phase in phases.values())
        yield [name, str(moved), f"{again:,}"]


def _perplexity(found: Document) -> Iterator[list[str]]:
    yield ["weights", "kept", "capacity", "perplexity"]
    for row in found["results"]:
        capacity = "all" if row["capacity"] is None else str(row["capacity"])
        yield [row["weights"], row["window"], capacity, f"{row['perplexity']:.2f}"]


_TABLES: Mapping[str, tuple[str, Callable[[Document], Iterator[list[str]]]]] = {
    "cpu_engine": ("CPU engine against llama.cpp", _cpu_engine),
    "cpu_engine-parts": ("Where a step of the CPU engine goes", _parts),
    "endurance": ("An old conversation", _endurance),
    "overhead-toy": ("What the service adds, on an engine that takes no time", _overhead),
    "overhead-smollm2-135m-instruct": ("What the service adds, on the demo model", _overhead),
    "checkpoint": ("Storing every token before it is shown", _checkpoint),
    "affinity": ("Turns through scaling and a kill", _affinity),
    "perplexity": ("Perplexity with a window", _perplexity),
}
