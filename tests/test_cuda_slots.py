"""Pinned host slots, on lanes that do their work as late and in as odd an order as marks allow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.protocol import SlotCopy

torch = pytest.importorskip("torch")

from engine.cuda_slots import RESTORES, SAVES, STEPS, OneLane, PinnedSlots  # noqa: E402

KV_SLOTS, HOST_SLOTS = 3, 2


class LateLanes:
    """Work waits until it is drawn: from the front of any lane that no mark holds back."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._queues: dict[int, list[Callable[[], None] | Any]] = {n: [] for n in range(3)}
        self._passed: set[int] = set()
        self._next_mark = 0
        self.ignored: set[tuple[int, int]] = set()
        self._lane_of: dict[int, int] = {}

    def put(self, lane: int, work: Callable[[], None]) -> None:
        self._queues[lane].append(work)

    def copy(self, lane: int, target: Any, source: Any) -> None:
        self.put(lane, lambda: target.copy_(source))

    def mark(self, lane: int) -> int:
        mark = self._next_mark
        self._next_mark += 1
        self._lane_of[mark] = lane
        self.put(lane, lambda: self._passed.add(mark))
        return mark

    def wait(self, lane: int, mark: int) -> None:
        if (lane, self._lane_of[mark]) not in self.ignored:
            self._queues[lane].append(mark)

    def run(self) -> None:
        while any(self._queues.values()):
            ready = [
                queue
                for queue in self._queues.values()
                if queue and (callable(queue[0]) or queue[0] in self._passed)
            ]
            assert ready, "the lanes wait for each other"
            work = ready[self._rng.integers(len(ready))].pop(0)
            if callable(work):
                work()


def play(seed: int, ignored: set[tuple[int, int]] | None = None) -> bool:
    """Random copies and steps, late and at once: whether both see and leave the same."""
    rng = np.random.default_rng(seed)
    lanes = LateLanes(rng)
    lanes.ignored = ignored or set()
    late, plain = (torch.arange(KV_SLOTS * 2).reshape(KV_SLOTS, 2) for _ in range(2))
    host = PinnedSlots(late, HOST_SLOTS, lanes)
    at_once = PinnedSlots(plain, HOST_SLOTS)
    host._host.zero_()
    at_once._host.zero_()
    seen: tuple[list[list[int]], list[list[int]]] = ([], [])

    def step(slots: Any, log: list[list[int]], kv_slot: int, value: int) -> None:
        log.append(slots[kv_slot].tolist())
        slots[kv_slot] = value

    for number in range(60):
        kv_slot, host_slot = int(rng.integers(KV_SLOTS)), int(rng.integers(HOST_SLOTS))
        kind = rng.choice(["save", "restore", "step"])
        if kind == "step":
            lanes.put(STEPS, functools.partial(step, late, seen[0], kv_slot, 100 + number))
            step(plain, seen[1], kv_slot, 100 + number)
        else:
            copies = (SlotCopy("save" if kind == "save" else "restore", kv_slot, host_slot),)
            host.run(copies)
            at_once.run(copies)
    lanes.run()
    return seen[0] == seen[1] and bool(
        (late == plain).all() and (host._host == at_once._host).all()
    )


def test_copies_are_in_order_however_late_they_are_made() -> None:
    assert all(play(seed) for seed in range(60))


@pytest.mark.parametrize(
    "ignored",
    [
        (STEPS, SAVES),
        (SAVES, STEPS),
        (RESTORES, STEPS),
        (RESTORES, SAVES),
        (STEPS, RESTORES),
    ],
)
def test_each_wait_is_needed(ignored: tuple[int, int]) -> None:
    assert not all(play(seed, {ignored}) for seed in range(60))


def test_a_step_does_not_wait_for_a_save_and_a_restore_not_for_another() -> None:
    lanes = LateLanes(np.random.default_rng(0))
    slots = torch.zeros((KV_SLOTS, 2))
    host = PinnedSlots(slots, HOST_SLOTS, lanes)
    host.run([SlotCopy("save", 0, 0), SlotCopy("restore", 1, 1)])
    lanes.put(STEPS, lambda: None)
    # Saves never come to their turn.
    lanes._queues[SAVES] = []
    lanes.run()


@pytest.mark.parametrize("num_slots", [0, 2])
def test_in_ordinary_memory_a_copy_is_a_copy(num_slots: int) -> None:
    slots = torch.arange(12.0).reshape(3, 2, 2)
    host = PinnedSlots(slots, num_slots, OneLane())
    assert host.num_slots == num_slots
    host.run([])
    if num_slots:
        host.run([SlotCopy("save", 1, 0), SlotCopy("restore", 2, 0)])
        assert (slots[2] == slots[1]).all()
        slots[1] = 0
        host.run([SlotCopy("restore", 1, 0)])
        assert slots[1].tolist() == [[4.0, 5.0], [6.0, 7.0]]
    host.close()
    host.close()
