"""Medians with their spread. Pure: the parent process uses it too, without torch."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report import median, percentile


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds, and how many samples they are of."""
    return {
        "ms": 1e3 * median(seconds),
        "ms_p10": 1e3 * percentile(seconds, 10),
        "ms_p90": 1e3 * percentile(seconds, 90),
        "samples": len(seconds),
    }
