"""From logits to a token: penalties, bias, temperature, top-k, top-p, min-p, one uniform number.

Order of operations, each on what the one before left:

    1. penalties over `history`, all retained tokens of the conversation: repetition (CTRL,
       arXiv 1909.05858: positive logits divided, negative ones multiplied), then
       frequency * count and presence (OpenAI) subtracted; then DRY ("don't repeat yourself", as
       llama.cpp and others have it): where the reply's last n >= dry_allowed_length tokens stood
       before, the token that came next there loses dry_multiplier * dry_base ** (n - allowed)
    2. logit_bias added
    3. temperature divides; below `GREEDY_BELOW` the highest logit is taken and 4-6 do not matter
    4. top-k keeps the k most likely tokens
    5. top-p keeps the fewest most likely ones whose renormalised mass reaches top_p
    6. min-p keeps those at least min_p times as likely as the most likely one
    7. the token is drawn by inverse CDF in order of token id, u = Philox(seed, turn, k)

Ties go to the lower token id. Reported log-probabilities are those of the model itself, before 1 and
at temperature 1, as vLLM reports them. A row's token depends on its own logits and request alone.

No step sorts a vocabulary: a bound on the cut picks a few candidates, and only those are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.philox import uniform

if TYPE_CHECKING:
    from engine.protocol import SampleRequest

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

GREEDY_BELOW = 1e-5
MAX_TOP_LOGPROBS = 20
MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI's value."""

NOT_FINITE = "the model's logits are not finite"
OUTSIDE_VOCABULARY = "logit_bias names a token id outside the vocabulary"

_GROUPS = 1024
_LONGEST_REPEAT = 32
_LIKELY = 1e-3


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. `temperature` 0 is greedy; `seed` keys Philox (64 bits).

    `top_k` 0, `top_p` 1 and `min_p` 0 keep every token; `dry_multiplier` 0 lets text repeat.
    `logit_bias` is (token id, bias) pairs.
    Raises ValueError, its message starting with the field's name, for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", 0.0 <= self.temperature <= 100.0, "0 to 100"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "more than 0, at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "0.01 to 100"),
            ("presence_penalty", abs(self.presence_penalty) <= 100.0, "-100 to 100"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 100.0, "-100 to 100"),
            ("dry_multiplier", 0.0 <= self.dry_multiplier <= 100.0, "0 to 100"),
            ("dry_base", 1.0 <= self.dry_base <= 10.0, "1 to 10"),
            ("dry_allowed_length", 1 <= self.dry_allowed_length <= 1024, "1 to 1024"),
            ("seed", 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
            ("top_logprobs", 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, "0 to 20"),
            (
                "logit_bias",
                all(token >= 0 and abs(bias) <= 100.0 for token, bias in self.logit_bias),
                "token ids with a bias from -100 to 100",
            ),
        )
        for name, fits, allowed in ranges:
            if not fits:
                raise ValueError(f"{name} must be {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a bias apply."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.dry_multiplier != 0.0
            or bool(self.logit_bias)
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats) of a token under the model's distribution at temperature 1."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token, its log-probability if asked for, `top_logprobs` alternatives, likeliest first.

    `failed` says why no token could be drawn; `token_id` is None then.
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()
    failed: str | None = None


def sample_rows(logits: Floats, requests: Sequence[SampleRequest]) -> list[Sampled]:
    """One token per row of float32 [n, vocab] `logits`, which are left as they are.

    A row that is NaN or infinite somewhere decisive fails alone (`Sampled.failed`).
    """
    return [_sample(row, request) for row, request in zip(logits, requests, strict=True)]


def _sample(raw: Floats, request: SampleRequest) -> Sampled:
    params = request.params
    likeliest = int(raw.argmax())
    if not math.isfinite(raw[likeliest]):
        return Sampled(None, failed=NOT_FINITE)
    if any(token >= len(raw) for token, _ in params.logit_bias):
        return Sampled(None, failed=OUTSIDE_VOCABULARY)
    scores = _adjust(raw, request) if params.changes_logits else raw
    if params.greedy:
        token = likeliest if scores is raw else int(scores.argmax())
    else:
        token = _draw(scores, params, uniform(params.seed, request.turn, request.k))
    if not params.logprobs:
        return Sampled(token)
    return _with_logprobs(raw, token, params.top_logprobs)


def _adjust(raw: Floats, request: SampleRequest) -> Floats:
    """Steps 1 and 2. A token that occurs twice gets the same new value written twice."""
    params, history = request.params, request.history
    scores = raw.copy()
    if len(history):
        seen = scores[history]
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            seen = np.where(seen > 0, seen / penalty, seen * penalty)
        if params.frequency_penalty != 0.0:
            counts = np.bincount(history)[history].astype(np.float32)
            seen = seen - np.float32(params.frequency_penalty) * counts
        scores[history] = seen - np.float32(params.presence_penalty)
    if params.dry_multiplier != 0.0:
        tokens, lengths = repeats(history, request.k, params.dry_allowed_length)
        excess = (lengths - params.dry_allowed_length).astype(np.float32)
        # Shortest first: of a token that occurs several times the longest repeat counts.
        scores[tokens] -= np.float32(params.dry_multiplier) * np.float32(params.dry_base) ** excess
    for token, bias in params.logit_bias:
        scores[token] += np.float32(bias)
    return scores


