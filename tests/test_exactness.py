"""The engine against the oracle, against recorded stock values, and against wrong rules.

One check for all: the largest difference of any logit of any token, `MAX_ERROR` in float32. The wrong
rules of the last test fail that same check by orders of magnitude.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from engine.onnx_engine import OnnxEngine
from engine.protocol import Logits, Row, StepPlan
from engine_build.checkpoint import read_checkpoint
from engine_build.graph import export_graph
from engine_build.spec import EngineSpec
from tests.engine_fixtures import (
    PARTIAL_ROTARY,
    cached_tensors,
    feed,
    make_engine,
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


@functools.cache
def shared_engine() -> OnnxEngine:
    return make_engine(capacity=CAPACITY, max_chunk=MAX_CHUNK)


@pytest.mark.parametrize("chunk", [1, 3, 16, MAX_CHUNK])
@pytest.mark.parametrize("sinks", [0, 4, PINNED])
def test_every_chunking_equals_the_oracle_while_the_ring_wraps(sinks: int, chunk: int) -> None:
    engine = shared_engine()
    window = window_of(engine.spec, sinks)
    assert 5 * window.ring_tokens < LENGTH
    got = feed(engine, random_tokens(7, LENGTH), row_for(window), [chunk])
    assert error(got, oracle_logits(sinks)) < MAX_ERROR


@pytest.mark.parametrize("family", [*FAMILIES, PARTIAL_ROTARY])
def test_every_family_equals_the_oracle(family: str) -> None:
    engine = make_engine(family, capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=1)
    got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), MIXED)
    assert error(got, oracle_logits(4, 150, family)) < MAX_ERROR


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_stock_transformers_before_anything_slides(family: str) -> None:
    stock = np.load(DATA / "stock_logits_tiny.npz")
    tokens = tiny_token_ids(family, 48)
    engine = make_engine(family, capacity=64, max_chunk=32, slots=1)
    got = feed(engine, tokens, row_for(window_of(engine.spec, 4)), [7, 1])
    assert error(got[stock[f"{family}/positions"]], stock[f"{family}/logits"]) < MAX_ERROR


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "qwen3"])
def test_the_oracle_equals_stock_transformers(family: str) -> None:
    stock = np.load(DATA / "stock_logits_tiny.npz")
    got = oracle(Rule(4, 60), family).push_all(0, tiny_token_ids(family, 48))
    assert error(got[stock[f"{family}/positions"]], stock[f"{family}/logits"]) < MAX_ERROR


def test_conversations_of_different_lengths_share_steps() -> None:
    """Random plans: each conversation decodes, prefills a chunk or rests."""
    pins = (0, 4, PINNED, 4, 1)
    engine = make_engine(capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=len(pins) + 2)
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
        for n, row, result in zip(who, rows, engine.step(StepPlan(tuple(rows))).rows, strict=True):
            assert result.logits is not None
            done[n].append(result.logits)
            length[n] += len(row.tokens)
    assert (True, True) in kinds
    for n, sinks in enumerate(pins):
        wanted = oracle(Rule(sinks, CAPACITY - sinks)).push_all(0, tokens[n])
        assert error(np.concatenate(done[n]), wanted) < MAX_ERROR


@pytest.mark.parametrize("offset", [100_003, 4_000_037, 16_000_000])
@pytest.mark.parametrize("sinks", [4, PINNED])
def test_far_into_a_stream(sinks: int, offset: int) -> None:
    """The conversation is old: sinks at 0, the rest at token_index `offset` and beyond."""
    engine = shared_engine()
    window = window_of(engine.spec, sinks)
    first, rest = random_tokens(1, sinks), random_tokens(2, 120)
    reference = oracle(Rule(sinks, CAPACITY - sinks))
    feed(engine, random_tokens(9, 90), row_for(window, 1), [MAX_CHUNK])
    got = [feed(engine, first, row_for(window, 1, 0, offset), [3])]
    got.append(feed(engine, rest, row_for(window, 1, offset, offset), MIXED))
    wanted = [reference.push_all(0, first), reference.push_all(offset, rest)]
    assert error(np.concatenate(got), np.concatenate(wanted)) < MAX_ERROR


@pytest.mark.parametrize("sinks", [0, 4])
def test_bounded_replay_leaves_out_what_it_did_not_replay(sinks: int) -> None:
    """A slot full of another conversation's keys; only tokens from `begin` on are replayed."""
    engine = shared_engine()
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
def test_rewind_is_exact(forgotten: int) -> None:
    """The newest tokens are dropped and others take their place, after the ring has wrapped."""
    engine = shared_engine()
    window, length = window_of(engine.spec, 4), 170
    assert window.can_rewind(length, length - forgotten)
    reference = oracle(Rule(4, CAPACITY - 4))
    tokens, others = random_tokens(7, length), random_tokens(8, 60)
    feed(engine, tokens, row_for(window, 3), [MAX_CHUNK])
    reference.push_all(0, tokens)
    reference.forget_after(length - forgotten)
    got = feed(engine, others, row_for(window, 3, length - forgotten), MIXED)
    assert error(got, reference.push_all(length - forgotten, others)) < MAX_ERROR


