"""4-bit weights: what is rounded to, how it is kept, and that cuts between ranks respect groups."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from engine_build import int4
from engine_build.spec import SpecError

KINDS = [np.float16, ml_dtypes.bfloat16]


def drawn(*size: int, tails: float = 5.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(sum(size)).standard_t(tails, size) / 50).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [32, 64, 96, 128, 320, 576, 896])
def test_both_ways_of_keeping_give_back_what_was_kept(inputs: int, kind: Any) -> None:
    levels, scales = int4.quantise(drawn(10, inputs), kind)
    assert levels.min() == -8 or levels.max() == 7
    words, padded = int4.to_words(levels, scales)
    assert words.shape == (10, int4.num_words(inputs))
    assert padded.shape == (10, int4.num_scales(inputs))
    for got, kept in zip(int4.from_words(words, padded, inputs), (levels, scales), strict=True):
        assert (got == kept).all()
    pairs, by_input = int4.to_pairs(levels, scales)
    assert pairs.shape == (inputs, 5)
    for got, kept in zip(int4.from_pairs(pairs, by_input), (levels, scales), strict=True):
        assert (got == kept).all()


def test_a_word_holds_every_sixteenth_input() -> None:
    """The order that the kernels unpack."""
    levels = np.zeros((1, 256), np.int8)
    levels[0, 128 + 5 + 16 * 3] = -7
    words, _ = int4.to_words(levels, np.ones((1, 2), np.float16))
    changed = words.view(np.uint32)[0] ^ 0x88888888
    assert changed.nonzero()[0].tolist() == [16 + 5]
    assert changed[16 + 5] >> 12 & 15 == (-7 + 8) ^ 8


@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_near_the_chosen_one_is_much_better(kind: Any) -> None:
    """The slow way: every group alone, many scales."""
    values = drawn(6, 256, tails=3.0)
    levels, scales = int4.quantise(values, kind)
    kept = ((int4.dequantise(levels, scales) - values) ** 2).reshape(6, 2, 128).sum(axis=-1)
    for row in range(6):
        for group in range(2):
            part = values[row, 128 * group : 128 * (group + 1)].astype(np.float64)
            tried = np.abs(part).max() / 7 * np.linspace(0.5, 1.1, 200)
            errors = [((np.rint(part / s).clip(-8, 7) * s - part) ** 2).sum() for s in tried]
            assert min(errors) <= kept[row, group] * 1.001
            assert kept[row, group] < 1.1 * min(errors)
    plain = np.abs(values.reshape(6, 2, 128)).max(axis=-1, keepdims=True) / 7
    rounded = np.rint(values.reshape(6, 2, 128) / plain) * plain
    assert kept.sum() < 0.9 * ((rounded - values.reshape(6, 2, 128)) ** 2).sum()


def test_nothing_and_exact_values_stay() -> None:
    levels, scales = int4.quantise(np.zeros((2, 64), np.float32), np.float16)
    assert not int4.dequantise(levels, scales).any()
    grid = np.tile(np.arange(-8, 8) / 16, (3, 8)).astype(np.float32)
    assert (int4.dequantise(*int4.quantise(grid, np.float16)) == grid).all()


def test_a_width_without_groups_is_refused() -> None:
    assert [int4.group_of(n) for n in (4096, 576, 96)] == [128, 64, 32]
    with pytest.raises(SpecError, match=r"int4 shares scales among 32 to 128 inputs.* has 48"):
        int4.group_of(48)
