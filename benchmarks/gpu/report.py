"""docs/performance.md and the plots, from what is in benchmarks/results/.

    python -m benchmarks.gpu.report            # write docs/performance.md and docs/gpu-*.png
    python -m benchmarks.gpu.report --check    # say whether docs/performance.md is up to date

Of several results of one benchmark (one card, for GPUs) the newest counts. Runs anywhere; only drawing
needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cpu_tables import cpu_part
from benchmarks.gpu.gpu_tables import NOT_MEASURED, gpu_part
from benchmarks.gpu.plots import SECTIONS_DRAWN, draw
from benchmarks.report import RESULTS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = "performance.md"
_ORIGIN = (
    "Written by `python -m benchmarks.gpu.report` from `benchmarks/results/`; no figure here was typed in.\n"
    "What they mean is in the [README](../README.md#measured)."
)


def page(results: Path, plots: Mapping[str, Sequence[str]]) -> str:
    """The text of docs/performance.md. `plots`: names of image files for each GPU result's stem."""
    documents = newest(results)
    lines = ["# Performance", _ORIGIN, "## GPU"]
    cards = {stem: found for stem, found in documents.items() if found["benchmark"] == "gpu"}
    if not cards:
        lines.append(NOT_MEASURED)
    for stem, found in cards.items():
        lines.append(gpu_part(found))
        lines.extend(f"![{name}]({name})" for name in plots.get(stem, ()))
    others = {name: found for name, found in documents.items() if name not in cards}
    if "cpu_engine" in others:
        others["cpu_engine-parts"] = others["cpu_engine"]
    lines += ["## CPU", cpu_part(others)]
    return "\n\n".join(lines) + "\n"


def newest(results: Path) -> dict[str, dict[str, Any]]:
    """The newest document of each file name without its date, by that name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(results.glob("*-????-??-??.json")):
        found[path.stem[: -len("-0000-00-00")]] = json.loads(path.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    path: Path = options.docs / PAGE
    cards = {s: d for s, d in newest(options.results).items() if d["benchmark"] == "gpu"}
    if options.check:
        there = {stem: _plots_there(options.docs, stem) for stem in cards}
        if path.exists() and path.read_text() == page(options.results, there):
            return 0
        print(f"{path} is not up to date: python -m benchmarks.gpu.report", file=sys.stderr)
        return 1
    drawn = {s: [p.name for p in draw(d, options.docs, s)] for s, d in cards.items()}
    path.write_text(page(options.results, drawn))
    print(f"written: {path}")
    return 0


def _plots_there(docs: Path, stem: str) -> list[str]:
    """In the order in which they are drawn."""
    names = [f"{stem}-{section}.png" for section in SECTIONS_DRAWN]
    return [name for name in names if (docs / name).exists()]


if __name__ == "__main__":
    sys.exit(main())
