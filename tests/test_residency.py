from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.residency import Lease, Residency, Resident
from engine.window import SinkWindow

WINDOW = SinkWindow(sink_tokens=2, window_tokens=6, ring_tokens=8)


def acquire(residency: Residency, name: str, head: str = "h0") -> Lease:
    lease = residency.acquire(name, head, WINDOW)
    assert lease is not None
    return lease


def run_turn(residency: Residency, name: str, head: str = "h0", length: int = 5) -> Lease:
    """A whole turn of a conversation, committed under its next head: h0 -> h1 -> ..."""
    lease = acquire(residency, name, head)
    residency.begin(name, lease.resident_length or 0, 0, 0)
    residency.grow(name, length)
    assert residency.settle(name, f"h{int(head[1:]) + 1}", length)
    residency.check_integrity()
    return lease


def test_free_slots_are_used_before_any_is_evicted() -> None:
    residency = Residency(3)
    assert [run_turn(residency, name) for name in "abc"] == [
        Lease(0, None, 0),
        Lease(1, None, 0),
        Lease(2, None, 0),
    ]
    assert (residency.num_free, residency.num_clean, residency.num_dirty) == (0, 3, 0)


def test_the_slot_used_longest_ago_is_evicted() -> None:
    residency = Residency(3)
    for name in "abc":
        run_turn(residency, name)
    assert run_turn(residency, "a", "h1") == Lease(0, 5, 0)
    assert acquire(residency, "d") == Lease(1, None, 0, evicted="b")
    assert acquire(residency, "e") == Lease(2, None, 0, evicted="c")
    assert acquire(residency, "f") == Lease(0, None, 0, evicted="a")
    assert residency.acquire("g", "h0", WINDOW) is None
    residency.check_integrity()


def test_conversations_that_are_expected_back_are_evicted_last() -> None:
    residency = Residency(3)
    for name in "abc":
        run_turn(residency, name)
    assert [one.conversation_id for one in residency.residents(2)] == ["c", "b"]
    for evicted in "cab":
        lease = residency.acquire(f"not {evicted}", "h0", WINDOW, expected="ab")
        assert lease is not None
        assert lease.evicted == evicted


def test_dirty_slots_are_never_evicted() -> None:
    residency = Residency(2)
    acquire(residency, "a")
    run_turn(residency, "b")
    assert acquire(residency, "c") == Lease(1, None, 0, evicted="b")
    assert residency.acquire("d", "h0", WINDOW) is None
    residency.begin("a", 0, 0, 0)
    residency.grow("a", 3)
    residency.settle("a", "h1", 3)
    assert acquire(residency, "d") == Lease(0, None, 0, evicted="a")


def test_a_slot_is_valid_under_its_own_head_and_window_only() -> None:
    residency = Residency(2)
    run_turn(residency, "a", length=7)
    assert residency.residents(9) == (Resident("a", "h1", 7),)
    assert acquire(residency, "a", "h1") == Lease(0, 7, 0)
    residency.settle("a", "h2", 7)
    assert acquire(residency, "a", "h1") == Lease(0, None, 0)
    residency.begin("a", 0, 0, 0)
    residency.grow("a", 7)
    residency.settle("a", "h3", 7)
    other = SinkWindow(3, 5, 8)
    assert residency.acquire("a", "h3", other) == Lease(0, None, 0)


def test_settling_rewinds_to_the_committed_tokens() -> None:
    residency = Residency(1)
    acquire(residency, "a")
    residency.begin("a", 0, 0, 0)
    residency.grow("a", 103)
    assert residency.settle("a", "h1", 100)
    assert acquire(residency, "a", "h1").resident_length == 100


def test_settling_past_the_cached_tokens_keeps_what_is_cached() -> None:
    residency = Residency(1)
    acquire(residency, "a")
    residency.begin("a", 0, 0, 0)
    residency.grow("a", 20)
    assert residency.settle("a", "h1", 25)
    assert acquire(residency, "a", "h1").resident_length == 20


def test_a_rewind_that_is_not_exact_gives_the_slot_up() -> None:
    residency = Residency(1)
    acquire(residency, "a")
    residency.begin("a", 0, 0, 0)
    residency.grow("a", 104)
    # The ring of 8 lost token 96 - 1; the query at 100 sees from 100 - 6 + 1 = 95 on.
    assert not residency.settle("a", "h1", 100)
    assert residency.num_free == 1
    assert acquire(residency, "a", "h1") == Lease(0, None, 0)


def test_discarding_goes_back_to_where_the_turn_began() -> None:
    residency = Residency(1)
    run_turn(residency, "a", length=100)
    acquire(residency, "a", "h1")
    residency.begin("a", 100, 0, 101)
    residency.grow("a", 103)
    assert residency.discard("a")
    assert residency.residents(1) == (Resident("a", "h1", 101),)
    acquire(residency, "a", "h1")
    residency.begin("a", 101, 0, 101)
    residency.grow("a", 110)
    assert not residency.discard("a")
    assert residency.num_free == 1


def test_a_turn_cancelled_before_its_first_step_keeps_the_resident_tokens() -> None:
    residency = Residency(1)
    run_turn(residency, "a", length=50)
    acquire(residency, "a", "h1")
    residency.begin("a", 50, 0, 53)
    assert residency.discard("a")
    assert residency.residents(1) == (Resident("a", "h1", 50),)


