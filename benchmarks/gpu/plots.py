"""A plot for each section of a GPU run. Needs matplotlib, so it runs after the measurement, anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.bars import on
from benchmarks.gpu.gpu_tables import PEERS, results_of

Document = Mapping[str, Any]


def draw(document: Document, folder: Path, stem: str) -> list[Path]:
    """Write FOLDER/STEM-SECTION.png for every section that was measured; returns the paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in _PLOTS.items():
        found = results_of(document["sections"], name)
        if not found:
            continue
        figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
        plot(axes, found)
        axes.set_title(f"{axes.get_title()}\n{document['device']['name']}, {document['date']}")
        axes.grid(visible=True, alpha=0.3)
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        written.append(path)
    return written


def _decode(axes: Any, results: list[Document]) -> None:
    for found in results:
        label = f"{found['model']}{on(found)} at {found['capacity']}, {found['weight_format']}"
        batches = [row["batch"] for row in found["points"]]
        (line,) = axes.plot(
            batches, [row["tokens_per_s"] for row in found["points"]], "o-", label=label
        )
        limits = [1e3 * row["batch"] / row["limit_ms"] for row in found["points"]]
        axes.plot(batches, limits, "--", color=line.get_color(), alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="conversations in a step", ylabel="tokens/s")
    axes.set_title("Decode (dashed: roofline)")
    axes.legend(fontsize=7)


def _prefill(axes: Any, results: list[Document]) -> None:
    names = [f"{found['model']}{on(found)}\nat {found['capacity']}" for found in results]
    axes.bar(names, [100 * found["of_matmul_rate"] for found in results])
    axes.axhline(60, color="black", linestyle="--")
    axes.set(ylabel="% of the measured matmul rate")
    axes.set_title("Prefill (dashed: the bar)")


def _age(axes: Any, results: list[Document]) -> None:
    for found in results:
        label = f"{found['model']}{on(found)} at {found['capacity']}"
        ages = [row["age"] for row in found["ages"]]
        axes.plot(ages, [row["ms"] for row in found["ages"]], "o-", label=label)
    axes.set(xscale="log", xlabel="age of the conversation, tokens", ylabel="ms a token")
    axes.set_ylim(bottom=0)
    axes.set_title("Time per token")
    axes.legend(fontsize=8)


def _versus(axes: Any, results: list[Document]) -> None:
    names = [
        f"{PEERS[found['peer']]}\n{found['model']}{on(found)} at {found['capacity']}"
        for found in results
    ]
    places = range(len(names))
    for offset, side, label in ((-0.2, "ours", "SinkServe"), (0.2, "theirs", "peer")):
        rates = [found[side]["tokens_per_s"] for found in results]
        axes.barh([place + offset for place in places], rates, 0.4, label=label)
    axes.set_yticks(list(places), names, fontsize=7)
    axes.set(xlabel="tokens/s, one conversation")
    axes.set_title("Against peers")
    axes.legend()


def _restore(axes: Any, results: list[Document]) -> None:
    for found in results:
        windows = [row["windows"] for row in found["replay"]]
        label = f"{found['model']}{on(found)} at {found['capacity']}"
        (line,) = axes.plot(
            windows, [row["ms"] for row in found["replay"]], "o-", label=f"replay, {label}"
        )
        if found["copy"]:
            copied = found["copy"]["restore"]["ms"]
            axes.axhline(copied, color=line.get_color(), linestyle="--", label=f"copy, {label}")
    axes.set(yscale="log", xlabel="windows replayed", ylabel="ms until restored")
    axes.set_title("Restoring a cold conversation")
    axes.legend(fontsize=8)


def _overheads(axes: Any, results: list[Document]) -> None:
    for found in results:
        for one in found["batches"]:
            rows = {**one["sampling"]}
            if "without_graphs" in one:
                rows["greedy, without CUDA graphs"] = one["without_graphs"]
            label = f"{found['model']}{on(found)}, batch {one['batch']}"
            axes.plot([row["ms"] for row in rows.values()], list(rows), "o", label=label)
    axes.set(xlabel="ms a step")
    axes.set_title("Sampling and launches")
    axes.legend(fontsize=7)


_PLOTS: Mapping[str, Callable[[Any, list[Document]], None]] = {
    "decode": _decode,
    "prefill": _prefill,
    "age": _age,
    "versus": _versus,
    "restore": _restore,
    "overheads": _overheads,
}

SECTIONS_DRAWN = tuple(_PLOTS)
"""In the order in which they are drawn."""
