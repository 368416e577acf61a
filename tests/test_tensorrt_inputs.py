"""How rows become passes: cut where a write must end, fields that say what the window says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from engine.protocol import Row, SampleRequest, StepPlan
from engine.rotary import Rotary
from engine.sampling import SamplingParams
from engine.tensorrt_inputs import (
    check_rings,
    cut_row,
    decode_inputs,
    prefill_inputs,
    starts_anew,
)
from engine.window import SinkWindow
from engine_build.plan_profiles import Size
from engine_build.spec import RopeSpec
from tests.engine_fixtures import feed, random_tokens, row_for, window_of
from tests.tensorrt_on_onnx import MAX_HELD, OnnxPlanRuntime, make_tensorrt_engine, runtime_of

ROTARY = Rotary(RopeSpec(1e4, 8))
GREEDY = SampleRequest(SamplingParams(temperature=0.0), 0, 0, np.zeros(0, np.int32))


def row(start: int, count: int, window: SinkWindow, **more: Any) -> Row:
    return Row(0, start, random_tokens(1, count), window, **more)


@pytest.mark.parametrize("sinks", [0, 4, 9])
@pytest.mark.parametrize("ring", [12, 13, 20, 31])
def test_pieces_lie_in_a_row_and_overwrite_nothing_that_is_seen(sinks: int, ring: int) -> None:
    window = SinkWindow(sinks, 12, ring)
    for start in range(3 * ring):
        whole = row(start, 11, window)
        pieces = cut_row(0, whole)
        assert [p.begin for p in pieces] == [0, *(p.end for p in pieces[:-1])]
        assert pieces[-1].end == 11
        for piece in pieces:
            first, last = start + piece.begin, start + piece.end - 1
            places = [window.place(index) for index in range(first, last + 1)]
            assert places == list(range(places[0], places[0] + len(places)))
            # The oldest token that the piece's first query sees must outlive the piece's last write.
            if last >= sinks:
                assert last - ring <= first - window.window_tokens
        if ring == 31 and sinks == 0 and start % ring + 11 <= ring:
            assert len(pieces) == 1


def test_a_row_is_cut_where_the_ring_ends() -> None:
    window = SinkWindow(4, 12, 30)
    assert [(p.begin, p.end) for p in cut_row(3, row(4 + 25, 11, window))] == [(0, 5), (5, 11)]
    assert [(p.begin, p.end) for p in cut_row(3, row(4 + 19, 11, window))] == [(0, 11)]
    assert [(p.begin, p.end) for p in cut_row(3, row(0, 11, window))] == [(0, 11)]


def test_a_ring_without_room_for_the_current_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\[0\].window.ring_tokens: 11 < 12 window_tokens"):
        check_rings([row(0, 1, SinkWindow(4, 12, 11))])


def seen(fields: Any, query_ages: Any, places: int) -> Any:
    """The visibility that the graph works out, in plain words: bool [chunk, places]."""
    sinks, window, ring, newest, oldest_age, last = (int(value) for value in fields)
    result = np.zeros((len(query_ages), places), bool)
    for n, query_age in enumerate(query_ages):
        for place in range(places):
            if place < sinks:
                result[n, place] = place <= last - query_age
            elif place < sinks + ring:
                age = (newest - (place - sinks)) % ring
                result[n, place] = (
                    age <= oldest_age and age >= query_age and age - query_age < window
                )
    return result


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window_start", [0, 40])
def test_row_fields_say_what_the_window_says(sinks: int, window_start: int) -> None:
    window = SinkWindow(sinks, 9, 17)
    for start in range(window_start, window_start + 60):
        for piece in cut_row(0, whole := row(start, 6, window, window_start=window_start)):
            inputs = prefill_inputs(whole, piece, False, ROTARY)
            queries = np.arange(start + piece.begin, start + piece.end)
            wanted = window.visible(queries, window.tokens_at(int(queries[-1]) + 1), window_start)
            got = seen(inputs.row_fields[0], inputs.query_ages, window.slot_tokens + 4)
            assert (got[:, : window.slot_tokens] == wanted).all()
            assert not got[:, window.slot_tokens :].any()


def test_a_decode_pass_has_idle_rows_that_see_nothing() -> None:
    window = SinkWindow(4, 12, 20)
    rows = [row(40, 1, window, sample=GREEDY), row(3, 1, window)]
    inputs = decode_inputs(rows, [2, 0], batch=4, spare_place=31, rotary=ROTARY)
    assert (inputs.batch, inputs.chunk) == (4, 1)
    assert inputs.logit_rows.tolist() == [2, 0, 0, 0]
    assert inputs.write_places.tolist() == [3, 31, window.place(40), 31]
    for idle in (1, 3):
        assert not seen(inputs.row_fields[idle], inputs.query_ages, 32).any()
    cos, sin = ROTARY.cos_sin(np.array([40, 15]))
    assert (inputs.angles[:, 2, 0] == np.stack([cos[0], sin[0], cos[1], sin[1]])).all()


def test_a_slot_starts_anew_only_when_nothing_before_can_be_seen() -> None:
    pinned, bare = SinkWindow(4, 12, 20), SinkWindow(0, 12, 20)
    assert starts_anew(row(0, 3, pinned))
    assert not starts_anew(row(50, 3, pinned, window_start=50))  # its sinks are there
    assert starts_anew(row(50, 3, bare, window_start=50))
    assert not starts_anew(row(53, 3, bare, window_start=50))


def test_conversations_move_when_they_begin_to_decode_and_not_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_tensorrt_engine(slots=8)
    window = window_of(engine.spec, 4)
    tokens = random_tokens(3, 60)
    for slot in (5, 6, 7):
        feed(engine, tokens[:20], row_for(window, slot), [20])
    swaps: list[tuple[int, int]] = []
    swap = OnnxPlanRuntime.swap

    def counted(runtime: OnnxPlanRuntime, one: int, other: int) -> None:
        swaps.append((one, other))
        swap(runtime, one, other)

    monkeypatch.setattr(OnnxPlanRuntime, "swap", counted)
    for at in range(20, 40):
        rows = tuple(
            Row(slot, at, tokens[at : at + 1], window, logits="last") for slot in (5, 6, 7)
        )
        results = engine.step(StepPlan(rows)).rows
    assert len(swaps) == 3
    assert {size for size in runtime_of(engine).sizes if size.chunk == 1} == {Size(4, 1, 4)}
    alone = feed(engine, tokens[:40], row_for(window, 0), [20])
    for result in results:
        assert result.logits is not None
        assert np.abs(result.logits - alone[-1]).max() < 1e-4


def test_a_step_with_more_draws_than_can_be_held_draws_in_between() -> None:
    engine = make_tensorrt_engine(slots=8)
    window = window_of(engine.spec, 4)
    firsts = [random_tokens(slot, 1 + slot % 3, 320) for slot in range(8)]
    rows = [Row(slot, 0, firsts[slot], window, sample=GREEDY, logits="last") for slot in range(8)]
    assert len(rows) > MAX_HELD
    together = engine.step(StepPlan(tuple(rows))).rows
    for one, result in zip(rows, together, strict=True):
        assert result.logits is not None
        assert result.token_id == int(result.logits[-1].argmax())
        (alone,) = engine.step(StepPlan((dataclasses.replace(one, logits="none"),))).rows
        assert alone.token_id == result.token_id