def repeats(history: npt.NDArray[np.int32], k: int, least: int) -> tuple[Ids, Ids]:
    """Where the last `least` or more tokens of the reply, the last `k` of `history`, stood before: the
    tokens that came next there, and how many before each agree (at most 32), shortest first.

    A repeat does not reach back beyond the reply: what a template puts between turns is no repetition.
    """
    longest = min(k, max(least, _LONGEST_REPEAT), len(history) - 1)
    ends = np.flatnonzero(history[:-1] == history[-1]) if longest >= least else np.zeros(0, np.intp)
    lengths = np.ones(len(ends), np.intp)
    alive = np.arange(len(ends))
    for back in range(1, longest):
        at = ends[alive] - back
        alive = alive[(at >= 0) & (history[at] == history[-1 - back])]
        if not len(alive):
            break
        lengths[alive] += 1
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] >= least]
    return history[ends[order] + 1].astype(np.intp), lengths[order]


def _draw(scores: Floats, params: SamplingParams, u: float) -> int:
    """Steps 3 to 7."""
    highest = scores.max()
    scale = np.float32(1.0 / params.temperature)
    ids: Ids | None = None
    if 0 < params.top_k < len(scores):
        ids = largest(scores, params.top_k)
        scores = scores[ids]
    weights = np.exp((scores - highest) * scale)
    kept: Ids | None = None
    if params.top_p < 1.0:
        kept = _nucleus(weights, params.top_p)
    if params.min_p > 0.0:
        if kept is None:
            kept = np.flatnonzero(weights >= np.float32(params.min_p))
        else:
            kept = kept[weights[kept] >= np.float32(params.min_p)]
    if kept is not None:
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    chosen = invert_cdf(weights, u)
    return chosen if ids is None else int(ids[chosen])


def largest(values: Floats, k: int) -> Ids:
    """Indices of the k largest of `values`, ascending; ties go to the lower index. 0 < k <= len."""
    groups = max(2 * k, _GROUPS)
    floor = -np.inf
    if groups <= len(values):
        # k groups have a maximum of at least `floor`, so k values do.
        whole = len(values) // groups * groups
        maxima = values[:whole].reshape(-1, groups).max(axis=0)
        floor = np.partition(maxima, groups - k)[groups - k]
    candidates = np.flatnonzero(values >= floor)
    few = values[candidates]
    if len(few) == k:
        return candidates
    return candidates[_cut(few, np.partition(few, len(few) - k)[len(few) - k], k)]


def _cut(values: Floats, cut: np.float32, count: int) -> npt.NDArray[np.bool_]:
    """Mask of `count` values: all above `cut`, then the first ones equal to it."""
    mask: npt.NDArray[np.bool_] = values > cut
    missing = count - int(np.count_nonzero(mask))
    mask[np.flatnonzero(values == cut)[:missing]] = True
    return mask


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices of the fewest largest weights that reach `top_p` of the sum, ascending."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    # All weights at or below `sure` together are lighter than what may be left out.
    sure = (1.0 - top_p) / top_p * goal / len(weights)
    for floor in (_LIKELY, sure):
        candidates = np.flatnonzero(weights > np.float32(floor))
        few = weights[candidates]
        falling = np.sort(few)[::-1]
        mass = falling.cumsum(dtype=np.float64)
        if len(mass) and mass[-1] >= goal:
            break
    count = min(int(np.searchsorted(mass, goal)) + 1, len(few))
    return candidates[_cut(few, falling[count - 1], count)]


def invert_cdf(weights: Floats, u: float) -> int:
    """The index whose share of the cumulated weights holds `u`, 0 <= u < 1; never one of weight 0.

    A long array is cumulated in blocks first and then inside one of them.
    """
    block = 256
    if len(weights) <= 4 * block:
        return _search(weights.cumsum(dtype=np.float64), u)
    starts = np.arange(0, len(weights), block)
    sums = np.add.reduceat(weights, starts).cumsum(dtype=np.float64)
    chosen = _search(sums, u)
    before = sums[chosen - 1] if chosen else 0.0
    inside = weights[chosen * block : (chosen + 1) * block].cumsum(dtype=np.float64)
    share = (u * sums[-1] - before) / (sums[chosen] - before)
    return chosen * block + _search(inside, min(float(share), 1.0 - 2.0**-53))


def _search(cumulated: npt.NDArray[np.float64], u: float) -> int:
    """First index whose cumulated weight exceeds u times the total; it has weight of its own."""
    return int(np.searchsorted(cumulated, u * cumulated[-1], side="right"))


def _with_logprobs(raw: Floats, token: int, num_top: int) -> Sampled:
    highest = raw.max()
    log_sum = float(highest) + math.log(float(np.exp(raw - highest).sum(dtype=np.float64)))

    def entry(index: int) -> TokenLogprob:
        return TokenLogprob(index, max(float(raw[index]) - log_sum, MIN_LOGPROB))

    top: tuple[TokenLogprob, ...] = ()
    if num_top:
        ids = largest(raw, min(num_top, len(raw)))
        falling = ids[np.argsort(-raw[ids], kind="stable")]
        top = tuple(entry(int(index)) for index in falling)
    return Sampled(token, entry(token), top)
