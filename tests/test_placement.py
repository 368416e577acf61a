"""Placement: literal cases, then properties over random clusters."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Overloaded, OwnerTable, Placed, Placement, ReplicaView, Wait

POLICY = Placement(max_wait_s=5.0)
A, B, C = (
    ReplicaView("a", free_slots=3),
    ReplicaView("b", free_slots=7),
    ReplicaView("c", free_slots=7, running=2),
)


def test_new_conversation_goes_to_most_free_slots() -> None:
    assert POLICY.decide("conv", [], [A, B], 0.0) == Placed("b", "new")


def test_equal_slots_go_to_the_replica_with_fewer_turns() -> None:
    assert POLICY.decide("conv", [], [A, B, C], 0.0) == Placed("b", "new")


def test_a_cache_is_given_up_only_where_no_slot_is_free() -> None:
    """The steady state is that of full replicas: every slot holds a conversation, most are idle."""
    last_free = ReplicaView("a", free_slots=1, clean_slots=2, running=5, waiting=3)
    idle = ReplicaView("b", free_slots=0, clean_slots=8)
    assert POLICY.decide("conv", [], [last_free, idle], 0.0) == Placed("a", "new")


@pytest.mark.parametrize(
    ("a", "b", "chosen"),
    [
        # clean, running, waiting
        ((8, 0, 0), (8, 1, 0), "a"),
        ((6, 2, 0), (4, 4, 0), "a"),
        ((6, 2, 3), (4, 4, 0), "b"),
        # Of two with as much to do, the one that keeps more gives up what is idle for longer.
        ((30, 2, 0), (6, 2, 0), "a"),
        # A short queue is no good where every slot is in use.
        ((0, 2, 0), (5, 3, 0), "b"),
        ((0, 2, 0), (0, 3, 0), "a"),
    ],
)
def test_full_replicas_get_conversations_by_what_they_have_to_do(
    a: tuple[int, int, int], b: tuple[int, int, int], chosen: str
) -> None:
    views = [
        ReplicaView(name, 0, clean, running, waiting)
        for name, (clean, running, waiting) in (("a", a), ("b", b))
    ]
    for n in range(20):
        assert POLICY.decide(f"conv_{n}", [], views, 0.0) == Placed(chosen, "new")
        assert POLICY.decide(f"conv_{n}", ["gone"], views, 0.0) == Placed(chosen, "owner_lost")


def test_ties_are_broken_by_a_hash_that_spreads_and_does_not_depend_on_order() -> None:
    views = [ReplicaView(name, free_slots=4) for name in "xyz"]
    chosen = [POLICY.decide(f"conv_{n}", [], views, 0.0) for n in range(60)]
    again = [POLICY.decide(f"conv_{n}", [], reversed(views), 0.0) for n in range(60)]
    assert chosen == again
    counts = {name: chosen.count(Placed(name, "new")) for name in "xyz"}
    assert sum(counts.values()) == 60
    assert min(counts.values()) >= 10


def test_owner_first_however_little_room_it_has() -> None:
    crowded = ReplicaView("a", free_slots=0, running=30, waiting=9)
    assert POLICY.decide("conv", ["a"], [crowded, B], 0.0) == Placed("a", "owner")


def test_full_owner_is_waited_for_then_refused_never_replaced() -> None:
    full = replace(A, full=True)
    assert POLICY.decide("conv", ["a"], [full, B], 0.0) == Wait("a")
    assert POLICY.decide("conv", ["a"], [full, B], 4.99) == Wait("a")
    assert POLICY.decide("conv", ["a"], [full, B], 5.0) == Overloaded("a")


def test_owner_with_room_is_taken_even_after_the_wait() -> None:
    assert POLICY.decide("conv", ["a"], [A, B], 99.0) == Placed("a", "owner")


def test_dead_or_draining_owner_leaves_the_conversation_free() -> None:
    assert POLICY.decide("conv", ["gone"], [A, B], 0.0) == Placed("b", "owner_lost")
    leaving = replace(B, draining=True)
    assert POLICY.decide("conv", ["b"], [A, leaving], 0.0) == Placed("a", "owner_lost")


def test_a_replica_just_seen_dead_is_asked_only_when_there_is_no_other() -> None:
    assert POLICY.decide("conv", ["b"], [A, B], 0.0, avoid="b") == Placed("a", "owner_lost")
    assert POLICY.decide("conv", ["a", "b"], [A, B], 0.0, avoid="a") == Placed("b", "owner")
    assert POLICY.decide("conv", [], [A, B], 0.0, avoid="b") == Placed("a", "new")
    assert POLICY.decide("conv", ["b"], [B], 0.0, avoid="b") == Placed("b", "owner")
    assert POLICY.decide("conv", ["b"], [A, B], 0.0, avoid="gone") == Placed("b", "owner")


def test_first_known_living_owner_wins() -> None:
    assert POLICY.decide("conv", ["", "gone", "a", "b"], [A, B], 0.0) == Placed("a", "owner")


def test_no_room_anywhere_waits_then_refuses() -> None:
    full = [replace(A, full=True), replace(B, full=True)]
    assert POLICY.decide("conv", [], full, 0.0) == Wait("")
    assert POLICY.decide("conv", [], full, 6.0) == Overloaded("")
    assert POLICY.decide("conv", [], [], 0.0) == Wait("")


def test_full_replica_gets_no_new_conversation() -> None:
    assert POLICY.decide("conv", [], [A, replace(B, full=True)], 0.0) == Placed("a", "new")


def test_table_is_bounded_and_forgets_the_least_recently_used() -> None:
    table = OwnerTable(max_entries=2)
    for name in ("one", "two", "one", "three"):
        table.record(name, Placed(f"r-{name}", "owner"), 0.0)
    assert len(table) == 2
    assert [table.owner(name) for name in ("one", "two", "three")] == ["r-one", "", "r-three"]


def test_table_counts_slots_taken_until_the_statistics_show_them() -> None:
    table = OwnerTable(lag_s=2.0)
    table.record("one", Placed("a", "new"), 0.0)
    table.record("two", Placed("a", "owner_lost"), 1.0)
    table.record("three", Placed("b", "new"), 1.0)
    table.record("four", Placed("a", "owner"), 1.0)
    assert table.recently_taken("a", 1.0) == 2
    assert table.recently_taken("a", 2.0) == 1
    assert table.recently_taken("b", 3.0) == 0


def test_table_needs_room() -> None:
    with pytest.raises(ValueError, match="max_entries"):
        OwnerTable(max_entries=0)


NAMES = [f"r{n}" for n in range(6)]
VIEWS = st.lists(
    st.builds(
        ReplicaView,
        replica=st.sampled_from(NAMES),
        free_slots=st.integers(0, 4),
        clean_slots=st.integers(0, 4),
        running=st.integers(0, 4),
        waiting=st.integers(0, 4),
        full=st.booleans(),
        draining=st.booleans(),
    ),
    unique_by=lambda view: view.replica,
)
OWNERS = st.lists(st.sampled_from([*NAMES, ""]), max_size=3)
CONVERSATIONS = st.text(min_size=1, max_size=8)
WAITS = st.floats(0, 20)


@given(CONVERSATIONS, OWNERS, VIEWS, WAITS)
def test_never_a_move_off_a_living_owner(
    conversation: str, owners: list[str], views: list[ReplicaView], waited_s: float
) -> None:
    decision = POLICY.decide(conversation, owners, views, waited_s)
    living = [o for o in owners if any(v.replica == o and not v.draining for v in views)]
    if living:
        assert decision in (Placed(living[0], "owner"), Wait(living[0]), Overloaded(living[0]))
    elif isinstance(decision, Placed):
        assert decision.reason == ("owner_lost" if any(owners) else "new")


@given(CONVERSATIONS, OWNERS, VIEWS, WAITS, st.randoms())
def test_every_router_decides_alike_on_equal_statistics(
    conversation: str,
    owners: list[str],
    views: list[ReplicaView],
    waited_s: float,
    random: Random,
) -> None:
    shuffled = list(views)
    random.shuffle(shuffled)
    assert POLICY.decide(conversation, owners, views, waited_s) == POLICY.decide(
        conversation, owners, shuffled, waited_s
    )


@given(CONVERSATIONS, OWNERS, VIEWS, WAITS)
def test_only_replicas_with_room_are_chosen_and_room_is_never_left_unused(
    conversation: str, owners: list[str], views: list[ReplicaView], waited_s: float
) -> None:
    decision = POLICY.decide(conversation, owners, views, waited_s)
    usable = [v for v in views if not v.full and not v.draining]
    if isinstance(decision, Placed):
        chosen = next(v for v in usable if v.replica == decision.replica)
        if decision.reason != "owner":
            assert chosen.free_slots == max(v.free_slots for v in usable)
    elif decision.owner == "":
        assert not usable


@given(CONVERSATIONS, VIEWS, st.sampled_from(NAMES))
def test_scaling_out_moves_nothing(
    conversation: str, views: list[ReplicaView], newcomer: str
) -> None:
    before = POLICY.decide(conversation, [], views, 0.0)
    if not isinstance(before, Placed):
        return
    grown = [v for v in views if v.replica != newcomer or v.replica == before.replica]
    if before.replica != newcomer:
        grown.append(ReplicaView(newcomer, free_slots=99))
    assert POLICY.decide(conversation, [before.replica], grown, 0.0) == Placed(
        before.replica, "owner"
    )
