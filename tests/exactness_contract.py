"""An engine against the oracle, against recorded stock values, and against wrong rules.

One check for all: the largest difference of any logit of any token, `MAX_ERROR` in float32. The wrong
rules of the last test fail that same check by orders of magnitude. Run by test_engine_contract.py on every
engine of `engine_contract.ENGINES` that computes in float32.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from engine.protocol import Engine, Logits, Row, StepPlan
from tests.engine_contract import MakeEngine
from tests.engine_fixtures import (
    PARTIAL_ROTARY,
    cached_tensors,
    feed,
    random_tokens,
    row_for,
    tiny_shape,
    window_of,
)
from tests.reference import Floats, ReferenceDecoder, Rule
from tests.tiny_models import FAMILIES, tiny_token_ids

DATA = Path(__file__).resolve().parent / "data"
MAX_ERROR = 1e-4
CAPACITY, MAX_CHUNK = 40, 20
PINNED = CAPACITY // 2
LENGTH = 300
MIXED = (1, 3, 16, 1, MAX_CHUNK, 7)


def error(got: Floats, wanted: Floats) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max())


def oracle(rule: Rule, family: str = "llama") -> ReferenceDecoder:
    return ReferenceDecoder(tiny_shape(family), cached_tensors(family), rule)


@functools.cache
def oracle_logits(sinks: int, length: int = LENGTH, family: str = "llama", seed: int = 7) -> Floats:
    tokens = random_tokens(seed, length)
    return oracle(Rule(sinks, CAPACITY - sinks), family).push_all(0, tokens)


def shared(make: MakeEngine) -> Engine:
    """The engine that most tests share."""
    return make(capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=7)


WRONG = {
    "no sinks": Rule(4, CAPACITY - 4, no_sinks=True),
    "no position shift": Rule(4, CAPACITY - 4, no_shift=True),
    "one key too few": Rule(4, CAPACITY - 4, one_key_too_few=True),
}


class ExactnessContract:
    """`make` is a fixture that gives an engine of a model family, the same for the same arguments."""

    @pytest.mark.parametrize("chunk", [1, 3, 16, MAX_CHUNK])
    @pytest.mark.parametrize("sinks", [0, 4, PINNED])
    def test_every_chunking_equals_the_oracle_while_the_ring_wraps(
        self, make: MakeEngine, sinks: int, chunk: int
    ) -> None:
        engine = shared(make)
        window = window_of(engine.spec, sinks)
        assert 5 * window.ring_tokens < LENGTH
        got = feed(engine, random_tokens(7, LENGTH), row_for(window), [chunk])
        assert error(got, oracle_logits(sinks)) < MAX_ERROR

    @pytest.mark.parametrize("family", [*FAMILIES, PARTIAL_ROTARY])
    def test_every_family_equals_the_oracle(self, make: MakeEngine, family: str) -> None:
        engine = make(family, capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=1)
        got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), MIXED)
        assert error(got, oracle_logits(4, 150, family)) < MAX_ERROR

    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_stock_transformers_before_anything_slides(
        self, make: MakeEngine, family: str
    ) -> None:
        stock = np.load(DATA / "stock_logits_tiny.npz")
        tokens = tiny_token_ids(family, 48)
        engine = make(family, capacity=64, max_chunk=32, slots=1)
        got = feed(engine, tokens, row_for(window_of(engine.spec, 4)), [7, 1])
        assert error(got[stock[f"{family}/positions"]], stock[f"{family}/logits"]) < MAX_ERROR

    def test_conversations_of_different_lengths_share_steps(self, make: MakeEngine) -> None:
        """Random plans: each conversation decodes, prefills a chunk or rests."""
        pins = (0, 4, PINNED, 4, 1)
        engine = make(capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=len(pins) + 2)
        rng = np.random.default_rng(3)
        slots = rng.permutation(engine.max_resident)[: len(pins)]
        tokens = [random_tokens(20 + n, 170 - 20 * n) for n in range(len(pins))]
        done: list[list[Logits]] = [[] for _ in pins]
        length = [0] * len(pins)
        kinds = set()
        while any(length[n] < len(tokens[n]) for n in range(len(pins))):
            rows, who = [], []
            for n in rng.permutation(len(pins)):
                count = int(rng.choice([0, 1, 1, 1, 5, MAX_CHUNK]))
                part = tokens[n][length[n] : length[n] + count]
                if len(part):
                    window = window_of(engine.spec, pins[n])
                    rows.append(Row(int(slots[n]), length[n], part, window, logits="all"))
                    who.append(n)
            kinds.add((any(len(r.tokens) == 1 for r in rows), any(len(r.tokens) > 1 for r in rows)))
            for n, row, result in zip(
                who, rows, engine.step(StepPlan(tuple(rows))).rows, strict=True
            ):
                assert result.logits is not None
                done[n].append(result.logits)
                length[n] += len(row.tokens)
        assert (True, True) in kinds
        for n, sinks in enumerate(pins):
            wanted = oracle_logits(sinks, len(tokens[n]), "llama", 20 + n)
            assert error(np.concatenate(done[n]), wanted) < MAX_ERROR

    @pytest.mark.parametrize("offset", [100_003, 4_000_037, 16_000_000])
    @pytest.mark.parametrize("sinks", [4, PINNED])
    def test_far_into_a_stream(self, make: MakeEngine, sinks: int, offset: int) -> None:
        """The conversation is old: sinks at 0, the rest at token_index `offset` and beyond."""
        engine = shared(make)
        window = window_of(engine.spec, sinks)
        first, rest = random_tokens(1, sinks), random_tokens(2, 120)
        reference = oracle(Rule(sinks, CAPACITY - sinks))
        feed(engine, random_tokens(9, 90), row_for(window, 1), [MAX_CHUNK])
        got = [feed(engine, first, row_for(window, 1, 0, offset), [3])]
        got.append(feed(engine, rest, row_for(window, 1, offset, offset), MIXED))
        wanted = [reference.push_all(0, first), reference.push_all(offset, rest)]
        assert error(np.concatenate(got), np.concatenate(wanted)) < MAX_ERROR

    @pytest.mark.parametrize("sinks", [0, 4])
    def test_bounded_replay_leaves_out_what_it_did_not_replay(
        self, make: MakeEngine, sinks: int
    ) -> None:
        """A slot full of another conversation's keys; only tokens from `begin` on are replayed."""
        engine = shared(make)
        window, begin = window_of(engine.spec, sinks), 207
        tokens = random_tokens(5, 300)
        feed(engine, random_tokens(6, 200), row_for(window, 2), [MAX_CHUNK])
        reference = oracle(Rule(sinks, CAPACITY - sinks))
        if sinks:
            feed(engine, tokens[:sinks], row_for(window, 2, 0, begin), [MAX_CHUNK])
            reference.push_all(0, tokens[:sinks])
        got = feed(engine, tokens[begin:], row_for(window, 2, begin, begin), [13])
        assert error(got, reference.push_all(begin, tokens[begin:])) < MAX_ERROR

    @pytest.mark.parametrize("forgotten", [1, 5, 16])
    def test_rewind_is_exact(self, make: MakeEngine, forgotten: int) -> None:
        """The newest tokens are dropped and others take their place, after the ring has wrapped."""
        engine = shared(make)
        window, length = window_of(engine.spec, 4), 170
        assert window.can_rewind(length, length - forgotten)
        reference = oracle(Rule(4, CAPACITY - 4))
        tokens, others = random_tokens(7, length), random_tokens(8, 60)
        feed(engine, tokens, row_for(window, 3), [MAX_CHUNK])
        reference.push_all(0, tokens)
        reference.forget_after(length - forgotten)
        got = feed(engine, others, row_for(window, 3, length - forgotten), MIXED)
        assert error(got, reference.push_all(length - forgotten, others)) < MAX_ERROR

    def test_a_chunk_that_holds_sinks_and_queries_beyond_capacity(self, make: MakeEngine) -> None:
        """Only with max_chunk near capacity; the engine cuts such a chunk in two."""
        engine = make(capacity=16, max_chunk=64, slots=1)
        tokens = random_tokens(4, 130)
        got = feed(engine, tokens, row_for(window_of(engine.spec, 6)), [64])
        assert error(got, oracle(Rule(6, 10)).push_all(0, tokens)) < MAX_ERROR

    @pytest.mark.parametrize("name", WRONG)
    def test_wrong_rules_fail_the_same_check_loudly(self, make: MakeEngine, name: str) -> None:
        engine = shared(make)
        tokens = random_tokens(7, 150)
        got = feed(engine, tokens, row_for(window_of(engine.spec, 4)), [MAX_CHUNK])
        wrong = oracle(WRONG[name]).push_all(0, tokens)
        before = CAPACITY - 4 - 1
        assert error(got[:before], wrong[:before]) < MAX_ERROR
        assert error(got, wrong) > 1000 * MAX_ERROR
