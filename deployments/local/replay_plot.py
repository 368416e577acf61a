"""The picture of a replay measurement. Needs matplotlib, which serving does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deployments.replay_measurement import Measurement
from engine.replay_quality import ReplayQuality


class PlotError(RuntimeError):
    """matplotlib is missing; the message says what to do."""


def draw(measurements: Sequence[tuple[str, Measurement]], path: Path) -> None:
    """A row of panels for each (name, measurement): KL against depth, how long greedy text stays the
    same. Raises PlotError."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PlotError("matplotlib is not installed (pip install matplotlib)") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(measurements),
        2,
        figsize=(10, 3.6 * len(measurements)),
        squeeze=False,
        layout="constrained",
    )
    for (name, measured), (divergence, text) in zip(measurements, axes, strict=True):
        windows = [depth.windows for depth in measured.depths]
        for label, values, floor, marker in (
            ("mean", [d.kl_mean for d in measured.depths], measured.floor.kl_mean, "o"),
            ("p99", [d.kl_p99 for d in measured.depths], measured.floor.kl_p99, "s"),
        ):
            (line,) = divergence.plot(windows, values, f"{marker}-", label=label)
            divergence.axhline(floor, color=line.get_color(), linestyle=":", linewidth=1)
        divergence.plot([], [], "k:", linewidth=1, label="noise floor of each")
        divergence.set_xscale("log", base=2)
        divergence.set_yscale("log")
        divergence.set_xticks(windows, [str(count) for count in windows])
        divergence.set_title(f"{name}: KL(live || restored), nats a token", fontsize=10, loc="left")
        divergence.set_xlabel("windows replayed")
        divergence.legend(fontsize=8)
        longest = max(
            len(c.kl) for reply in measured.replies if reply.greedy for c in reply.comparisons
        )
        for quality in (*measured.depths, measured.floor):
            label = "noise floor" if quality.windows is None else f"{quality.windows} windows"
            style = "k:" if quality.windows is None else "-"
            text.step(
                range(longest + 1), _still_same(quality, longest), style, label=label, where="post"
            )
        text.set_ylim(0, 1.05)
        text.set_title(f"{name}: greedy replies still the same", fontsize=10, loc="left")
        text.set_xlabel("tokens of the reply")
        text.legend(fontsize=8, loc="lower left")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _still_same(quality: ReplayQuality, longest: int) -> list[float]:
    """Share of the greedy replies whose first n tokens are the same, for n = 0 .. longest."""
    replies = quality.diverged_after
    return [
        sum(same is None or same >= n for same in replies) / len(replies)
        for n in range(longest + 1)
    ]
