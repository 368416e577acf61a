"""The flat arrays of a step, held to one row and one token at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Row, SampleRequest
from engine.rotary import Rotary
from engine.sampling import SamplingParams
from engine.step_inputs import step_inputs
from engine.window import SinkWindow
from engine_build.spec import RopeSpec

ROTARY = Rotary(RopeSpec(theta=100.0, rotary_dim=6))
SAMPLE = SampleRequest(SamplingParams(), 0, 0, np.zeros(0, np.int32))


@st.composite
def rows(draw: st.DrawFn) -> Row:
    start = draw(st.one_of(st.integers(0, 60), st.integers(16_000_000, 16_000_060)))
    window = draw(st.integers(1, 9))
    return Row(
        kv_slot=draw(st.integers(0, 9)),
        start=start,
        tokens=np.array(draw(st.lists(st.integers(0, 99), min_size=1, max_size=5)), np.int32),
        window=SinkWindow(draw(st.integers(0, 6)), window, window - 1 + draw(st.integers(1, 4))),
        window_start=draw(st.integers(0, start)),
        sample=draw(st.sampled_from([None, SAMPLE])),
        logits=draw(st.sampled_from(["none", "last", "all"])),
    )


def angles_at(position: int) -> list[float]:
    turns = position / 100.0 ** (np.arange(0, 6, 2) / 6)
    return [*np.cos(turns), *np.sin(turns)]


@given(st.lists(rows(), min_size=1, max_size=5))
def test_tokens_angles_and_rows_are_those_of_the_plan(batch: list[Row]) -> None:
    got = step_inputs(batch, ROTARY)
    assert got.token_ids.tolist() == [token for row in batch for token in row.tokens]
    assert got.rows.tolist() == [
        [
            row.kv_slot,
            len(row.tokens),
            row.start,
            row.window.sink_tokens,
            row.window.window_tokens,
            row.window.ring_tokens,
            row.window_start,
        ]
        for row in batch
    ]
    wanted = [
        [*angles_at(index), *angles_at(row.window.cache_position(index))]
        for row in batch
        for index in range(row.start, row.start + len(row.tokens))
    ]
    assert got.angles.dtype == np.float32
    assert np.allclose(got.angles.reshape(len(wanted), -1), wanted, atol=2e-6)


@given(st.lists(rows(), min_size=1, max_size=5))
def test_logits_are_computed_for_the_tokens_that_want_them_and_no_others(batch: list[Row]) -> None:
    got = step_inputs(batch, ROTARY)
    begin, used = 0, 0
    for row, (first, end) in zip(batch, got.logits_of, strict=True):
        tokens = list(range(begin, begin + len(row.tokens)))
        wants_last = row.sample is not None or row.logits == "last"
        wanted = tokens if row.logits == "all" else tokens[-1:] if wants_last else []
        assert first == used
        assert got.logit_rows[first:end].tolist() == wanted
        begin, used = begin + len(row.tokens), end
    assert len(got.logit_rows) == used
