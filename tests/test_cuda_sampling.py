"""The device sampler against engine.sampling: on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.philox import uniform
from engine.protocol import SampleRequest
from engine.sampling import NOT_FINITE, OUTSIDE_VOCABULARY, Sampled, SamplingParams, sample_rows
from tests.sampling_cases import GREEDY, PARAMS, reference, request

torch = pytest.importorskip("torch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Before Triton is imported: it decides there and then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from engine.cuda_kernels.sampling import SamplingSizes  # noqa: E402
from engine.cuda_sampling import MAX_VOCAB, DeviceSampler  # noqa: E402

Logits = npt.NDArray[np.float32]
SMALL = SamplingSizes(tile_tokens=128, group_tokens=4, sure_tokens=16, few_tokens=64)
"""So that a vocabulary of a few hundred has tiles, few tokens that are enough and few that are not."""
NEAR = 2e-6


def sample(
    logits: Logits, requests: Sequence[SampleRequest], sizes: SamplingSizes | None = SMALL
) -> list[Sampled]:
    sampler = DeviceSampler(len(logits), logits.shape[1], DEVICE, sizes=sizes)
    rows = torch.tensor(logits, device=DEVICE)
    sampler.prepare(requests)
    sampler.run(rows)
    return sampler.read()


def differing(
    got: Sequence[Sampled], logits: Logits, requests: Sequence[SampleRequest]
) -> list[int]:
    """Rows whose token is another one than engine.sampling's, and not for float rounding alone."""
    rows = []
    for number, (one, asked) in enumerate(zip(got, requests, strict=True)):
        (wanted,) = sample_rows(logits[number : number + 1], [asked])
        if (one.token_id, one.failed) == (wanted.token_id, wanted.failed):
            continue
        history = [int(token) for token in asked.history]
        shares = reference(logits[number], asked.params, history, asked.k)
        if one.token_id is None or asked.params.greedy or shares[one.token_id] == 0:
            rows.append(number)
            continue
        upto = float(shares[: one.token_id + 1].sum())
        u = uniform(asked.params.seed, asked.turn, asked.k)
        if not upto - shares[one.token_id] - NEAR <= u <= upto + NEAR:
            rows.append(number)
    return rows


def random_request(rng: np.random.Generator, vocab: int) -> SampleRequest:
    def one_of(*values: float) -> float:
        return float(rng.choice(values))

    penalised = rng.random() < 0.4
    params = SamplingParams(
        temperature=one_of(0.0, 0.3, 1.0, 1.0, 1.9),
        top_k=int(rng.choice([0, 0, 1, 4, 20, 70, 10_000])),
        top_p=one_of(1.0, 1.0, 0.99, 0.6, 0.01),
        min_p=one_of(0.0, 0.0, 0.03, 0.5),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
    )
    history = np.zeros(0, np.int32)
    if penalised:
        params = replace(
            params,
            repetition_penalty=one_of(1.0, 1.3, 0.8),
            frequency_penalty=one_of(0.0, 0.7),
            presence_penalty=one_of(0.0, -0.9),
            dry_multiplier=one_of(0.0, 0.8),
            dry_base=one_of(1.0, 1.75),
            dry_allowed_length=int(rng.integers(1, 4)),
            logit_bias=((int(rng.integers(vocab)), one_of(-100.0, 0.5, 3.0)),),
        )
        words = int(rng.choice([vocab, min(vocab, 2)]))
        history = rng.integers(0, words, rng.integers(0, 60)).astype(np.int32)
    k = int(rng.integers(0, len(history) + 1))
    return SampleRequest(params, int(rng.integers(0, 2**40)), k, history)


def random_rows(rng: np.random.Generator, count: int, vocab: int) -> Logits:
    rows: Logits = (
        rng.normal(size=(count, vocab)) * rng.choice([0.1, 1.0, 4.0], (count, 1))
    ).astype(np.float32)
    for row in rows:
        row[rng.integers(0, vocab, rng.integers(0, 20))] += np.float32(rng.choice([0.0, 5.0]))
        # Ties, also at the cuts.
        if rng.random() < 0.3:
            row[:] = np.round(row)
    return rows


@pytest.mark.parametrize("vocab", [1, 7, 128, 300])
@pytest.mark.parametrize("seed", range(2))
def test_tokens_are_those_of_the_rules(vocab: int, seed: int) -> None:
    rng = np.random.default_rng([seed, vocab])
    logits = random_rows(rng, 12, vocab)
    requests = [random_request(rng, vocab) for _ in range(12)]
    assert differing(sample(logits, requests), logits, requests) == []


