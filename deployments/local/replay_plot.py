"""The picture of a replay measurement. Needs matplotlib, which serving does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.replay_quality import ReplayQuality

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class PlotError(RuntimeError):
    """matplotlib is missing; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Curves:
    """What one measurement has to show; greedy replies had at most `reply_tokens` tokens."""

    name: str
    depths: Sequence[ReplayQuality]
    floor: ReplayQuality
    reply_tokens: int


def draw(measurements: Sequence[Curves], path: Path) -> None:
    """A row of panels for each: KL against depth, how long greedy text stays the same.

    Raises PlotError.
    """
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
    for curves, (divergence, text) in zip(measurements, axes, strict=True):
        _draw_divergence(divergence, curves)
        _draw_greedy(text, curves)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_divergence(axis: Axes, curves: Curves) -> None:
    windows = [depth.windows or 0 for depth in curves.depths]
    for label, values, floor, marker in (
        ("mean", [depth.kl_mean for depth in curves.depths], curves.floor.kl_mean, "o"),
        ("p99", [depth.kl_p99 for depth in curves.depths], curves.floor.kl_p99, "s"),
    ):
        (line,) = axis.plot(windows, values, f"{marker}-", label=label)
        axis.axhline(floor, color=line.get_color(), linestyle=":", linewidth=1)
    axis.plot([], [], "k:", linewidth=1, label="noise floor of each")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(windows, [str(count) for count in windows])
    axis.set_title(f"{curves.name}: KL(live || restored), nats a token", fontsize=10, loc="left")
    axis.set_xlabel("windows replayed")
    axis.legend(fontsize=8)


def _draw_greedy(axis: Axes, curves: Curves) -> None:
    lengths = range(curves.reply_tokens + 1)
    for quality in (*curves.depths, curves.floor):
        label = depth_name(quality.windows)
        style = "k:" if quality.windows is None else "-"
        axis.step(lengths, _still_same(quality, lengths), style, label=label, where="post")
    axis.set_ylim(0, 1.05)
    axis.set_title(f"{curves.name}: greedy replies still the same", fontsize=10, loc="left")
    axis.set_xlabel("tokens of the reply")
    axis.legend(fontsize=8, loc="lower left")


def depth_name(windows: int | None) -> str:
    """`1 window`, `2 windows`; None is the noise floor."""
    if windows is None:
        return "noise floor"
    return "1 window" if windows == 1 else f"{windows} windows"


def _still_same(quality: ReplayQuality, lengths: Sequence[int]) -> list[float]:
    """Share of the greedy replies whose first n tokens are the same, for n of `lengths`."""
    replies = quality.diverged_after
    return [sum(same is None or same >= n for same in replies) / len(replies) for n in lengths]
