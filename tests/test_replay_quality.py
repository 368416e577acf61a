"""What replay measurements are made of: the divergence, the summary and what follows from it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.protocol import Logits
from engine.replay_quality import (
    Bar,
    ReplayQuality,
    ReplyComparison,
    kl_divergence,
    recommend,
    summarise,
)


def logits(*values: float) -> Logits:
    return np.array(values, np.float32)


def test_the_divergence_of_two_distributions_known_by_hand() -> None:
    live, rebuilt = logits(0.0, 0.0), logits(0.0, math.log(3.0))
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(live, rebuilt) == pytest.approx(wanted, rel=1e-6)
    assert kl_divergence(live + 7, rebuilt - 3) == pytest.approx(wanted, rel=1e-6)
    assert kl_divergence(rebuilt, live) == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6
    )


def test_equal_distributions_diverge_by_nothing() -> None:
    values = np.random.default_rng(0).normal(0, 5, 1000).astype(np.float32)
    assert kl_divergence(values, values.copy()) == 0.0


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_nearly_equal_distributions_keep_their_digits(gap: float) -> None:
    """The plain sum of p (log p - log q) is all rounding error at 1e-9."""
    found = kl_divergence(logits(0.0, 0.0), logits(0.0, gap))
    assert found == pytest.approx(gap**2 / 8, rel=2e-3)


def test_impossible_tokens_do_not_break_the_divergence() -> None:
    assert kl_divergence(logits(0.0, -2000.0), logits(0.0, -1.0)) == pytest.approx(
        math.log(1 + math.exp(-1)), rel=1e-6
    )
    assert kl_divergence(logits(0.0, -1.0), logits(0.0, -2000.0)) > 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        kl_divergence(logits(0.0, 1.0), logits(0.0, bad))


def compared(kl: list[float], same: str) -> ReplyComparison:
    return ReplyComparison(np.array(kl), np.array([letter == "=" for letter in same]))


@pytest.mark.parametrize(("same", "after"), [("====", None), ("x===", 0), ("==x=", 2), ("===x", 3)])
def test_where_a_greedy_reply_diverges(same: str, after: int | None) -> None:
    assert compared([0.0] * 4, same).diverged_after == after


@pytest.mark.parametrize(
    ("replies", "median"),
    [
        (["=x"], 1),
        (["=="], None),
        (["x=", "==", "=x"], 1),
        (["==", "==", "x="], None),
        (["x=", "=="], 0),
    ],
)
def test_the_median_counts_what_never_diverged_as_longest(
    replies: list[str], median: int | None
) -> None:
    quality = summarise(1, [compared([0.0], "=")], [compared([0.0, 0.0], r) for r in replies])
    assert quality.median_divergence == median


def test_figures_are_over_the_tokens_of_sampled_replies_only() -> None:
    sampled = [compared([1.0, 2.0, 3.0], "==x"), compared([6.0], "=")]
    quality = summarise(2, sampled, [compared([100.0], "x")])
    assert quality == ReplayQuality(2, 4, 3.0, 6.0, 0.75, (0,))
    assert summarise(2, [compared([1.0] * 99 + [5.0], "=" * 100)], []).kl_p99 == 5.0
    with pytest.raises(ValueError, match="nothing"):
        summarise(2, [], [compared([1.0], "=")])


def depth(windows: int | None, kl_mean: float, kl_p99: float | None = None) -> ReplayQuality:
    p99 = 10 * kl_mean if kl_p99 is None else kl_p99
    return ReplayQuality(windows, 100, kl_mean, p99, 1.0, ())


FLOAT32 = [depth(1, 1e-2), depth(2, 1e-4), depth(4, 5e-7), depth(8, 1e-10)]


@pytest.mark.parametrize(
    ("depths", "floor", "bar", "wanted"),
    [
        # At the threshold before at the floor, and the floor alone when there is no threshold.
        (FLOAT32, 1e-10, Bar(3.0, 1e-6), 4),
        (FLOAT32, 1e-10, Bar(3.0, 0.0), 8),
        (FLOAT32, 1e-10, Bar(3.0, 1e-3), 2),
        # Noisier numbers: the floor is reached sooner.
        (FLOAT32, 5e-5, Bar(3.0, 0.0), 2),
        (FLOAT32, 5e-5, Bar(1.5, 0.0), 4),
        (FLOAT32, 1e-2, Bar(1.0, 0.0), 1),
        # None will do.
        (FLOAT32[:2], 1e-10, Bar(3.0, 1e-6), None),
        # A model without traces: equal at once, also to a floor of nothing.
        ([depth(1, 0.0), depth(2, 0.0)], 0.0, Bar(3.0, 0.0), 1),
        # A depth that looks good by luck does not count if a deeper one does not.
        ([depth(1, 1e-9), depth(2, 1e-4), depth(4, 1e-9)], 1e-9, Bar(3.0, 0.0), 4),
        ([depth(1, 1e-9), depth(2, 1e-4)], 1e-9, Bar(3.0, 0.0), None),
        # A mean at the floor with a tail far above it.
        ([depth(1, 1e-4, 1e-1), depth(2, 1e-4)], 1e-4, Bar(3.0, 0.0), 2),
    ],
)
def test_the_recommended_depth(
    depths: list[ReplayQuality], floor: float, bar: Bar, wanted: int | None
) -> None:
    assert recommend(depths, depth(None, floor), bar, 30).windows == wanted


def test_the_reason_says_what_decided() -> None:
    floor = depth(None, 1e-10)
    assert "under the threshold" in recommend(FLOAT32, floor, Bar(), 30).reason
    assert "at the noise floor" in recommend(FLOAT32, floor, Bar(3.0, 0.0), 30).reason
    assert "at 30 windows" in recommend(FLOAT32[:1], floor, Bar(), 30).reason


def test_caveats_say_what_was_not_seen() -> None:
    def caveats(depths: list[ReplayQuality], floor: ReplayQuality) -> str:
        return " ".join(recommend(depths, floor, Bar(), 30).caveats)

    assert caveats(FLOAT32, depth(None, 1e-10)) == ""
    assert "not measured" in caveats(FLOAT32[2:], depth(None, 1e-10))
    assert "1 window will do" in caveats(FLOAT32, depth(None, 1.0))
    rough = ReplayQuality(None, 100, 1.0, 10.0, 0.8, ())
    assert "20%" in caveats(FLOAT32, rough)


@pytest.mark.parametrize("counts", [[], [0, 1], [2, 1], [1, 1]])
def test_depths_must_rise(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="rising"):
        recommend([depth(count, 1.0) for count in counts], depth(None, 1.0), Bar(), 3)


@pytest.mark.parametrize("values", [(0.9, 0.0), (math.nan, 0.0), (1.0, -1.0), (1.0, math.nan)])
def test_a_bar_that_makes_no_sense_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="floor_factor"):
        Bar(*values)
