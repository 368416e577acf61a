from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from engine.philox import philox4x32, uniform
from engine.sampling import (
    MIN_LOGPROB,
    SamplingParams,
    invert_cdf,
    largest,
    sample_rows,
)
from tests.sampling_cases import GREEDY, PARAMS, cases, reference, request


def draw(logits: object, params: SamplingParams, history: list[int] | None = None) -> int:
    row = np.array([logits], np.float32)
    (sampled,) = sample_rows(row, [request(params, history)])
    assert sampled.failed is None
    assert sampled.token_id is not None
    return sampled.token_id


# The random numbers.


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == words


def test_uniform_is_the_first_53_bits_of_the_block() -> None:
    assert uniform(0, 0, 0) == ((0x6627E8D5E169C58D) >> 11) / 2**53
    counter = (0x89ABCDEF, 0x01234567, 7, 0)
    high, low, _, _ = philox4x32(counter, (0x55667788, 0x11223344))
    expected = ((high << 32 | low) >> 11) / 2**53
    assert uniform(0x1122334455667788, 7, 0x0123456789ABCDEF) == expected


def test_every_part_of_the_counter_and_key_matters() -> None:
    draws = {uniform(seed, turn, k) for seed in (0, 1, 2**32) for turn in (0, 1) for k in (0, 1)}
    assert len(draws) == 12


def test_uniform_is_uniform() -> None:
    draws = np.array([uniform(3, 1, k) for k in range(20_000)])
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert chi_square(counts, np.full(20, 0.05)) < 60


def chi_square(counts: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    expected = counts.sum() * probabilities
    assert not counts[expected == 0].any()
    some = expected > 0
    return float((((counts - expected) ** 2)[some] / expected[some]).sum())


# The distribution.


@pytest.mark.parametrize("params", PARAMS)
def test_draws_follow_the_reference_distribution(params: SamplingParams) -> None:
    logits = np.random.default_rng(5).normal(size=24).astype(np.float32) * 1.5
    history = [2, 2, 2, 7, 9, 9]
    expected = reference(logits, params, history)
    num_draws = 6000
    requests = [request(params, history, k=k) for k in range(num_draws)]
    sampled = sample_rows(np.tile(logits, (num_draws, 1)), requests)
    counts = np.bincount([s.token_id or 0 for s in sampled], minlength=24)
    # 24 tokens: chi-square stays below 60 with probability 1 - 4e-5, and the seed is fixed.
    assert chi_square(counts, expected) < 60


def test_dry_breaks_a_loop_and_spares_what_only_the_template_repeats() -> None:
    params = SamplingParams(temperature=0.0, dry_multiplier=2.0, dry_allowed_length=2)
    logits = np.array([[0.0, 0.0, 5.0, 4.5]], np.float32)
    history = [0, 1, 2, 0, 1]
    for k, token in ((2, 3), (1, 2), (0, 2)):
        (sampled,) = sample_rows(logits, [request(params, history, k=k)])
        assert sampled.token_id == token


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_a_draw_is_the_inverse_cdf_of_the_reference(
    case: tuple[npt.NDArray[np.float32], SamplingParams, list[int], int],
) -> None:
    logits, params, history, k = case
    (sampled,) = sample_rows(logits[None], [request(params, history, k=k)])
    assert sampled.token_id is not None
    probabilities = reference(logits, params, history, k)
    assert probabilities[sampled.token_id] > 0
    if params.temperature > 0:
        upto = probabilities[: sampled.token_id + 1].sum()
        below = upto - probabilities[sampled.token_id]
        assert below - 1e-5 <= uniform(params.seed, 1, k) <= upto + 1e-5


def test_a_large_vocabulary_is_drawn_from_evenly_across_blocks() -> None:
    vocab = 49_152
    requests = [request(SamplingParams(seed=9), k=k) for k in range(2000)]
    sampled = sample_rows(np.zeros((2000, vocab), np.float32), requests)
    counts, _ = np.histogram([s.token_id or 0 for s in sampled], bins=16, range=(0, vocab))
    assert chi_square(counts, np.full(16, 1 / 16)) < 50


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
def test_a_nucleus_of_any_width_is_the_references(top_p: float, spread: float) -> None:
    logits = (np.random.default_rng(8).normal(size=5000) * spread).astype(np.float32)
    params = SamplingParams(top_p=top_p, seed=3)
    upto = reference(logits, params, []).cumsum()
    sampled = sample_rows(np.tile(logits, (300, 1)), [request(params, k=k) for k in range(300)])
    tokens = np.array([s.token_id for s in sampled])
    draws = np.array([uniform(3, 1, k) for k in range(300)])
    assert (draws <= upto[tokens] + 1e-5).all()
    assert (draws >= np.where(tokens > 0, upto[tokens - 1], 0.0) - 1e-5).all()


@pytest.mark.parametrize("length", [6, 3000])
def test_a_token_of_no_weight_is_never_drawn(length: int) -> None:
    weights = np.zeros(length, np.float32)
    weights[[2, length - 3]] = 1.0
    draws = [0.0, 0.25, np.nextafter(0.5, 0), 0.5, 0.75, 1.0 - 2.0**-53]
    assert [invert_cdf(weights, u) for u in draws] == [2] * 3 + [length - 3] * 3


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 5000)).astype(np.float32) * 3
    requests = [
        request(replace(params, seed=index), [1, 2, 3], turn=index, k=index)
        for index, params in enumerate(PARAMS[:7])
    ]
    together = sample_rows(logits, requests)
    alone = [sample_rows(logits[i : i + 1], requests[i : i + 1])[0] for i in range(7)]
    assert together == alone
    backwards = sample_rows(np.ascontiguousarray(logits[::-1]), requests[::-1])
    assert backwards[::-1] == together


