"""What samplers are tested with: the rules of engine.sampling told slowly, and cases to try them on."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from engine.protocol import SampleRequest
from engine.sampling import SamplingParams

NO_HISTORY = np.zeros(0, np.int32)
GREEDY = SamplingParams(temperature=0.0)


def request(
    params: SamplingParams, history: list[int] | None = None, turn: int = 1, k: int = 0
) -> SampleRequest:
    return SampleRequest(params, turn, k, np.array(history or [], np.int32))


def reference(
    logits: npt.NDArray[np.float32], params: SamplingParams, history: list[int], k: int = 0
) -> npt.NDArray[np.float64]:
    """The probabilities a draw must follow: float64, one token at a time, a full sort."""
    scores = logits.astype(np.float64)
    for token in sorted(set(history)):
        if scores[token] > 0:
            scores[token] /= params.repetition_penalty
        else:
            scores[token] *= params.repetition_penalty
        scores[token] -= params.frequency_penalty * history.count(token)
        scores[token] -= params.presence_penalty
    for token, length in longest_repeats(history, k).items():
        if length >= params.dry_allowed_length:
            excess = length - params.dry_allowed_length
            scores[token] -= params.dry_multiplier * params.dry_base**excess
    for token, bias in params.logit_bias:
        scores[token] += bias
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.temperature == 0:
        kept = order[:1]
    else:
        scores = scores / params.temperature
        kept = order[: params.top_k or len(order)]
        weights = {token: math.exp(scores[token] - scores[order[0]]) for token in kept}
        goal, mass, nucleus = params.top_p * sum(weights.values()), 0.0, []
        for token in kept:
            nucleus.append(token)
            mass += weights[token]
            if params.top_p < 1 and mass >= goal:
                break
        kept = [token for token in nucleus if weights[token] >= params.min_p]
    probabilities = np.zeros(len(scores))
    for token in kept:
        probabilities[token] = math.exp(scores[token] - scores[kept[0]])
    normalised: npt.NDArray[np.float64] = probabilities / probabilities.sum()
    return normalised


def longest_repeats(history: list[int], k: int) -> dict[int, int]:
    """For each token: the most tokens (at most 32) of the end of the reply, the last `k` of `history`,
    that stood somewhere before it."""
    found: dict[int, int] = {}
    for at in range(1, len(history)):
        for length in range(1, min(at, k, 32) + 1):
            if history[at - length : at] == history[len(history) - length :]:
                found[history[at]] = max(found.get(history[at], 0), length)
    return found


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, top_k=5),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.05),
    SamplingParams(top_k=8, top_p=0.7),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.1),
    SamplingParams(top_p=0.97, min_p=0.4),
    SamplingParams(repetition_penalty=1.6, frequency_penalty=0.4, presence_penalty=0.3),
    SamplingParams(top_p=0.9, logit_bias=((3, 4.0), (5, -100.0))),
]


@st.composite
def cases(
    draw_: st.DrawFn,
) -> tuple[npt.NDArray[np.float32], SamplingParams, list[int], int]:
    vocab = draw_(st.sampled_from([1, 2, 7, 300, 1500, 5000]))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32)))
    logits = (rng.normal(size=vocab) * draw_(st.sampled_from([0.1, 1.0, 4.0]))).astype(np.float32)
    peaks = rng.integers(0, vocab, size=draw_(st.integers(0, 20)))
    logits[peaks] += np.float32(draw_(st.sampled_from([0.0, 5.0])))
    params = SamplingParams(
        temperature=draw_(st.sampled_from([0.0, 0.3, 1.0, 1.9])),
        top_k=draw_(st.sampled_from([0, 1, 4, 50, 2000, 10_000])),
        top_p=draw_(st.sampled_from([1.0, 0.99, 0.6, 0.01])),
        min_p=draw_(st.sampled_from([0.0, 0.03, 0.5])),
        repetition_penalty=draw_(st.sampled_from([1.0, 1.3, 0.8])),
        frequency_penalty=draw_(st.sampled_from([0.0, 0.7])),
        presence_penalty=draw_(st.sampled_from([0.0, -0.9])),
        dry_multiplier=draw_(st.sampled_from([0.0, 0.8])),
        dry_base=draw_(st.sampled_from([1.0, 1.75])),
        dry_allowed_length=draw_(st.integers(1, 4)),
        seed=draw_(st.integers(0, 2**64 - 1)),
    )
    words = draw_(st.sampled_from([vocab, min(vocab, 2)]))
    history = [int(token) for token in rng.integers(0, words, size=draw_(st.integers(0, 60)))]
    return logits, params, history, draw_(st.integers(0, len(history)))
