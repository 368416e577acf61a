"""Plans cross to other ranks whole, or not at all."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan_codec import UNSAMPLED, PlanDamaged, decode_plan, encode_plan
from engine.protocol import Row, SampleRequest, SlotCopy, StepPlan
from engine.sampling import SamplingParams
from engine.window import SinkWindow

IDS = st.integers(0, 2**31 - 1)
REQUEST = SampleRequest(SamplingParams(seed=3), 1, 4, np.arange(9, dtype=np.int32))


@st.composite
def rows(draw: st.DrawFn) -> Row:
    tokens = np.array(draw(st.lists(IDS, min_size=1, max_size=9)), np.int32)
    recent = draw(st.integers(1, 10_000))
    window = SinkWindow(draw(st.integers(0, 99)), recent, recent + draw(st.integers(0, 99)))
    start, slot = draw(st.integers(0, 2**40)), draw(st.integers(0, 2**20))
    sample = draw(st.sampled_from([None, REQUEST]))
    logits = draw(st.sampled_from(["none", "last", "all"]))
    return Row(slot, start, tokens, window, draw(st.integers(0, 2**40)), sample, logits)  # type: ignore[arg-type]


COPIES = st.builds(
    SlotCopy, st.sampled_from(["save", "restore"]), st.integers(0, 2**20), st.integers(0, 2**20)
)
PLANS = st.builds(
    StepPlan,
    st.lists(rows(), max_size=5).map(tuple),
    st.lists(COPIES, max_size=4).map(tuple),
)
PLAN = StepPlan(
    (Row(3, 70, np.arange(5, dtype=np.int32), SinkWindow(4, 36, 40), 9, REQUEST, "all"),)
)


@given(PLANS)
def test_a_plan_comes_through(plan: StepPlan) -> None:
    got = decode_plan(encode_plan(plan))
    assert got.copies == plan.copies
    assert len(got.rows) == len(plan.rows)
    for row, wanted in zip(got.rows, plan.rows, strict=True):
        assert row.tokens.dtype == np.int32
        assert row.tokens.tolist() == wanted.tokens.tolist()
        assert row.sample is (None if wanted.sample is None else UNSAMPLED)
        for name in ("kv_slot", "start", "window", "window_start", "logits"):
            assert getattr(row, name) == getattr(wanted, name)


@given(PLANS, st.data())
def test_a_changed_byte_is_found(plan: StepPlan, data: st.DataObject) -> None:
    encoded = bytearray(encode_plan(plan))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PlanDamaged):
        decode_plan(bytes(encoded))


@given(st.binary(max_size=200))
def test_other_bytes_are_no_plan(noise: bytes) -> None:
    with pytest.raises(PlanDamaged):
        decode_plan(noise)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, -1, -4, -20])
def test_a_cut_plan_is_found(cut: int) -> None:
    with pytest.raises(PlanDamaged):
        decode_plan(encode_plan(PLAN)[:cut])


@pytest.mark.parametrize(
    ("field", "value"), [(2, 6), (2, -1), (3, -1), (4, 0), (5, 2), (7, 3), (7, 7), (7, -1)]
)
def test_a_sound_checksum_does_not_make_a_row_sound(field: int, value: int) -> None:
    encoded = bytearray(encode_plan(PLAN))
    encoded[16 + 8 * field : 24 + 8 * field] = value.to_bytes(8, "little", signed=True)
    encoded[12:16] = zlib.crc32(encoded[16:]).to_bytes(4, "little")
    with pytest.raises(PlanDamaged):
        decode_plan(bytes(encoded))


def test_another_release_is_named() -> None:
    encoded = bytearray(encode_plan(PLAN))
    encoded[4] += 1
    with pytest.raises(PlanDamaged, match="same release"):
        decode_plan(bytes(encoded))