@pytest.mark.parametrize("spread", [0.2, 4.0])
def test_a_real_vocabulary_in_its_own_sizes(spread: float) -> None:
    rng = np.random.default_rng(6)
    logits = (rng.normal(size=(8, 9000)) * spread).astype(np.float32)
    asked = [
        SamplingParams(),
        SamplingParams(top_k=50),
        SamplingParams(top_p=0.9, temperature=0.7),
        SamplingParams(top_p=0.999),
        SamplingParams(top_k=4000, top_p=0.95),
        SamplingParams(min_p=0.05),
        SamplingParams(min_p=1e-6),
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
    ]
    requests = [request(replace(params, seed=7), [1, 2], k=n) for n, params in enumerate(asked)]
    assert differing(sample(logits, requests, None), logits, requests) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_as_they_are(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    rows = torch.tensor(random_rows(rng, 10, 300), device=DEVICE).to(dtype)
    requests = [random_request(rng, 300) for _ in range(10)]
    sampler = DeviceSampler(10, 300, DEVICE, sizes=SMALL)
    sampler.prepare(requests)
    sampler.run(rows)
    assert differing(sampler.read(rows), rows.float().cpu().numpy(), requests) == []


@pytest.mark.parametrize(
    "counter", [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**64 - 1), (0x1122334455667788, 7, 0x89ABCDEF)]
)
def test_philox_gives_the_known_answers(counter: tuple[int, int, int]) -> None:
    """Of a flat row the token is the random number itself; tests/test_sampling.py has the answers."""
    seed, turn, k = counter
    logits = np.zeros((1, 2048), np.float32)
    (one,) = sample(
        logits, [SampleRequest(SamplingParams(seed=seed), turn, k, np.zeros(0, np.int32))], None
    )
    assert one.token_id == int(uniform(seed, turn, k) * 2048)


def test_all_bits_of_seed_turn_and_k_count() -> None:
    logits = np.zeros((1, 2048), np.float32)
    counters = [(0, 0, 0)] + [
        tuple(bit << shift if place == at else 0 for place in range(3))
        for at in range(3)
        for bit, shift in ((1, 0), (1, 31), (1, 32), (1, 63))
    ]
    requests = [
        SampleRequest(SamplingParams(seed=seed), turn, k, np.zeros(0, np.int32))
        for seed, turn, k in counters
    ]
    rows = np.tile(logits, (len(requests), 1))
    got = sample(rows, requests, None)
    assert [one.token_id for one in got] == [
        int(uniform(seed, turn, k) * 2048) for seed, turn, k in counters
    ]


