"""The reference that engines are verified against, held to the slow oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.float_reference import MISTAKES, FloatDecoder, Mistake, Passage
from engine_build.weights import merged_weights
from tests.engine_fixtures import PARTIAL_ROTARY, cached_tensors, random_tokens, tiny_shape
from tests.reference import Floats, ReferenceDecoder, Rule
from tests.tiny_models import FAMILIES

CAPACITY, LENGTH = 40, 150
EXACT = 1e-9


def weight_of(family: str) -> Callable[[str], npt.NDArray[np.float32]]:
    by_name = {weight.name: weight for weight in merged_weights(tiny_shape(family))}
    return lambda name: by_name[name].load(cached_tensors(family))


def logits_of(family: str, passage: Passage, dtype: type[np.floating[Any]] = np.float64) -> Floats:
    decoder = FloatDecoder(tiny_shape(family), weight_of(family), dtype)
    return decoder.head()(decoder.hidden(passage))


def passage_of(sinks: int, mistake: Mistake | None = None) -> Passage:
    tokens, indices = random_tokens(7, LENGTH), np.arange(LENGTH, dtype=np.int64)
    return Passage(tokens, indices, sinks, CAPACITY - sinks, mistake)


def oracle(family: str, rule: Rule) -> ReferenceDecoder:
    return ReferenceDecoder(tiny_shape(family), cached_tensors(family), rule)


@functools.cache
def oracle_logits(family: str, rule: Rule) -> Floats:
    return oracle(family, rule).push_all(0, random_tokens(7, LENGTH))


def difference(got: Floats, wanted: Floats) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max())


# The scale of q is folded in float32 when weights are merged; the oracle divides in float64.
FOLDED = 1e-4


@pytest.mark.parametrize("family", [*FAMILIES, PARTIAL_ROTARY])
def test_every_family_equals_the_oracle(family: str) -> None:
    wanted = oracle_logits(family, Rule(4, CAPACITY - 4))
    assert difference(logits_of(family, passage_of(4)), wanted) < FOLDED


@pytest.mark.parametrize("sinks", [0, 1, CAPACITY // 2])
@pytest.mark.parametrize("queries", [1, 16, 1000])
def test_blocks_of_any_size_and_any_number_of_sinks(
    sinks: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.float_reference._QUERIES_AT_ONCE", queries)
    wanted = oracle_logits("llama", Rule(sinks, CAPACITY - sinks))
    assert difference(logits_of("llama", passage_of(sinks)), wanted) < FOLDED


def test_float32_is_float64_to_within_rounding() -> None:
    passage = passage_of(4)
    got = logits_of("llama", passage, np.float32)
    assert got.dtype == np.float32
    assert difference(got, logits_of("llama", passage)) < 1e-4


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_bounded_replay_far_into_a_stream(sinks: int) -> None:
    """Sinks, then tokens from an index on: what lies between was never cached."""
    begin, tokens = 4_000_037, random_tokens(5, 100)
    indices = np.concatenate([np.arange(sinks), begin + np.arange(100 - sinks)])
    reference = oracle("llama", Rule(sinks, CAPACITY - sinks))
    wanted = [
        reference.push(int(index), int(token)) for index, token in zip(indices, tokens, strict=True)
    ]
    passage = Passage(tokens, indices, sinks, CAPACITY - sinks)
    assert difference(logits_of("llama", passage), np.stack(wanted)) < FOLDED


WRONG: dict[Mistake, Rule] = {
    "no sinks": Rule(4, CAPACITY - 4, no_sinks=True),
    "no shift": Rule(4, CAPACITY - 4, no_shift=True),
    "one key too few": Rule(4, CAPACITY - 4, one_key_too_few=True),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_mistakes_are_those_of_the_oracle(mistake: Mistake) -> None:
    wanted = oracle_logits("llama", WRONG[mistake])
    assert difference(logits_of("llama", passage_of(4, mistake)), wanted) < FOLDED


def test_the_last_tokens_alone_are_the_same() -> None:
    passage, first = passage_of(4), 93
    decoder = FloatDecoder(tiny_shape("llama"), weight_of("llama"), np.float64)
    x = tail = decoder.embed(passage)
    for number in range(decoder.shape.num_layers):
        layer = decoder.layer(number)
        tail = layer.apply(np.concatenate([x[:first], tail[-(len(x) - first) :]]), passage, first)
        x = layer.apply(x, passage)
    assert tail.shape == x[first:].shape
    assert difference(tail, x[first:]) < EXACT


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows_only_once_the_window_slides(mistake: Mistake) -> None:
    right, wrong = logits_of("llama", passage_of(4)), logits_of("llama", passage_of(4, mistake))
    before = CAPACITY - 4 - 1
    assert difference(wrong[:before], right[:before]) < EXACT
    assert difference(wrong[before:], right[before:]) > 0.1
