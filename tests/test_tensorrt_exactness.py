"""The TensorRT graph, its inputs and its engine against the oracle, run by ONNX Runtime in float32.

The same check as test_exactness.py: the largest difference of any logit of any token. The graph is the one
that a plan is built from, with weights as inputs and its cache bound as input and output at one address.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from engine.float_reference import FloatDecoder, Passage
from engine.protocol import EngineDead, Logits, Row, StepPlan
from engine.tensorrt_engine import TensorRtEngine
from engine_build.spec import WeightFormat
from tests.engine_fixtures import (
    PARTIAL_ROTARY,
    feed,
    random_tokens,
    row_for,
    window_of,
)
from tests.exactness_contract import (
    CAPACITY,
    LENGTH,
    MAX_CHUNK,
    MAX_ERROR,
    MIXED,
    PINNED,
    WRONG,
    error,
    oracle,
    oracle_logits,
)
from tests.reference import Rule
from tests.tensorrt_on_onnx import (
    OnnxPlanRuntime,
    exported_weights,
    make_tensorrt_engine,
    runtime_of,
)
from tests.tiny_models import FAMILIES


@functools.cache
def shared_engine() -> TensorRtEngine:
    return make_tensorrt_engine(capacity=CAPACITY, max_chunk=MAX_CHUNK)


@pytest.mark.parametrize("sizes", [(1,), (MAX_CHUNK,), MIXED])
@pytest.mark.parametrize("sinks", [0, 4, PINNED])
def test_every_chunking_equals_the_oracle_while_the_ring_wraps(
    sinks: int, sizes: tuple[int, ...]
) -> None:
    engine = shared_engine()
    window = window_of(engine.spec, sinks)
    assert 4 * window.ring_tokens < LENGTH
    got = feed(engine, random_tokens(7, LENGTH), row_for(window), sizes)
    assert error(got, oracle_logits(sinks)) < MAX_ERROR


@pytest.mark.parametrize("family", [*FAMILIES, PARTIAL_ROTARY])
def test_every_family_equals_the_oracle(family: str) -> None:
    engine = make_tensorrt_engine(family, capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=1)
    got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), MIXED)
    assert error(got, oracle_logits(4, 150, family)) < MAX_ERROR


def test_a_ring_no_larger_than_the_window_is_written_a_token_at_a_time() -> None:
    engine = shared_engine()
    full = window_of(engine.spec, 4)
    tight = type(full)(4, full.window_tokens, full.window_tokens)
    got = feed(engine, random_tokens(7, 150), row_for(tight, 1), [MAX_CHUNK])
    assert error(got, oracle_logits(4)[:150]) < MAX_ERROR


def test_conversations_of_different_lengths_share_steps() -> None:
    """Random plans: each conversation decodes, prefills a chunk or rests; more rows than one pass holds."""
    pins = (0, 4, PINNED, 4, 1, 7)
    engine = make_tensorrt_engine(capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=len(pins) + 2)
    rng = np.random.default_rng(3)
    slots = rng.permutation(engine.max_resident)[: len(pins)]
    tokens = [random_tokens(20 + n, 170 - 20 * n) for n in range(len(pins))]
    done: list[list[Logits]] = [[] for _ in pins]
    length = [0] * len(pins)
    while any(length[n] < len(tokens[n]) for n in range(len(pins))):
        rows, who = [], []
        for n in rng.permutation(len(pins)):
            count = int(rng.choice([0, 1, 1, 1, 5, MAX_CHUNK]))
            part = tokens[n][length[n] : length[n] + count]
            if len(part):
                window = window_of(engine.spec, pins[n])
                rows.append(Row(int(slots[n]), length[n], part, window, logits="all"))
                who.append(n)
        for n, row, result in zip(who, rows, engine.step(StepPlan(tuple(rows))).rows, strict=True):
            assert result.logits is not None
            done[n].append(result.logits)
            length[n] += len(row.tokens)
    batches = {size.batch for size in runtime_of(engine).sizes}
    assert batches == {1, 2, 4}
    for n, sinks in enumerate(pins):
        wanted = oracle(Rule(sinks, CAPACITY - sinks)).push_all(0, tokens[n])
        assert error(np.concatenate(done[n]), wanted) < MAX_ERROR


@pytest.mark.parametrize("offset", [100_003, 4_000_037, 16_000_000, 2**31 + 5])
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
@pytest.mark.parametrize("chunk", [1, MAX_CHUNK])
def test_rewind_is_exact(forgotten: int, chunk: int) -> None:
    """The newest tokens are dropped and others take their place, after the ring has wrapped.

    A padded chunk would have written beyond them, over keys that are seen again.
    """
    engine = shared_engine()
    window, length = window_of(engine.spec, 4), 170
    assert window.can_rewind(length, length - forgotten)
    reference = oracle(Rule(4, CAPACITY - 4))
    tokens, others = random_tokens(7, length), random_tokens(8, 60)
    feed(engine, tokens, row_for(window, 3), [chunk])
    reference.push_all(0, tokens)
    reference.forget_after(length - forgotten)
    got = feed(engine, others, row_for(window, 3, length - forgotten), MIXED)
    assert error(got, reference.push_all(length - forgotten, others)) < MAX_ERROR


def test_a_chunk_that_holds_sinks_and_queries_beyond_capacity() -> None:
    engine = make_tensorrt_engine(capacity=16, max_chunk=64, slots=1)
    tokens = random_tokens(4, 130)
    got = feed(engine, tokens, row_for(window_of(engine.spec, 6)), [64])
    assert error(got, oracle(Rule(6, 10)).push_all(0, tokens)) < MAX_ERROR


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_fail_the_same_check_loudly(name: str) -> None:
    engine = shared_engine()
    got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), [MAX_CHUNK])
    wrong = oracle(WRONG[name]).push_all(0, random_tokens(7, 150))
    before = CAPACITY - 4 - 1
    assert error(got[:before], wrong[:before]) < MAX_ERROR
    assert error(got, wrong) > 1000 * MAX_ERROR


@pytest.mark.parametrize("family", ["llama", "llama-mha-tied", "qwen3"])
@pytest.mark.parametrize(("weight_format", "most"), [("float16", 0.08), ("int8", 2.0)])
def test_formats_of_the_target_stay_near_float32(
    weight_format: WeightFormat, most: float, family: str
) -> None:
    """All in float16 but softmax and rotation, as in the plan; with float16 or 8-bit weights."""
    engine = make_tensorrt_engine(
        family, capacity=CAPACITY, weight_format=weight_format, kv_dtype="float16", slots=1
    )
    got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), MIXED)
    wanted = oracle_logits(4, 150, family)
    assert MAX_ERROR < error(got, wanted) < most
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_four_bits_compute_with_what_is_stored(family: str) -> None:
    """All in float16, against a reference on the rounded weights; rounding them changes a tiny model more."""
    engine = make_tensorrt_engine(
        family, capacity=CAPACITY, weight_format="int4", kv_dtype="float16", slots=1
    )
    got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), MIXED)
    decoder = FloatDecoder(engine.spec.model, exported_weights(engine.spec, family))
    passage = Passage(random_tokens(7, 150), np.arange(150), 4, CAPACITY - 4)
    wanted = decoder.head()(decoder.hidden(passage)).astype(np.float32)
    assert MAX_ERROR < error(got, wanted) < 0.08
    assert error(oracle_logits(4, 150, family), wanted) > 1


def test_what_poisoned_a_slot_does_not_outlive_its_conversation() -> None:
    """A key or value that is not finite makes NaN of every product, seen or not."""
    engine = shared_engine()
    window = window_of(engine.spec, 4)
    feed(engine, random_tokens(6, 100), row_for(window, 2), [MAX_CHUNK])
    for cache in runtime_of(engine).caches.values():
        cache[:] = np.nan
    got = feed(engine, random_tokens(7, 100), row_for(window, 2), MIXED)
    assert error(got, oracle_logits(4)[:100]) < MAX_ERROR


def test_a_failing_pass_kills_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_tensorrt_engine()

    def fail(*arguments: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(OnnxPlanRuntime, "run", fail)
    with pytest.raises(EngineDead, match="tensorrt-rtx: an illegal memory access"):
        engine.step(StepPlan((Row(0, 0, random_tokens(1, 3), window_of(engine.spec, 4)),)))