def test_logits_are_left_as_they_are() -> None:
    logits = np.random.default_rng(1).normal(size=(1, 50)).astype(np.float32)
    before = logits.copy()
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((1, 3.0),), logprobs=True)
    sample_rows(logits, [request(params, [4, 5])])
    assert np.array_equal(logits, before)


# Edges.

INF = float("inf")
NAN = float("nan")


@pytest.mark.parametrize(
    ("logits", "params", "history", "expected"),
    [
        ([1, 3, 3, 2], GREEDY, [], 1),
        ([1, 3, 3, 2], SamplingParams(top_k=1), [], 1),
        ([1, 3, 3, 2], SamplingParams(top_p=1e-9), [], 1),
        ([1, 3, 3.1, 2], SamplingParams(min_p=1.0), [], 2),
        ([1, 3, 3.1, 2], SamplingParams(temperature=1e-9), [], 2),
        ([1, 3, 3.1, 2], SamplingParams(temperature=1e-4), [], 2),
        ([0, 0, 0, 0], SamplingParams(top_k=1), [], 0),
        ([0, 0, 0, 0], SamplingParams(top_p=0.25), [], 0),
        ([-INF, -INF, 2, -INF], SamplingParams(), [], 2),
        ([-INF, -INF, 2, -INF], SamplingParams(top_k=3, top_p=0.999), [], 2),
        ([-INF, 1, 2, -INF], replace(GREEDY, logit_bias=((1, 100.0),)), [], 1),
        ([9, 8, 1, 0], replace(GREEDY, logit_bias=((0, -100.0),)), [], 1),
        ([9, 8, 1, 0], SamplingParams(logit_bias=((3, 100.0),)), [], 3),
        ([-INF, 8, 1, 0], SamplingParams(logit_bias=((0, 100.0), (2, 100.0))), [], 2),
        ([4, 3, -1, 0], replace(GREEDY, repetition_penalty=2.0), [0], 1),
        ([-4, -3, -5, -9], replace(GREEDY, repetition_penalty=2.0), [1], 0),
        ([4, 3.5, 0, 0], replace(GREEDY, presence_penalty=0.6), [0, 0, 0], 1),
        ([4, 2.5, 0, 0], replace(GREEDY, presence_penalty=0.6), [0, 0, 0], 0),
        ([4, 2.5, 0, 0], replace(GREEDY, frequency_penalty=0.6), [0, 0, 0], 1),
        ([4, 2.5, 0, 0], replace(GREEDY, frequency_penalty=0.6), [0, 0], 0),
        ([4, 3, 0, 0], replace(GREEDY, presence_penalty=-2.0), [1], 1),
        ([7], SamplingParams(), [0, 0], 0),
        ([7], SamplingParams(top_k=5, top_p=0.5, min_p=0.5), [], 0),
    ],
)
def test_edges(
    logits: list[float], params: SamplingParams, history: list[int], expected: int
) -> None:
    assert {draw(logits, replace(params, seed=seed), history) for seed in range(12)} == {expected}


