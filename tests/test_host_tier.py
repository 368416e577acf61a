from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.host_tier import HostTier, SlotContent
from engine.protocol import SlotCopy
from engine.residency import Lease, Residency
from engine.window import SinkWindow

WINDOW = SinkWindow(sink_tokens=2, window_tokens=6, ring_tokens=8)
OTHER = SinkWindow(sink_tokens=3, window_tokens=5, ring_tokens=8)


def content(head: str = "h", length: int = 5) -> SlotContent:
    return SlotContent(head, WINDOW, length, 0)


def test_the_one_saved_longest_ago_makes_room_but_not_the_one_that_returns() -> None:
    tier = HostTier(2)
    assert [tier.save(name, content(), keep="") for name in "ab"] == [0, 1]
    assert tier.save("c", content(), keep="a") == 1
    assert "b" not in tier
    assert tier.save("d", content(), keep="") == 0
    assert tier.take("a", "h", WINDOW) is None
    assert tier.take("d", "h", WINDOW) == (0, content())
    tier.check_integrity()


def test_there_is_no_room_beside_the_one_that_returns() -> None:
    tier = HostTier(1)
    tier.save("a", content(), keep="")
    assert tier.save("b", content(), keep="a") is None
    assert HostTier(0).save("a", content(), keep="") is None
    assert "a" in tier


@pytest.mark.parametrize(("head", "window"), [("other", WINDOW), ("h", OTHER)])
def test_what_is_not_valid_is_forgotten(head: str, window: SinkWindow) -> None:
    tier = HostTier(1)
    tier.save("a", content(), keep="")
    assert tier.take("a", head, window) is None
    assert tier.take("a", "h", WINDOW) is None
    assert tier.num_used == 0


def turn(residency: Residency, name: str, head: str, length: int = 5) -> Lease:
    """A whole turn, committed under its next head: h0 -> h1 -> ..."""
    lease = residency.acquire(name, head, WINDOW)
    assert lease is not None
    residency.begin(name, lease.resident_length or 0, 0, 0)
    residency.grow(name, length)
    assert residency.settle(name, f"h{int(head[1:]) + 1}", length)
    residency.check_integrity()
    return lease


def test_an_evicted_conversation_is_saved_and_comes_back_with_its_length() -> None:
    residency = Residency(1, num_host_slots=2)
    assert turn(residency, "a", "h0", 7) == Lease(0, None, 0)
    assert turn(residency, "b", "h0").copies == (SlotCopy("save", 0, 0),)
    assert turn(residency, "a", "h1", 9) == Lease(
        0, 7, 0, "b", (SlotCopy("save", 0, 1), SlotCopy("restore", 0, 0))
    )
    assert residency.num_host_hits == 1
    assert (residency.num_evicted, residency.num_host_used) == (2, 1)


def test_a_bounded_replay_comes_back_with_its_window_start() -> None:
    residency = Residency(1, num_host_slots=1)
    residency.acquire("a", "h0", WINDOW)
    residency.begin("a", 0, 60, 90)
    residency.grow("a", 95)
    residency.settle("a", "h1", 95)
    residency.acquire("b", "h0", WINDOW)
    residency.drop("b")
    lease = residency.acquire("a", "h1", WINDOW)
    assert lease == Lease(0, 95, 60, None, (SlotCopy("restore", 0, 0),))
    assert residency.begin("a", 95, 0, 97) == 60


def test_while_all_slots_are_dirty_nothing_is_forgotten() -> None:
    residency = Residency(1, num_host_slots=1)
    turn(residency, "a", "h0")
    residency.acquire("b", "h0", WINDOW)
    assert residency.acquire("a", "h1", WINDOW) is None
    residency.drop("b")
    lease = residency.acquire("a", "h1", WINDOW)
    assert lease is not None
    assert lease.resident_length == 5


class CopyMachine(RuleBasedStateMachine):
    """Memory that is really copied: what a lease promises must be there once its copies are made."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(2, num_host_slots=3)
        self.kv_slots: list[object] = [None] * 2
        self.host_slots: list[object] = [None] * 3
        self.heads: dict[str, int] = {}
        self.dirty: dict[str, int] = {}

    @rule(name=st.sampled_from("abcdefg"), elsewhere=st.booleans())
    def acquire(self, name: str, elsewhere: bool) -> None:
        if name in self.dirty:
            return
        self.heads.setdefault(name, 0)
        if elsewhere:
            # Another replica has served a turn.
            self.heads[name] += 1
        head = self.heads[name]
        lease = self.residency.acquire(name, f"h{head}", WINDOW)
        if lease is None:
            assert len(self.dirty) == 2
            return
        for copy in lease.copies:
            if copy.direction == "save":
                self.host_slots[copy.host_slot] = self.kv_slots[copy.kv_slot]
            else:
                self.kv_slots[copy.kv_slot] = self.host_slots[copy.host_slot]
        if lease.resident_length is not None:
            assert self.kv_slots[lease.kv_slot] == (name, head, lease.resident_length)
        self.residency.begin(name, lease.resident_length or 0, 0, 0)
        self.kv_slots[lease.kv_slot] = "being written"
        self.dirty[name] = lease.kv_slot

    @precondition(lambda self: self.dirty)
    @rule(data=st.data(), length=st.integers(1, 50))
    def settle(self, data: st.DataObject, length: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.dirty)))
        kv_slot = self.dirty.pop(name)
        self.heads[name] += 1
        self.residency.grow(name, length)
        assert self.residency.settle(name, f"h{self.heads[name]}", length)
        self.kv_slots[kv_slot] = (name, self.heads[name], length)

    @precondition(lambda self: self.dirty)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.dirty)))
        del self.dirty[name]
        self.residency.drop(name)

    @invariant()
    def check_integrity(self) -> None:
        self.residency.check_integrity()


TestCopies = CopyMachine.TestCase
TestCopies.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, derandomize=True
)
