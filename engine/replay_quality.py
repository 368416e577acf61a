"""How far a rebuilt cache is from the live one, and how many windows of replay that asks for. Pure.

Two caches are compared by the next-token distributions they give to the same tokens. One of the
rebuilt caches is the *noise floor*: all tokens of the conversation run again, which equals the live
cache in exact arithmetic and differs by the rounding of other chunks and batches only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.protocol import Logits

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def kl_divergence(live: Logits, rebuilt: Logits) -> float:
    """KL(live || rebuilt) in nats of the softmaxes of two float32 [vocab]; never below 0.

    Computed so that nearly equal distributions keep their digits. Raises ValueError for logits that
    are not finite.
    """
    log_p, log_q = _log_softmax(live), _log_softmax(rebuilt)
    gap, p = log_q - log_p, np.exp(log_p)
    # sum p (log p - log q) plus sum (q - p) = 0: every term is then p (e^gap - 1 - gap) >= 0.
    near = p * (np.expm1(np.minimum(gap, 1.0)) - gap)
    far = np.exp(log_q) - p * (1.0 + gap)
    return float(np.where(gap < 1.0, near, far).sum())


def _log_softmax(logits: Logits) -> Floats:
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite")
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    result: Floats = shifted - math.log(np.exp(shifted).sum())
    return result


@dataclass(frozen=True, slots=True)
class ReplyComparison:
    """A rebuilt cache beside the live one along one reply, which is the live one's.

    `kl` float64 and `same_top` bool, [output tokens]: the divergence at each token, and whether both
    caches hold the same token for the likeliest.
    """

    kl: Floats
    same_top: Bools

    @property
    def diverged_after(self) -> int | None:
        """Of a greedy reply: how many tokens are the same before the first that is not; None if all are."""
        different = np.flatnonzero(~self.same_top)
        return int(different[0]) if len(different) else None


@dataclass(frozen=True, slots=True)
class ReplayQuality:
    """What one depth of replay gives. `windows` is None for the noise floor: all tokens.

    `kl_mean` and `kl_p99` in nats and `top1_agreement` (0..1) are over `num_tokens` output tokens of
    sampled replies. `diverged_after` has an entry for each greedy reply (see `ReplyComparison`).
    """

    windows: int | None
    num_tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    diverged_after: tuple[int | None, ...]

    @property
    def median_divergence(self) -> int | None:
        """Median of `diverged_after`, a reply that never diverged counting as longest; None for such."""
        ordered = sorted(self.diverged_after, key=lambda n: math.inf if n is None else n)
        return ordered[(len(ordered) - 1) // 2] if ordered else None


def summarise(
    windows: int | None, sampled: Sequence[ReplyComparison], greedy: Sequence[ReplyComparison]
) -> ReplayQuality:
    """Raises ValueError when no token of a sampled reply was compared."""
    if not sum(len(reply.kl) for reply in sampled):
        raise ValueError("nothing was compared")
    kl = np.concatenate([reply.kl for reply in sampled])
    same_top = np.concatenate([reply.same_top for reply in sampled])
    return ReplayQuality(
        windows=windows,
        num_tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99, method="higher")),
        top1_agreement=float(same_top.mean()),
        diverged_after=tuple(reply.diverged_after for reply in greedy),
    )


@dataclass(frozen=True, slots=True)
class Bar:
    """What is good enough: a mean KL within `floor_factor` times the noise floor's and a p99, which few
    tokens decide, within twice that; or else a mean of at most `threshold` nats a token: who reads
    1 / threshold tokens gains one nat of evidence.

    The factor has to be above 1: the floor is an estimate too, and a little low, as its cache shares the
    steps of the measured replies with the live one. Raises ValueError for one below 1 or a negative
    threshold.
    """

    floor_factor: float = 1.5
    threshold: float = 1e-6

    def __post_init__(self) -> None:
        if not self.floor_factor >= 1.0 or not self.threshold >= 0.0:
            raise ValueError("floor_factor must be at least 1 and threshold at least 0")

    def at_floor(self, depth: ReplayQuality, floor: ReplayQuality) -> bool:
        """Whether rounding explains what is left."""
        return (
            depth.kl_mean <= self.floor_factor * floor.kl_mean
            and depth.kl_p99 <= 2 * self.floor_factor * floor.kl_p99
        )

    def accepts(self, depth: ReplayQuality, floor: ReplayQuality) -> bool:
        """Whether the depth is good enough."""
        return self.at_floor(depth, floor) or depth.kl_mean <= self.threshold


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`windows` to keep, None if no measured depth will do; `reason` and `caveats` are sentences."""

    windows: int | None
    reason: str
    caveats: tuple[str, ...] = ()


def recommend(
    depths: Sequence[ReplayQuality], floor: ReplayQuality, bar: Bar, num_layers: int
) -> Recommendation:
    """The smallest of `depths` that is good enough, as is every deeper one.

    A model of `num_layers` layers needs no more windows than that. Raises ValueError for no depths,
    and for depths that are not rising numbers of windows.
    """
    counts = [depth.windows or 0 for depth in depths]
    if not counts or counts[0] < 1 or any(b <= a for a, b in itertools.pairwise(counts)):
        raise ValueError("depths must be rising numbers of windows, at least one")
    chosen: ReplayQuality | None = None
    for depth in reversed(depths):
        if not bar.accepts(depth, floor):
            break
        chosen = depth
    if chosen is None:
        return Recommendation(None, _none_will_do(depths[-1], floor, bar, num_layers))
    return Recommendation(
        chosen.windows, _why(chosen, floor, bar), tuple(_caveats(depths, chosen, floor))
    )


def _why(chosen: ReplayQuality, floor: ReplayQuality, bar: Bar) -> str:
    mean = f"its mean KL of {chosen.kl_mean:.1e}"
    if bar.at_floor(chosen, floor):
        return (
            f"the least depth at the noise floor: {mean} is within {bar.floor_factor:g} times the "
            f"{floor.kl_mean:.1e} of a replay of everything, its p99 within twice that"
        )
    return (
        f"the least depth under the threshold: {mean} is at most {bar.threshold:.1e}, though above "
        f"the noise floor of {floor.kl_mean:.1e}"
    )


def _none_will_do(deepest: ReplayQuality, floor: ReplayQuality, bar: Bar, num_layers: int) -> str:
    return (
        f"{deepest.windows} windows leave a mean KL of {deepest.kl_mean:.1e}: above "
        f"{bar.floor_factor:g} times the noise floor of {floor.kl_mean:.1e}, in mean or in p99, and "
        f"above the threshold of {bar.threshold:.1e}. Measure deeper (at {num_layers} windows, one a "
        "layer, replay is exact) or accept more"
    )


def _caveats(
    depths: Sequence[ReplayQuality], chosen: ReplayQuality, floor: ReplayQuality
) -> list[str]:
    found = []
    if chosen is depths[0] and (chosen.windows or 0) > 1:
        found.append(f"fewer than {chosen.windows} windows were not measured")
    if chosen.windows == 1:
        found.append(
            "1 window will do: the model carries no trace of older tokens that this noise floor lets "
            "one see"
        )
    if floor.top1_agreement < 0.9:
        found.append(
            f"rounding alone changes the likeliest token at {1 - floor.top1_agreement:.0%} of the "
            "tokens: nothing finer than that can be seen in this dtype"
        )
    return found
