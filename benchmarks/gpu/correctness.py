"""An engine against the float32 reference, on the card, before anything is timed.

The model's real widths with few layers and a small vocabulary, so that the reference fits and every
logit can be compared. The error of a check is ||got - wanted|| / ||wanted|| over all its logits. A check
that a wrong rule passes too proves nothing: each wrong rule must be further away by `WRONG_FACTOR`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.driving import NO_HISTORY, feed, random_tokens, window_of
from benchmarks.gpu.reference import WRONG_RULES, FloatReference, WindowRule
from benchmarks.gpu.shapes import SINK_TOKENS
from engine.protocol import Engine, Logits, Row, SampleRequest, StepPlan, TokenIds
from engine.sampling import SamplingParams, sample_rows
from engine_build.spec import EngineSpec, WeightFormat

MAX_ERROR: Mapping[WeightFormat, float] = {
    "float32": 1e-3,
    "float16": 1e-2,
    "bfloat16": 8e-2,
    "float8": 3.5e-1,
}
WRONG_FACTOR = 3.0
WRONG_UP_TO = 64
"""Largest capacity at which one key more or less stands out from 16-bit rounding."""

MAX_OTHER_TOKENS = 0.005
"""Share of draws that may differ from the host's: u within rounding of an edge of the CDF."""

OFFSETS = (100_003, 4_000_037, 16_000_000)

SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=40, min_p=0.02),
    SamplingParams(temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, logit_bias=((5, 4.0), (9, -8.0)), presence_penalty=0.5),
)


