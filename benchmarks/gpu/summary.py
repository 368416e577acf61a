"""Medians with their spread, and how often to repeat. Pure: the parent process uses it too, without torch."""

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


def repetitions_for(seconds: float, total_s: float, least: int = 10, most: int = 200) -> int:
    """How often to repeat a call of `seconds` within about `total_s`."""
    return max(least, min(most, int(total_s / max(seconds, 1e-6))))
