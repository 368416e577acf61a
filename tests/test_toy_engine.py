from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.protocol import EngineDead, Logits, Row, RowResult, SampleRequest, StepPlan, TokenIds
from engine.sampling import SamplingParams
from engine.toy_engine import (
    BYTE_VOCAB,
    END_OF_TURN,
    NoisyToyEngine,
    ToyEngine,
    ToyModel,
    ToyText,
    byte_spec,
    toy_reply,
    toy_spec,
)
from engine.window import SinkWindow

SPEC = byte_spec(capacity=12, max_chunk=5)
WINDOW = SinkWindow(3, 9, SPEC.slot_tokens - 3)
PARAMS = SamplingParams(seed=5)
NO_HISTORY = np.zeros(0, np.int32)


def ids(num_tokens: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng(seed).integers(0, BYTE_VOCAB, num_tokens).astype(np.int32)


def sample(k: int = 0, turn: int = 1, params: SamplingParams = PARAMS) -> SampleRequest:
    return SampleRequest(params, turn, k, NO_HISTORY)


def run(engine: ToyEngine, *rows: Row) -> list[RowResult]:
    return list(engine.step(StepPlan(rows)).rows)


def logits_of(engine: ToyEngine, row: Row) -> Logits:
    (result,) = run(engine, row)
    assert result.logits is not None
    return result.logits


def reply(
    engine: ToyEngine,
    tokens: TokenIds,
    chunks: tuple[int, ...] = (5,),
    kv_slot: int = 0,
    window: SinkWindow = WINDOW,
) -> list[int]:
    """Prefill `tokens` in `chunks` (repeated) and decode 40 tokens."""
    start, turn = 0, 0
    while start < len(tokens):
        part = tokens[start : start + chunks[turn % len(chunks)]]
        last = start + len(part) == len(tokens)
        row = Row(kv_slot, start, part, window, sample=sample() if last else None)
        (result,) = run(engine, row)
        start, turn = start + len(part), turn + 1
    out = [result.token_id or 0]
    for k in range(1, 40):
        token = np.array(out[-1:], np.int32)
        (result,) = run(engine, Row(kv_slot, start + k - 1, token, window, sample=sample(k)))
        out.append(result.token_id or 0)
    return out


@pytest.mark.parametrize("chunks", [(1,), (5,), (3, 1, 5)])
@pytest.mark.parametrize("sinks", [0, 3, 6])
@pytest.mark.parametrize("ring", ["whole slot", "tight"])
def test_a_reply_is_the_oracles_for_every_chunking(
    chunks: tuple[int, ...], sinks: int, ring: str
) -> None:
    engine = ToyEngine(SPEC)
    # A tight ring loses keys to a chunk that its first queries still see.
    ring_tokens = SPEC.slot_tokens - sinks if ring == "whole slot" else 11 - sinks
    window = SinkWindow(sinks, 12 - sinks, ring_tokens)
    tokens = ids(70)
    expected = toy_reply(engine.model, window, tokens.tolist(), (PARAMS, 1), 40)
    assert reply(engine, tokens, chunks, window=window) == expected
    assert len(set(expected)) > 5


def test_conversations_do_not_touch_each_other() -> None:
    engine = ToyEngine(SPEC, max_resident=3)
    alone = [reply(ToyEngine(SPEC), ids(30, seed), (5,)) for seed in range(3)]
    starts = range(0, 30, 5)
    for start in starts:
        rows = [
            Row(slot, start, ids(30, slot)[start : start + 5], WINDOW, sample=sample())
            for slot in range(3)
        ]
        results = run(engine, *rows)
    assert [result.token_id for result in results] == [out[0] for out in alone]


def test_whatever_is_visible_changes_the_state() -> None:
    def logits(tokens: TokenIds, start: int = 20, kv_slot: int = 0) -> list[float]:
        engine = ToyEngine(SPEC)
        for first in range(0, 20, 5):
            run(engine, Row(0, first, tokens[first : first + 5], WINDOW))
        row = Row(kv_slot, start, tokens[20:21], WINDOW, logits="last")
        return [float(value) for value in logits_of(engine, row)[0]]

    tokens = ids(21)
    right = logits(tokens)
    for index in range(21):
        changed = tokens.copy()
        changed[index] = (changed[index] + 1) % BYTE_VOCAB
        visible = index < 3 or index > 20 - 9
        assert (logits(changed) != right) == visible, index
    assert logits(tokens, start=19) != right
    assert logits(tokens, start=21) != right
    assert logits(tokens, kv_slot=1) != right


def test_tokens_that_a_bounded_replay_left_out_are_not_seen() -> None:
    whole, replayed = ToyEngine(SPEC), ToyEngine(SPEC)
    tokens = ids(40)
    for first in range(0, 40, 5):
        run(whole, Row(0, first, tokens[first : first + 5], WINDOW))
    # Dirt from another conversation must not matter where window_start hides it.
    for first in range(0, 30, 5):
        run(replayed, Row(0, first, ids(30, 9)[first : first + 5], WINDOW))
    run(replayed, Row(0, 0, tokens[:3], WINDOW))
    for first in range(25, 40, 5):
        run(replayed, Row(0, first, tokens[first : first + 5], WINDOW, window_start=25))
    last = ids(1, 4)
    expected = logits_of(whole, Row(0, 40, last, WINDOW, logits="last"))
    got = logits_of(replayed, Row(0, 40, last, WINDOW, window_start=25, logits="last"))
    assert np.array_equal(expected, got)
    hidden = logits_of(replayed, Row(0, 25, last, WINDOW, window_start=25, logits="last"))
    dirty = logits_of(replayed, Row(0, 25, last, WINDOW, logits="last"))
    assert not np.array_equal(hidden, dirty)


def test_logits_of_all_tokens_are_those_of_single_steps() -> None:
    tokens = ids(5)
    together = logits_of(ToyEngine(SPEC), Row(0, 0, tokens, WINDOW, logits="all"))
    engine = ToyEngine(SPEC)
    assert together.shape == (5, BYTE_VOCAB)
    assert together.dtype == np.float32
    for index in range(5):
        row = Row(0, index, tokens[index : index + 1], WINDOW, logits="last")
        assert np.array_equal(logits_of(engine, row), together[index : index + 1])
    (nothing,) = run(engine, Row(0, 0, tokens, WINDOW))
    assert nothing == RowResult()


def test_seed_turn_and_k_change_the_token() -> None:
    def draws(turn: int, seed: int) -> list[int | None]:
        engine = ToyEngine(SPEC)
        requests = [sample(k, turn, SamplingParams(seed=seed)) for k in range(12)]
        rows = [Row(0, 0, ids(1), WINDOW, sample=one) for one in requests]
        return [run(engine, row)[0].token_id for row in rows]

    assert len(set(draws(1, 1))) > 3
    assert draws(1, 1) == draws(1, 1)
    assert draws(1, 1) != draws(2, 1)
    assert draws(1, 1) != draws(1, 2)


def test_a_noisy_toy_depends_on_its_replica() -> None:
    replies = [reply(NoisyToyEngine(name, SPEC), ids(9)) for name in ("a", "a", "b")]
    assert replies[0] == replies[1]
    assert replies[0] != replies[2]
    assert replies[0] != reply(ToyEngine(SPEC), ids(9))


def test_a_byte_toy_says_words_and_stops() -> None:
    said = bytes(reply(ToyEngine(SPEC), ids(4)))
    assert set(said) <= set(b"abcdefghijklmnopqrstuvwxyz ")
    text = ToyText(stop_period=8)
    model = ToyModel(BYTE_VOCAB, text)
    lengths = [
        len(toy_reply(model, WINDOW, [seed], (PARAMS, 1), 60, frozenset({END_OF_TURN})))
        for seed in range(20)
    ]
    assert 3 < sum(lengths) / len(lengths) < 20
    stopped = reply(ToyEngine(SPEC, text=text), ids(4))
    assert END_OF_TURN in stopped


def test_logprobs_and_failures_come_through() -> None:
    params = SamplingParams(logprobs=True, top_logprobs=2)
    (result,) = run(ToyEngine(SPEC), Row(0, 0, ids(1), WINDOW, sample=sample(params=params)))
    assert result.logprob is not None
    assert result.logprob.token_id == result.token_id
    assert len(result.top) == 2
    params = SamplingParams(logit_bias=((BYTE_VOCAB, 1.0),))
    (result,) = run(ToyEngine(SPEC), Row(0, 0, ids(1), WINDOW, sample=sample(params=params)))
    assert result.failed is not None


def test_impossible_rows_are_refused() -> None:
    engine = ToyEngine(SPEC, max_resident=2)
    good = Row(0, 0, ids(1), WINDOW)
    bad = [
        replace(good, kv_slot=2),
        replace(good, kv_slot=-1),
        replace(good, start=-1),
        replace(good, tokens=NO_HISTORY),
        replace(good, tokens=ids(6)),
        replace(good, tokens=np.array([BYTE_VOCAB], np.int32)),
        replace(good, tokens=np.array([-1], np.int32)),
        replace(good, window=SinkWindow(3, 10, 20)),
        replace(good, window=SinkWindow(3, 9, SPEC.slot_tokens)),
    ]
    for row in bad:
        with pytest.raises(ValueError, match=r"kv_slot|start|tokens|window"):
            run(engine, row)
    with pytest.raises(ValueError, match="twice"):
        run(engine, good, replace(good, start=1))
    engine.close()
    with pytest.raises(EngineDead):
        run(engine, good)


def test_words_must_be_in_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="words"):
        ToyEngine(toy_spec(50, 16, 4))
    with pytest.raises(ValueError, match="stop_id"):
        ToyEngine(toy_spec(50, 16, 4), text=ToyText(words=(), stop_id=50, stop_period=2))
    assert ToyEngine(toy_spec(50, 16, 4), text=ToyText(words=())).spec.model.vocab_size == 50