class Checks:
    """All checks of one engine against one reference. `engine` has at least 4 kv_slots."""

    def __init__(self, engine: Engine, reference: FloatReference, device: str) -> None:
        self._engine, self._reference, self._device = engine, reference, device
        self._spec: EngineSpec = engine.spec
        self._bar = MAX_ERROR[self._spec.weight_format]
        self._chunk = self._spec.max_chunk
        self._mixed = (1, 3, min(16, self._chunk), 1, self._chunk, min(7, self._chunk))

    def run(self, draws: int) -> list[dict[str, Any]]:
        """Every check as {"name", "error", "bar"}; "at_least" where more is better.

        `draws` sampled tokens are compared.
        """
        mixed = self._wrapping(self._mixed)
        found = [self._check("mixed chunks, ring wraps", *mixed)]
        found.append(self._check("one token at a time, ring wraps", *self._wrapping((1,))))
        pinned = self._spec.max_sink_tokens
        error = self._wrapping(self._mixed, pinned)
        found.append(self._check(f"{pinned} pinned tokens", *error))
        found.append(self._check("conversations share steps", *self._shared_steps()))
        found += [self._check(f"at token {n:,}", *self._far(n)) for n in OFFSETS]
        found.append(self._check("bounded replay into a used slot", *self._replay()))
        if self._spec.capacity <= WRONG_UP_TO and self._spec.weight_format != "float8":
            found.extend(self._wrong_rules(*mixed))
        found.append(self._sampling(draws))
        return found

    def _check(self, name: str, got: Logits, wanted: Logits) -> dict[str, Any]:
        return {"name": name, "error": relative_error(got, wanted), "bar": self._bar}

    def _length(self) -> int:
        return 3 * self._spec.slot_tokens + 11

    def _wrapping(self, sizes: tuple[int, ...], sinks: int = SINK_TOKENS) -> tuple[Logits, Logits]:
        tokens = self._tokens(1, self._length())
        row = Row(0, 0, NO_HISTORY, window_of(self._spec, sinks))
        return feed(self._engine, tokens, row, sizes), self._wanted(tokens, sinks)

    def _shared_steps(self) -> tuple[Logits, Logits]:
        """Conversations of different lengths and sinks, decoding and prefilling in the same steps."""
        pins = (SINK_TOKENS, 0, self._spec.max_sink_tokens, 1)
        tokens = [self._tokens(30 + n, self._length() - 9 * n) for n in range(len(pins))]
        lengths, done = [0] * len(pins), [[] for _ in pins]  # type: list[int], list[list[Logits]]
        rng = np.random.default_rng(3)
        while any(lengths[n] < len(tokens[n]) for n in range(len(pins))):
            rows, who = [], []
            for n in rng.permutation(len(pins)):
                count = int(rng.choice([0, 1, 1, 5, self._chunk]))
                part = tokens[n][lengths[n] : lengths[n] + min(count, self._chunk)]
                if len(part):
                    window = window_of(self._spec, pins[n])
                    rows.append(Row(int(n), lengths[n], part, window, logits="all"))
                    who.append(n)
            if not rows:
                continue
            results = self._engine.step(StepPlan(tuple(rows))).rows
            for n, row, result in zip(who, rows, results, strict=True):
                if result.logits is None:
                    raise RuntimeError(f"the engine gave no logits: {result.failed}")
                done[n].append(result.logits)
                lengths[n] += len(row.tokens)
        wanted = [self._wanted(tokens[n], sinks) for n, sinks in enumerate(pins)]
        return np.concatenate([np.concatenate(d) for d in done]), np.concatenate(wanted)

    def _far(self, offset: int) -> tuple[Logits, Logits]:
        first, rest = self._tokens(4, SINK_TOKENS), self._tokens(5, self._length())
        window = window_of(self._spec)
        feed(self._engine, first, Row(1, 0, NO_HISTORY, window, offset), self._mixed)
        row = Row(1, offset, NO_HISTORY, window, offset)
        got = feed(self._engine, rest, row, self._mixed)
        indices = np.concatenate([np.arange(SINK_TOKENS), offset + np.arange(len(rest))])
        return got, self._logits(np.concatenate([first, rest]), indices, self._rule(), len(rest))

    def _replay(self) -> tuple[Logits, Logits]:
        """Sinks, then tokens from `begin` on, in a slot full of another conversation's keys."""
        window, begin = window_of(self._spec), 5 * self._spec.capacity + 3
        first, rest = self._tokens(6, SINK_TOKENS), self._tokens(7, 2 * self._spec.capacity)
        other = self._tokens(8, self._length())
        feed(self._engine, other, Row(2, 0, NO_HISTORY, window), [self._chunk])
        feed(self._engine, first, Row(2, 0, NO_HISTORY, window, begin), [self._chunk])
        row = Row(2, begin, NO_HISTORY, window, begin)
        got = feed(self._engine, rest, row, [self._chunk])
        indices = np.concatenate([np.arange(SINK_TOKENS), begin + np.arange(len(rest))])
        return got, self._logits(np.concatenate([first, rest]), indices, self._rule(), len(rest))

    def _wrong_rules(self, got: Logits, wanted: Logits) -> list[dict[str, Any]]:
        tokens = self._tokens(1, self._length())
        indices = np.arange(len(tokens))
        slid = slice(self._spec.capacity, None)
        right = relative_error(got[slid], wanted[slid])
        found = []
        for name, variant in WRONG_RULES.items():
            rule = dataclasses.replace(self._rule(), **variant)
            wrong = self._logits(tokens, indices, rule, len(tokens))
            factor = relative_error(got[slid], wrong[slid]) / max(right, 1e-12)
            found.append(
                {
                    "name": f"wrong rule further away, times: {name}",
                    "error": factor,
                    "bar": WRONG_FACTOR,
                    "at_least": True,
                }
            )
        return found

    def _sampling(self, draws: int) -> dict[str, Any]:
        """Tokens drawn by the engine against engine.sampling on the engine's own logits."""
        window, other, drawn = window_of(self._spec), 0, 0
        slots = 3
        history = self._tokens(9, 40)
        for number in range(draws // slots):
            params = [
                dataclasses.replace(SAMPLING[(number + slot) % len(SAMPLING)], seed=91 * number)
                for slot in range(slots)
            ]
            requests = [
                SampleRequest(one, number, slot, history) for slot, one in enumerate(params)
            ]
            rows = tuple(
                Row(slot, 0, self._tokens(number, 1 + slot), window, 0, requests[slot], "last")
                for slot in range(slots)
            )
            for result, one in zip(self._engine.step(StepPlan(rows)).rows, requests, strict=True):
                if result.logits is None:
                    raise RuntimeError(f"the engine gave no logits: {result.failed}")
                drawn += 1
                other += result.token_id != sample_rows(result.logits, [one])[0].token_id
        name = "share of draws that differ from engine.sampling"
        return {"name": name, "error": other / drawn, "bar": MAX_OTHER_TOKENS, "draws": drawn}

    def _rule(self, sinks: int = SINK_TOKENS) -> WindowRule:
        return WindowRule(sinks, self._spec.capacity - sinks)

    def _tokens(self, seed: int, count: int) -> TokenIds:
        return random_tokens(seed, count, self._spec.model.vocab_size)

    def _wanted(self, tokens: TokenIds, sinks: int) -> Logits:
        return self._logits(tokens, np.arange(len(tokens)), self._rule(sinks), len(tokens))

    def _logits(self, tokens: TokenIds, indices: Any, rule: WindowRule, last: int) -> Logits:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        places = torch.from_numpy(indices.astype(np.int64)).to(self._device)
        wanted: Logits = self._reference.logits(ids, places, rule, last).cpu().numpy()
        return wanted


def relative_error(got: Logits, wanted: Logits) -> float:
    """||got - wanted|| / ||wanted||; infinite if anything is not finite, so that NaN never passes."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    difference = got.astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
