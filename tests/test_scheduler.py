from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduler import PATIENCE, Scheduler, SchedulerConfig, Share


def make(max_running: int = 4, token_budget: int = 12, max_chunk: int = 8) -> Scheduler:
    return Scheduler(SchedulerConfig(max_running, token_budget, max_chunk))


def chunk(turn: int, offset: int, count: int, segment: int = 0, samples: bool = False) -> Share:
    return Share(turn, segment, offset, count, samples)


def decode(turn: int) -> Share:
    return Share(turn, -1, 0, 1, samples=True)


def test_a_turn_prefills_in_chunks_and_then_decodes() -> None:
    scheduler = make()
    scheduler.add(7, [19])
    assert [scheduler.schedule() for _ in range(5)] == [
        [chunk(7, 0, 8)],
        [chunk(7, 8, 8)],
        [chunk(7, 16, 3, samples=True)],
        [decode(7)],
        [decode(7)],
    ]
    scheduler.remove(7)
    assert scheduler.schedule() == []


def test_a_chunk_never_spans_two_segments() -> None:
    scheduler = make()
    scheduler.add(0, [4, 9, 1])
    assert [scheduler.schedule() for _ in range(5)] == [
        [chunk(0, 0, 4)],
        [chunk(0, 0, 8, segment=1)],
        [chunk(0, 8, 1, segment=1)],
        [chunk(0, 0, 1, segment=2, samples=True)],
        [decode(0)],
    ]


def test_decodes_come_first_and_prefill_fills_the_budget() -> None:
    scheduler = make(max_running=4, token_budget=20, max_chunk=8)
    scheduler.add(0, [2])
    scheduler.add(1, [3])
    assert scheduler.schedule() == [
        chunk(0, 0, 2, samples=True),
        chunk(1, 0, 3, samples=True),
    ]
    scheduler.add(2, [8])
    scheduler.add(3, [30])
    assert scheduler.schedule() == [
        decode(0),
        decode(1),
        chunk(2, 0, 8, samples=True),
        chunk(3, 0, 8),
    ]
    assert scheduler.schedule() == [decode(0), decode(1), decode(2), chunk(3, 8, 8)]


def finished_after(scheduler: Scheduler, turns: set[int], steps: int) -> dict[int, int]:
    """How many steps each of `turns` took until its first sample, of at most so many steps."""
    found: dict[int, int] = {}
    for step in range(1, steps + 1):
        for share in scheduler.schedule():
            if share.turn in turns and share.samples:
                found.setdefault(share.turn, step)
        if found.keys() == turns:
            break
    return found


def test_a_short_prompt_overtakes_a_long_replay() -> None:
    scheduler = make(max_running=3, token_budget=8, max_chunk=8)
    scheduler.add(0, [1000])
    assert scheduler.schedule() == [chunk(0, 0, 8)]
    scheduler.add(1, [5])
    assert scheduler.schedule() == [chunk(1, 0, 5, samples=True)]
    assert scheduler.schedule() == [decode(1), chunk(0, 8, 7)]
    assert scheduler.schedule() == [decode(1), chunk(0, 15, 7)]


def test_a_short_prompt_behind_many_restores_waits_a_step_at_most() -> None:
    """A replica died: eight of its conversations are being replayed here, 4,000 tokens each."""
    for steps_before in range(2 * PATIENCE):
        scheduler = make(max_running=9, token_budget=64 + 9, max_chunk=64)
        for turn in range(8):
            scheduler.add(turn, [4, 4000])
        for _ in range(steps_before):
            scheduler.schedule()
        scheduler.add(8, [40])
        assert finished_after(scheduler, {8}, 8)[8] <= 2


def test_running_turns_decode_in_every_step_of_a_restore_that_gets_the_whole_budget() -> None:
    scheduler = make(max_running=6, token_budget=64 + 6, max_chunk=64)
    talking = range(4)
    for turn in talking:
        scheduler.add(turn, [3])
    scheduler.schedule()
    scheduler.add(4, [4, 4000])
    scheduler.add(5, [4, 4000])
    restoring, steps, restored_tokens = {4, 5}, 0, 0
    while restoring:
        shares = scheduler.schedule()
        steps += 1
        decoding = [share.turn for share in shares if share.segment < 0]
        assert decoding[: len(talking)] == list(talking)
        prefills = [share for share in shares if share.segment >= 0]
        restored_tokens += sum(share.count for share in prefills)
        restoring -= {share.turn for share in prefills if share.samples}
    assert restored_tokens == 2 * 4004
    assert steps <= 2 * 4004 // 64 + 4  # short chunks where a segment ends


def test_the_first_of_equal_restores_is_done_well_before_the_last() -> None:
    """Turn and turn about would end them all at the very end, and nobody would gain by it."""
    scheduler = make(max_running=4, token_budget=12, max_chunk=8)
    for turn in range(4):
        scheduler.add(turn, [80])
    assert finished_after(scheduler, set(range(4)), 100) == {0: 13, 1: 25, 2: 34, 3: 40}


