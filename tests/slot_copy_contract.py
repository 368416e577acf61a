"""What every engine with host slots does: copies are whole, exact, in order, and before the rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.protocol import Engine, Row, SlotCopy, StepPlan, num_host_slots
from engine.window import SinkWindow
from tests.engine_fixtures import feed, random_tokens, row_for, window_of

CAPACITY, MAX_CHUNK, SLOTS, HOST_SLOTS, VOCAB = 32, 12, 4, 2, 259
LENGTH = 90
"""Tokens of a conversation before it is copied: the ring has wrapped more than once."""


def conversation(engine: Engine, kv_slot: int, seed: int, sinks: int = 4) -> SinkWindow:
    """Run LENGTH tokens of it."""
    window = window_of(engine.spec, sinks)
    feed(engine, random_tokens(seed, LENGTH, VOCAB), row_for(window, kv_slot), [MAX_CHUNK])
    return window


def goes_on(kv_slot: int, window: SinkWindow) -> Row:
    return Row(kv_slot, LENGTH, random_tokens(99, 7, VOCAB), window, logits="all")


def logits_of(
    engine: Engine, row: Row, copies: tuple[SlotCopy, ...] = ()
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    (result,) = engine.step(StepPlan((row,), copies)).rows
    assert result.logits is not None
    return result.logits


class SlotCopyContract:
    """`engine` is a fixture that gives a fresh engine with SLOTS kv_slots and HOST_SLOTS host slots."""

    def test_a_conversation_saved_and_restored_elsewhere_goes_on_exactly(
        self, engine: Engine
    ) -> None:
        window = conversation(engine, 0, seed=1)
        conversation(engine, 3, seed=1)
        wanted = logits_of(engine, goes_on(3, window))
        assert num_host_slots(engine) == HOST_SLOTS
        # The row overwrites what is saved, and a whole conversation after it.
        stranger = Row(0, 0, random_tokens(2, MAX_CHUNK, VOCAB), window_of(engine.spec, 9))
        engine.step(StepPlan((stranger,), (SlotCopy("save", 0, 1),)))
        conversation(engine, 0, seed=3)
        conversation(engine, 2, seed=4)
        got = logits_of(engine, goes_on(2, window), (SlotCopy("restore", 2, 1),))
        assert (got == wanted).all()
        changed = conversation(engine, 1, seed=5)
        assert not (logits_of(engine, goes_on(1, changed)) == wanted).all()

    def test_two_conversations_change_places_in_one_step(self, engine: Engine) -> None:
        first, second = conversation(engine, 0, seed=1), conversation(engine, 1, seed=2, sinks=6)
        conversation(engine, 2, seed=1)
        conversation(engine, 3, seed=2, sinks=6)
        wanted = [logits_of(engine, goes_on(2, first)), logits_of(engine, goes_on(3, second))]
        copies = (
            SlotCopy("save", 0, 0),
            SlotCopy("save", 1, 1),
            SlotCopy("restore", 1, 0),
            SlotCopy("restore", 0, 1),
        )
        rows = (goes_on(1, first), goes_on(0, second))
        for result, logits in zip(engine.step(StepPlan(rows, copies)).rows, wanted, strict=True):
            assert result.logits is not None
            assert np.abs(result.logits - logits).max() < self.tolerance(engine)

    def tolerance(self, engine: Engine) -> float:
        # Company changes the order of summation; 8-bit activations round to the other side.
        return 1e-4 if engine.spec.weight_format == "float32" else 1.0

    def test_a_host_slot_is_used_again_in_the_same_step(self, engine: Engine) -> None:
        window = conversation(engine, 0, seed=1)
        conversation(engine, 1, seed=2)
        wanted = [logits_of(engine, dataclasses.replace(goes_on(n, window))) for n in (0, 1)]
        conversation(engine, 0, seed=1)
        conversation(engine, 1, seed=2)
        engine.step(StepPlan((), (SlotCopy("save", 0, 0),)))
        engine.step(StepPlan((), (SlotCopy("restore", 2, 0), SlotCopy("save", 1, 0))))
        got = logits_of(engine, goes_on(2, window))
        assert (got == wanted[0]).all()
        got = logits_of(engine, goes_on(3, window), (SlotCopy("restore", 3, 0),))
        assert (got == wanted[1]).all()

    def test_copies_that_name_no_slot_are_refused_before_anything_changes(
        self, engine: Engine
    ) -> None:
        window = conversation(engine, 0, seed=1)
        conversation(engine, 1, seed=1)
        wanted = logits_of(engine, goes_on(1, window))
        good = SlotCopy("restore", 0, 0)
        for bad, problem in (
            (SlotCopy("save", SLOTS, 0), r"copies\[1\].kv_slot"),
            (SlotCopy("save", -1, 0), r"copies\[1\].kv_slot"),
            (SlotCopy("restore", 0, HOST_SLOTS), r"copies\[1\].host_slot"),
            (SlotCopy("save", 0, -1), r"copies\[1\].host_slot"),
        ):
            with pytest.raises(ValueError, match=problem):
                engine.step(StepPlan((), (good, bad)))
        assert (logits_of(engine, goes_on(0, window)) == wanted).all()
