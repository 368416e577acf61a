"""The GPU part of docs/performance.md, from results of `benchmarks.gpu.run`. Pure: documents in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.bars import evaluate, on
from benchmarks.report import table

Document = Mapping[str, Any]

NOT_MEASURED = (
    "No GPU number has been measured yet: the engines are tested without one (the CUDA engine in Triton's\n"
    "interpreter, TensorRT's graph on ONNX Runtime), and the script that checks and measures them on a card\n"
    "is ready ([how](gpu-measuring.md)):\n\n"
    "```\npython -m benchmarks.gpu.run --help\n```"
)

_TILING = ("block_m", "keys", "splits", "num_warps", "num_stages")

PEERS = {
    "streaming_llm": "StreamingLLM as published",
    "recompute": "sliding window, recomputed",
    "static_compile": "transformers, static cache, compiled",
}


def gpu_part(document: Document) -> str:
    """All tables of one card, each only if its section was measured."""
    device = document["device"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    heading = (
        f"`python -m benchmarks.gpu.run`, {document['date']}, {device['name']}, driver "
        f"{device.get('driver') or 'unknown'}; {versions}. Random weights: speed does not depend on their "
        "values. A step is timed from its plan to the sampled ids on the host."
    )
    lines = [heading]
    sections = document["sections"]
    if "limits/all" in sections:
        lines.append(_limits(sections["limits/all"]))
    for title, rows in (
        ("Bars", list(_bars(sections))),
        ("Against peers, one conversation, interleaved", list(_versus(sections))),
        ("Decode", list(_decode(sections))),
        ("Prefill", list(_prefill(sections))),
        ("Time per token over a conversation's age", list(_age(sections))),
        ("Restoring a cold conversation", list(_restore(sections))),
        ("What a step costs beside the model", list(_overheads(sections))),
        ("Variants of the engine", list(_variants(sections))),
        ("Decode attention, one layer", list(_attention(sections))),
        ("Whether TensorRT-RTX runs on this card", list(_tensorrt(sections))),
        ("TensorRT plans", list(_plans(sections))),
        ("Not measured", list(_missing(document))),
    ):
        if len(rows) > 1:
            lines.append(f"### {title}\n\n{table(rows)}")
    return "\n\n".join(lines)


def results_of(sections: Document, name: str) -> list[Document]:
    """The results of one section, in the order of their measurement."""
    return [result for key, result in sections.items() if key.split("/", 1)[0] == name]


def _limits(found: Document) -> str:
    text = (
        f"Measured limits: copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written), read "
        f"{found['read_bytes_per_s'] / 1e12:.2f} TB/s, bf16 products of {found['matmul_side']} squared "
        f"{found['matmul_operations_per_s'] / 1e12:.0f} TFLOP/s, a launch "
        f"{1e6 * found['launch_eager_s']:.1f} us"
    )
    if "launch_graph_s" in found:
        text += f", in a graph {1e6 * found['launch_graph_s']:.1f} us"
    return text + "."


def _bars(sections: Document) -> Iterator[list[str]]:
    yield ["bar", "point", "measured", "asked", ""]
    for bar in evaluate(sections):
        sign = ">=" if bar.at_least else "<="
        verdict = "pass" if bar.passed else "**missed**"
        yield [bar.name, bar.point, f"{bar.value:.3g}", f"{sign} {bar.bar:g}", verdict]


def _versus(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "peer", "SinkServe tokens/s", "peer tokens/s", "times"]
    for found in results_of(sections, "versus"):
        yield [
            *_names(found),
            PEERS[found["peer"]],
            f"{found['ours']['tokens_per_s']:.1f}",
            f"{found['theirs']['tokens_per_s']:.1f}",
            f"{found['ratio']:.2f}",
        ]


def _decode(sections: Document) -> Iterator[list[str]]:
    yield [
        "model",
        "capacity",
        "weights",
        "batch",
        "ms (p10-p90)",
        "tokens/s",
        "limit, ms",
        "share",
    ]
    for found in results_of(sections, "decode"):
        start = [*_names(found), found["weight_format"]]
        for row in found["points"]:
            yield [
                *start,
                str(row["batch"]),
                _milliseconds(row),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['limit_ms']:.2f} ({row['bound']})",
                f"{row['of_roofline']:.0%}",
            ]
        for row in found["skipped"]:
            yield [*start, str(row["batch"]), row["reason"], "", "", ""]


def _prefill(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "chunk", "ms (p10-p90)", "tokens/s", "share of the matmul rate"]
    for found in results_of(sections, "prefill"):
        yield [
            *_names(found),
            str(found["chunk"]),
            _milliseconds(found),
            f"{found['tokens_per_s']:,.0f}",
            f"{found['of_matmul_rate']:.0%}",
        ]


def _age(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "age, tokens", "ms (p10-p90)", "largest gap"]
    for found in results_of(sections, "age"):
        for row in found["ages"]:
            gap = f"{found['spread']:.1%}" if row is found["ages"][-1] else ""
            yield [*_names(found), f"{row['age']:,}", _milliseconds(row), gap]


def _restore(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "way", "ms (p10-p90)"]
    for found in results_of(sections, "restore"):
        for row in found["replay"]:
            yield [*_names(found), f"replay of {row['windows']} windows", _milliseconds(row)]
        for name, row in found["copy"].items():
            way = {"save": "to", "restore": "from"}[name]
            label = f"copy {way} host memory, {found['slot_bytes'] / 2**20:,.0f} MiB"
            yield [*_names(found), label, _milliseconds(row)]


def _overheads(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "batch", "step", "ms (p10-p90)"]
    for found in results_of(sections, "overheads"):
        for one in found["batches"]:
            start = [*_names(found), str(one["batch"])]
            for name, row in one["sampling"].items():
                yield [*start, name, _milliseconds(row)]
            if "without_graphs" in one:
                yield [*start, "greedy, without CUDA graphs", _milliseconds(one["without_graphs"])]


def _variants(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "kernels", "early launch", "batch", "ms (p10-p90)"]
    for found in results_of(sections, "variant"):
        kernels = "measured" if found["tune"] else "by rule"
        start = [*_names(found), kernels, "yes" if found["overlap"] else "no"]
        for row in found["batches"]:
            yield [*start, str(row["batch"]), _milliseconds(row)]


def _attention(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "batch", "limit, ms", "ours, ms", "best tried, ms", "its tiling"]
    for found in results_of(sections, "attention"):
        for row in found["attention"]:
            own, best = row["own"], row["best"]
            tiling = {name: best[name] for name in _TILING} if best else {}
            yield [
                *_names(found),
                str(row["batch"]),
                f"{row['limit_ms']:.4f}",
                f"{own['ms']:.4f}" if "ms" in own else "refused or wrong",
                f"{best['ms']:.4f}" if best else "",
                ", ".join(f"{name} {value}" for name, value in tiling.items()),
            ]


def _tensorrt(sections: Document) -> Iterator[list[str]]:
    yield ["plan built", "bytes", "valid here", "opens", "right result", "what the library says"]
    for found in results_of(sections, "tensorrt_sm90"):
        for plan in found["plans"]:
            said = [*plan.get("said", ()), *(plan[k] for k in ("raised", "ended") if k in plan)]
            yield [
                plan["way"],
                "none" if plan.get("plan_bytes") is None else str(plan["plan_bytes"]),
                str(plan.get("valid", "")).removeprefix("EngineValidity."),
                _yes(plan.get("opens")),
                _yes(plan.get("right")),
                " ".join("; ".join(said).replace("|", "/").split()),
            ]


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _plans(sections: Document) -> Iterator[list[str]]:
    yield ["model", "capacity", "section", "plan for", "plan, MB", "built in s", "opened in s"]
    for key, found in sections.items():
        if "plan" not in found:
            continue
        plan = found["plan"]
        size = f"{plan['plan_bytes'] / 1e6:.1f}"
        times = [f"{plan['build_s']:.0f}", f"{plan['open_s']:.1f}"]
        yield [*_names(found), key.split("/", 1)[0], plan["plan_for"], size, *times]


def _missing(document: Document) -> Iterator[list[str]]:
    yield ["what", "why"]
    for kind in ("failed", "skipped"):
        for key, reason in document[kind].items():
            yield [key, str(reason).replace("|", "/")]


def _names(found: Document) -> Sequence[str]:
    return [f"{found['model']}{on(found)}", str(found["capacity"])]


def _milliseconds(row: Document) -> str:
    return f"{row['ms']:.3f} ({row['ms_p10']:.3f}-{row['ms_p90']:.3f})"