def test_ties_at_the_cut_go_to_lower_ids() -> None:
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=0.3)):
        seen = {draw([0.0] * 10, replace(params, seed=seed)) for seed in range(100)}
        assert seen == {0, 1, 2}


def test_top_k_of_a_large_vocabulary_with_ties_is_exact() -> None:
    values = np.repeat(np.arange(5000, dtype=np.float32), 2)
    np.random.default_rng(2).shuffle(values)
    for k in (1, 2, 3, 50, 513, 9999, 10_000):
        order = sorted(range(10_000), key=lambda index: (-values[index], index))
        assert largest(values, k).tolist() == sorted(order[:k])


@pytest.mark.parametrize("bad", [[NAN, 1, 2], [1, INF, 2], [1, 2, NAN], [-INF, -INF, -INF]])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.5)])
def test_a_row_without_finite_logits_fails_alone(bad: list[float], params: SamplingParams) -> None:
    good = [0.0, 0.0, 50.0]
    rows = sample_rows(np.array([good, bad, good], np.float32), [request(params)] * 3)
    assert [row.token_id for row in rows] == [2, None, 2]
    assert [row.failed for row in rows] == [None, "the model's logits are not finite", None]


def test_a_bias_outside_the_vocabulary_fails_its_row() -> None:
    params = SamplingParams(logit_bias=((3, 1.0),))
    (row,) = sample_rows(np.zeros((1, 3), np.float32), [request(params)])
    assert row.token_id is None
    assert row.failed == "logit_bias names a token id outside the vocabulary"


# Log-probabilities.


def test_logprobs_are_those_of_the_model_before_any_penalty() -> None:
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)) + np.float32(3)
    params = SamplingParams(
        temperature=0.5,
        logit_bias=((0, 100.0),),
        presence_penalty=2.0,
        logprobs=True,
        top_logprobs=3,
    )
    (sampled,) = sample_rows(logits, [request(params, [3])])
    assert sampled.token_id == 0
    assert sampled.logprob is not None
    assert sampled.logprob.token_id == 0
    assert sampled.logprob.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [entry.token_id for entry in sampled.top] == [3, 2, 1]
    assert [entry.logprob for entry in sampled.top] == pytest.approx(
        [math.log(0.4), math.log(0.3), math.log(0.2)], abs=1e-6
    )


def test_logprobs_only_if_asked_for_and_never_infinite() -> None:
    row = np.array([[-INF, 0.0, 0.0]], np.float32)
    (plain,) = sample_rows(row, [request(GREEDY)])
    assert plain.logprob is None
    assert plain.top == ()
    params = SamplingParams(logit_bias=((1, -100.0), (2, -100.0)), logprobs=True, top_logprobs=20)
    (sampled,) = sample_rows(row, [request(params)])
    assert [entry.token_id for entry in sampled.top] == [1, 2, 0]
    assert sampled.top[2].logprob == MIN_LOGPROB


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", NAN),
        ("presence_penalty", INF),
        ("frequency_penalty", NAN),
        ("dry_multiplier", -0.1),
        ("dry_base", 0.9),
        ("dry_base", NAN),
        ("dry_allowed_length", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("top_logprobs", 21),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, NAN),)),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