def test_short_prompts_without_end_do_not_starve_a_restore() -> None:
    scheduler = make(max_running=2, token_budget=10, max_chunk=8)
    scheduler.add(0, [160])
    for _ in range(160 // 8 * PATIENCE):
        scheduler.add(1, [8])
        shares = scheduler.schedule()
        if any(share.turn == 0 and share.samples for share in shares):
            break
        scheduler.remove(1)
    else:
        pytest.fail("the restore was starved")


def test_the_longest_waiting_goes_first_in_every_fourth_step() -> None:
    scheduler = make(max_running=3, token_budget=4, max_chunk=4)
    for turn, length in ((5, 400), (3, 200), (4, 300)):
        scheduler.add(turn, [length])
    served = [scheduler.schedule()[0].turn for _ in range(16)]
    assert served == [3, 3, 3, 5, 3, 3, 3, 4, 3, 3, 3, 5, 3, 3, 3, 4]


def test_only_the_first_prefill_gets_less_than_a_chunk() -> None:
    scheduler = make(max_running=2, token_budget=10, max_chunk=8)
    scheduler.add(0, [20])
    scheduler.add(1, [20])
    assert scheduler.schedule() == [chunk(0, 0, 8)]
    scheduler.remove(0)
    scheduler.add(0, [2])
    assert scheduler.schedule() == [chunk(0, 0, 2, samples=True), chunk(1, 0, 8)]
    tight = make(max_running=2, token_budget=3, max_chunk=8)
    tight.add(0, [20])
    assert tight.schedule() == [chunk(0, 0, 3)]


def test_a_removed_prefill_leaves_the_queue() -> None:
    scheduler = make(max_running=3, token_budget=4, max_chunk=4)
    for turn in (0, 1, 2):
        scheduler.add(turn, [8])
    scheduler.schedule()
    scheduler.remove(0)
    scheduler.remove(1)
    assert scheduler.schedule() == [chunk(2, 0, 4)]
    assert scheduler.num_running == 1
    scheduler.add(1, [4])
    assert scheduler.schedule() == [chunk(2, 4, 4, samples=True)]


def test_wrong_use_is_refused() -> None:
    scheduler = make(max_running=2)
    scheduler.add(0, [1])
    for segments in ([], [0], [3, 0]):
        with pytest.raises(ValueError, match="segment"):
            scheduler.add(1, segments)
    with pytest.raises(ValueError, match="runs already"):
        scheduler.add(0, [1])
    scheduler.add(1, [1])
    assert not scheduler.has_room
    with pytest.raises(ValueError, match="2 turns run already"):
        scheduler.add(2, [1])
    scheduler.schedule()
    with pytest.raises(ValueError, match="runs already"):
        scheduler.add(0, [1])
    with pytest.raises(ValueError, match="does not run"):
        scheduler.remove(2)


@pytest.mark.parametrize("config", [(0, 9, 8), (4, 4, 8), (4, 9, 0)])
def test_a_configuration_that_could_starve_prefill_is_refused(config: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SchedulerConfig(*config)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_every_token_once_in_order_and_nobody_starves(data: st.DataObject) -> None:
    max_running = data.draw(st.integers(1, 5))
    budget = max_running + data.draw(st.integers(1, 12))
    max_chunk = data.draw(st.integers(1, 9))
    scheduler = make(max_running, budget, max_chunk)
    # What each running turn still has to prefill: (segment, offset) of every token.
    left: dict[int, list[tuple[int, int]]] = {}
    idle_steps: dict[int, int] = {}
    for turn in range(data.draw(st.integers(1, 25))):
        if scheduler.has_room:
            segments = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
            scheduler.add(turn, segments)
            left[turn] = [(s, i) for s, count in enumerate(segments) for i in range(count)]
            idle_steps[turn] = 0
        if data.draw(st.booleans()) and left:
            victim = data.draw(st.sampled_from(sorted(left)))
            scheduler.remove(victim)
            del left[victim]
        for _ in range(data.draw(st.integers(0, 4))):
            decoding = {turn for turn, tokens in left.items() if not tokens}
            shares = scheduler.schedule()
            scheduler.check_integrity()
            assert sum(share.count for share in shares) <= budget
            assert len({share.turn for share in shares}) == len(shares)
            assert {share.turn for share in shares if share.segment < 0} == decoding
            served = set()
            for share in shares:
                served.add(share.turn)
                if share.segment < 0:
                    assert share == decode(share.turn)
                    continue
                assert 1 <= share.count <= max_chunk
                tokens = left[share.turn]
                wanted = [(share.segment, share.offset + i) for i in range(share.count)]
                assert tokens[: share.count] == wanted
                del tokens[: share.count]
                assert share.samples == (not tokens)
            for turn_ in left:
                idle_steps[turn_] = 0 if turn_ in served else idle_steps[turn_] + 1
                assert idle_steps[turn_] < PATIENCE * max_running