def test_a_chunk_that_holds_sinks_and_queries_beyond_capacity() -> None:
    """Only with max_chunk near capacity; the engine cuts such a chunk in two."""
    engine = make_engine(capacity=16, max_chunk=64, slots=1)
    tokens = random_tokens(4, 130)
    got = feed(engine, tokens, row_for(window_of(engine.spec, 6)), [64])
    assert error(got, oracle(Rule(6, 10)).push_all(0, tokens)) < MAX_ERROR


WRONG = {
    "no sinks": Rule(4, CAPACITY - 4, no_sinks=True),
    "no position shift": Rule(4, CAPACITY - 4, no_shift=True),
    "one key too few": Rule(4, CAPACITY - 4, one_key_too_few=True),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_fail_the_same_check_loudly(name: str) -> None:
    engine = shared_engine()
    tokens = random_tokens(7, 150)
    got = feed(engine, tokens, row_for(window_of(engine.spec, 4)), [MAX_CHUNK])
    wrong = oracle(WRONG[name]).push_all(0, tokens)
    before = CAPACITY - 4 - 1
    assert error(got[:before], wrong[:before]) < MAX_ERROR
    assert error(got, wrong) > 1000 * MAX_ERROR


@pytest.mark.parametrize("family", ["llama", "llama-mha-tied", "mistral", "qwen2"])
def test_int8_stays_near_float32(family: str) -> None:
    """Odd widths too: 24-wide heads, 96 columns that no long block divides."""
    engine = make_engine(family, capacity=CAPACITY, weight_format="int8", slots=1)
    got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), MIXED)
    wanted = oracle_logits(4, 150, family)
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.98


@pytest.mark.slow
def test_the_demo_model_equals_stock_transformers(demo_gguf: Path, tmp_path: Path) -> None:
    stock = json.loads((DATA / "stock_logits_smollm2.json").read_text())
    checkpoint = read_checkpoint(demo_gguf)
    spec = EngineSpec(checkpoint.shape, 512, 64, "float32", "float32")
    export_graph(spec, checkpoint.tensors, tmp_path, lambda fraction: None)
    (tmp_path / "spec.json").write_text(spec.to_json())
    engine = OnnxEngine(tmp_path, memory_budget_bytes=spec.slot_bytes)
    tokens = np.array(stock["token_ids"], np.int32)
    got = feed(engine, tokens, row_for(window_of(spec, 4)), [16])
    for row in stock["rows"]:
        logits = got[row["position"]]
        assert np.abs(logits[stock["logit_ids"]] - row["logits"]).max() < MAX_ERROR
        assert np.abs(logits[row["top_ids"]] - row["top_logits"]).max() < MAX_ERROR