def test_a_new_conversation_that_is_discarded_leaves_nothing() -> None:
    residency = Residency(1)
    acquire(residency, "a")
    residency.begin("a", 0, 0, 0)
    residency.grow("a", 4)
    assert not residency.discard("a")
    assert residency.num_free == 1


def test_half_an_exact_replay_is_worth_keeping_half_a_bounded_one_is_not() -> None:
    residency = Residency(1)
    acquire(residency, "a")
    residency.begin("a", 0, 0, 90)
    residency.grow("a", 40)
    assert residency.discard("a")
    assert residency.residents(1) == (Resident("a", "h0", 40),)
    acquire(residency, "a", "other")
    assert residency.begin("a", 0, 60, 90) == 60
    residency.grow("a", 89)
    assert not residency.discard("a")
    acquire(residency, "a")
    residency.begin("a", 0, 60, 90)
    residency.grow("a", 90)
    assert residency.discard("a")
    assert acquire(residency, "a") == Lease(0, 90, 60)


def test_a_bounded_replay_without_sinks_is_no_continuation() -> None:
    residency = Residency(1)
    acquire(residency, "a")
    assert residency.begin("a", 60, 60, 90) == 60
    assert not residency.discard("a")


def test_a_warm_turn_keeps_the_window_start_of_its_slot() -> None:
    residency = Residency(1)
    acquire(residency, "a")
    residency.begin("a", 0, 60, 90)
    residency.grow("a", 95)
    residency.settle("a", "h1", 95)
    assert acquire(residency, "a", "h1") == Lease(0, 95, 60)
    assert residency.begin("a", 95, 0, 97) == 60
    residency.settle("a", "h2", 95)
    acquire(residency, "a", "h2")
    # The plan started over instead of going on: what was resident no longer counts.
    assert residency.begin("a", 0, 0, 97) == 0
    assert not residency.discard("a")


def test_wrong_use_is_refused() -> None:
    residency = Residency(1)
    with pytest.raises(ValueError, match="num_slots"):
        Residency(0)
    for call in (residency.discard, residency.drop):
        with pytest.raises(KeyError):
            call("a")
    with pytest.raises(KeyError):
        residency.settle("a", "h", 1)
    acquire(residency, "a")
    with pytest.raises(KeyError, match="dirty"):
        residency.acquire("a", "h0", WINDOW)


NAMES = st.sampled_from("abcdefg")


class ResidencyMachine(RuleBasedStateMachine):
    """Against a model that keeps lists: every clean slot in order of use, every dirty one."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(3)
        self.clean: list[tuple[str, str, int, int]] = []
        self.dirty: dict[str, tuple[int, str, int]] = {}
        self.next_head = 0

    def clean_of(self, name: str) -> tuple[str, str, int, int] | None:
        return next((entry for entry in self.clean if entry[0] == name), None)

    @rule(name=NAMES, stale=st.booleans())
    def acquire(self, name: str, stale: bool) -> None:
        if name in self.dirty:
            return
        own = self.clean_of(name)
        head = own[1] if own and not stale else "stale"
        lease = self.residency.acquire(name, head, WINDOW)
        if own is not None:
            assert lease == Lease(own[3], None if stale else own[2], 0)
            self.clean.remove(own)
            length = 0 if stale else own[2]
        elif len(self.clean) + len(self.dirty) < 3:
            assert lease is not None
            assert lease.evicted is None
            length = 0
        elif self.clean:
            oldest = self.clean.pop(0)
            assert lease == Lease(oldest[3], None, 0, evicted=oldest[0])
            length = 0
        else:
            assert lease is None
            return
        self.residency.begin(name, length, 0, length)
        self.dirty[name] = (lease.kv_slot, head, length)

    @precondition(lambda self: self.dirty)
    @rule(data=st.data(), more=st.integers(1, 20))
    def grow(self, data: st.DataObject, more: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.dirty)))
        kv_slot, head, length = self.dirty[name]
        self.residency.grow(name, length + more)
        self.dirty[name] = (kv_slot, head, length + more)

    @precondition(lambda self: self.dirty)
    @rule(data=st.data(), back=st.integers(-3, 6))
    def settle(self, data: st.DataObject, back: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.dirty)))
        kv_slot, _, length = self.dirty.pop(name)
        self.next_head += 1
        head = f"head {self.next_head}"
        to_length = min(length, length - back)
        exact = to_length > 0 and WINDOW.can_rewind(length, to_length)
        assert self.residency.settle(name, head, length - back) == exact
        if exact:
            self.clean.append((name, head, to_length, kv_slot))

    @precondition(lambda self: self.dirty)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.dirty)))
        del self.dirty[name]
        self.residency.drop(name)

    @invariant()
    def check_integrity(self) -> None:
        self.residency.check_integrity()
        expected = tuple(Resident(*entry[:3]) for entry in self.clean[::-1])
        assert self.residency.residents(9) == expected
        assert self.residency.num_dirty == len(self.dirty)
        assert self.residency.num_free == 3 - len(self.clean) - len(self.dirty)


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