def test_the_comparison_finds_a_wrong_sampler() -> None:
    """Off by one in k; in order of probability instead of token id; a cut without its ties; float32
    sums of a top-p that stops one token late."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(8, 200)).astype(np.float32) * 2
    requests = [request(SamplingParams(seed=n, top_p=0.8), k=n) for n in range(8)]
    assert differing(sample(logits, requests), logits, requests) == []
    off_by_one = [replace(one, k=one.k + 1) for one in requests]
    assert len(differing(sample(logits, off_by_one), logits, requests)) > 3
    order = np.argsort(-logits, axis=1, kind="stable")
    by_probability = [
        replace(one, token_id=int(order[n, one.token_id or 0]))
        for n, one in enumerate(sample(np.take_along_axis(logits, order, 1), requests))
    ]
    assert len(differing(by_probability, logits, requests)) > 3
    wider = [replace(one, params=replace(one.params, top_p=0.97)) for one in requests]
    assert differing(sample(logits, wider), logits, requests)
    tied = np.zeros((6, 200), np.float32)
    cut = [request(SamplingParams(seed=n, top_k=60), k=n) for n in range(6)]
    assert differing(sample(tied, cut), tied, cut) == []
    others = [replace(one, params=replace(one.params, top_k=0)) for one in cut]
    assert len(differing(sample(tied, others), tied, cut)) > 2


def test_greedy_is_exact_and_ties_go_to_the_lower_id() -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[1, [70, 200]] = 3.0
    logits[2, 299] = np.float32(1e-30)
    logits[3] = -0.0
    logits[3, 130] = 0.0
    got = sample(logits, [request(GREEDY)] * 4)
    assert [one.token_id for one in got] == [0, 70, 299, 0]


def test_penalties_are_rounded_as_on_the_host() -> None:
    """Greedy over scores that differ in the last bit: one fused multiply-add would show."""
    rng = np.random.default_rng(4)
    base = np.float32(rng.normal(size=300) * 0.001 + 3.7)
    history = [int(token) for token in rng.integers(0, 300, 900)]
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.013, presence_penalty=0.37
    )
    logits = np.stack([base * np.float32(sign) for sign in (1, -1)])
    requests = [request(params, history)] * 2
    got, wanted = sample(logits, requests), sample_rows(logits, requests)
    assert [one.token_id for one in got] == [one.token_id for one in wanted]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.5, logprobs=True)])
def test_a_row_that_is_not_finite_fails_alone(bad: float | None, params: SamplingParams) -> None:
    logits = np.zeros((3, 200), np.float32)
    logits[:, 150] = 50.0
    if bad is None:
        logits[1] = -np.inf
    else:
        logits[1, 70] = bad
    got = sample(
        logits, [request(replace(params, presence_penalty=penalty), [5]) for penalty in (0, 1, 0)]
    )
    assert [one.token_id for one in got] == [150, None, 150]
    assert [one.failed for one in got] == [None, NOT_FINITE, None]


def test_a_bias_outside_the_vocabulary_fails_its_row() -> None:
    params = SamplingParams(logit_bias=((200, 1.0),))
    (one,) = sample(np.zeros((1, 200), np.float32), [request(params)])
    assert one == Sampled(None, failed=OUTSIDE_VOCABULARY)


@pytest.mark.parametrize("vocab", [3, 200])
def test_logprobs_are_those_of_the_model(vocab: int) -> None:
    rng = np.random.default_rng(5)
    logits = random_rows(rng, 6, vocab)
    logits[0, 1:] = -np.inf
    logits[1] = 1.0
    logits[2] = np.round(logits[2])
    asked = [
        replace(params, logprobs=True, top_logprobs=count, seed=count)
        for params, count in zip(
            [*PARAMS[:4], replace(PARAMS[9], logit_bias=((1, 30.0),)), GREEDY],
            [20, 20, 19, 1, 5, 0],
            strict=True,
        )
    ]
    requests = [request(params, [0, 1, 1]) for params in asked]
    for one, wanted in zip(sample(logits, requests), sample_rows(logits, requests), strict=True):
        assert one.token_id == wanted.token_id
        assert one.logprob is not None
        assert wanted.logprob is not None
        assert one.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-5)
        assert [entry.token_id for entry in one.top] == [entry.token_id for entry in wanted.top]
        assert [entry.logprob for entry in one.top] == pytest.approx(
            [entry.logprob for entry in wanted.top], abs=1e-5
        )


def test_rows_that_do_not_fit_the_pool_are_drawn_on_the_host() -> None:
    rng = np.random.default_rng(8)
    logits = random_rows(rng, 3, 300)
    history = list(range(100))
    params = SamplingParams(presence_penalty=1.5, logprobs=True)
    requests = [request(replace(params, seed=n), history) for n in range(3)]
    sampler = DeviceSampler(3, 300, DEVICE, pool_size=150, sizes=SMALL)
    rows = torch.tensor(logits, device=DEVICE)
    sampler.prepare(requests)
    sampler.run(rows)
    got = sampler.read(rows)
    assert differing(got, logits, requests) == []
    assert sampler.tokens.tolist()[1:] == [-1, -1]


def test_a_step_leaves_nothing_for_the_next_and_logits_as_they_were() -> None:
    rng = np.random.default_rng(9)
    sampler = DeviceSampler(6, 300, DEVICE, sizes=SMALL)
    for count in (6, 2, 5):
        logits = random_rows(rng, 6, 300)
        requests = [random_request(rng, 300) for _ in range(count)]
        rows = torch.tensor(logits, device=DEVICE)
        sampler.prepare(requests)
        sampler.run(rows)
        got = sampler.read(rows)
        assert len(got) == count
        assert differing(got, logits[:count], requests) == []
        assert sampler.tokens.tolist()[count:] == [-1] * (6 - count)
        assert np.array_equal(rows.cpu().numpy(), logits)


def test_what_scratch_memory_held_does_not_matter() -> None:
    rng = np.random.default_rng(11)
    logits = random_rows(rng, 6, 300)
    requests = [random_request(rng, 300) for _ in range(6)]
    rows, told = torch.tensor(logits, device=DEVICE), []
    for fill in (0, -7):
        sampler = DeviceSampler(6, 300, DEVICE, sizes=SMALL)
        sampler.prepare(requests)
        buffers = sampler._buffers
        for name, scratch in vars(buffers).items():
            if isinstance(scratch, torch.Tensor) and name not in ("wide", "words", "pool"):
                scratch.fill_(float("nan") if fill and scratch.is_floating_point() else fill)
        sampler.run(rows)
        told.append(sampler.read())
    assert told[0] == told[1]
    assert differing(told[0], logits, requests) == []


def test_rows_may_be_a_slice_of_wider_ones() -> None:
    rng = np.random.default_rng(10)
    wide = torch.tensor(random_rows(rng, 4, 320), device=DEVICE)[:, :300]
    requests = [random_request(rng, 300) for _ in range(4)]
    sampler = DeviceSampler(8, 300, DEVICE, sizes=SMALL)
    sampler.prepare(requests)
    sampler.run(wide)
    assert differing(sampler.read(), wide.cpu().numpy(), requests) == []


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        DeviceSampler(1, MAX_VOCAB + 1, DEVICE)
    sampler = DeviceSampler(2, 30, DEVICE)
    assert sampler.nbytes > 2 * 30 * 4
    with pytest.raises(ValueError, match="3 requests"):
        sampler.prepare([request(GREEDY)] * 3)
    for shape in ((3, 30), (2, 31), (30,)):
        with pytest.raises(ValueError, match="logits"):
            sampler.run(torch.zeros(shape, device=DEVICE))
