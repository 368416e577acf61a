"""How far a cache rebuilt by replay is from the live one, on the demo model in both weight formats.

    python -m benchmarks.measure_replay        # about 40 minutes on two cores
    python -m benchmarks.measure_replay --weights int8 --replies 4

The measurement of `sinkserve measure-replay`; users talk from the King James Bible here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.report import save
from benchmarks.text_corpus import KING_JAMES, read_corpus
from deployments.config import load_config
from deployments.local.measure_replay import (
    MeasureRequest,
    ReplayReport,
    Text,
    measure_model,
    quality_table,
    show_recommendation,
)
from deployments.local.progress import Steps
from deployments.local.replay_plot import draw
from engine.replay_quality import Bar
from engine_build.files import sinkserve_home

PLOT = Path(__file__).parent.parent / "docs" / "replay.png"


def measured(weights: str, options: argparse.Namespace, console: Console) -> ReplayReport:
    config = load_config({"weight_format": weights, "capacity": options.capacity})
    request = MeasureRequest(
        depths=(1, 2, 4, 8),
        replies=options.replies,
        reply_tokens=options.tokens,
        bar=Bar(),
        threads=options.threads,
        seed=1,
        text=None,
        out=None,
    )
    text = Text(KING_JAMES.name, read_corpus(sinkserve_home()))
    report = measure_model(config, request, text, Steps(console))
    console.print(f"\n{weights}", quality_table(report))
    show_recommendation(report, config.replay_windows, console)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", choices=["int8", "float32", "both"], default="both")
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--replies", type=int, default=8, help="of each kind (default 8)")
    parser.add_argument("--tokens", type=int, default=64, help="longest reply (default 64)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    console = Console(width=110)
    formats = ["int8", "float32"] if options.weights == "both" else [options.weights]
    reports = [measured(weights, options, console) for weights in formats]
    result = {
        "model": "SmolLM2-135M-Instruct",
        "results": [report.to_json() for report in reports],
    }
    console.print(f"written: {save('measure_replay', result)}")
    draw([report.curves for report in reports], PLOT)
    console.print(f"written: {PLOT}")
    return 0 if all(report.recommendation.windows for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
