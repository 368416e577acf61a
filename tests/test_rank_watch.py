"""Who stands still, judged by counters and a clock of the test's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.rank_activity import Activity, step_activity
from engine.rank_watch import (
    MANY_TIMES,
    Beater,
    PeerWatch,
    ProgressLimits,
    ProgressWatch,
    SharedSigns,
    Signs,
    Stuck,
)

PERIOD_S, TIMEOUT_S = 0.25, 3.5
IDLE_S, BUSY_S, MOST_S = 3.0, 20.0, 120.0
PERIOD_NS = int(PERIOD_S * 1e9)


def watch() -> PeerWatch:
    return PeerWatch(3, TIMEOUT_S, PERIOD_S)


def test_a_counter_that_stands_still_is_a_hung_rank() -> None:
    peers, now_s = watch(), 0.0
    for beat in range(1, 15):
        assert peers.look(now_s, [beat, beat, 7]) == []
        now_s += PERIOD_S
    assert peers.look(now_s, [15, 15, 7]) == []
    assert peers.look(now_s + PERIOD_S, [16, 16, 7]) == [2]


def test_one_beat_in_time_is_enough() -> None:
    peers, now_s = watch(), 0.0
    for look in range(100):
        assert peers.look(now_s, [look, look, look // 14]) == []
        now_s += PERIOD_S


def test_a_watcher_that_was_stopped_looks_again_before_it_judges() -> None:
    """Everybody was stopped for a minute and goes on; the watcher is the first to run."""
    peers = watch()
    assert peers.look(0.0, [1, 1, 1]) == []
    assert peers.look(60.0, [2, 1, 1]) == []
    assert peers.look(60.25, [3, 2, 2]) == []
    for look in range(13):
        assert peers.look(60.5 + look * PERIOD_S, [4 + look, 3 + look, 2]) == []
    assert peers.look(64.0, [20, 20, 2]) == [2]


def test_a_watcher_that_looks_rarely_takes_longer_to_judge() -> None:
    peers = watch()
    assert [peers.look(10.0 * n, [n, n, 1]) for n in range(8)] == [[]] * 8
    assert peers.look(80.0, [9, 9, 1]) == [2]


class Group:
    """Ranks whose signs a test moves, looked at once a period. `step` says what a rank does until then."""

    def __init__(self, num_ranks: int = 3) -> None:
        limits = ProgressLimits(IDLE_S, BUSY_S, MOST_S)
        self.watch = ProgressWatch(num_ranks, limits, PERIOD_S)
        self.now_s = 0.0
        self.signs = [Signs() for _ in range(num_ranks)]

    def step(self, rank: int, points: int = 0, share: float = 0.0, ready: bool = False) -> None:
        """Pass so many points, on so much of a core, or ready to run."""
        one = self.signs[rank]
        self.signs[rank] = Signs(
            one.beats, one.points + points, one.busy_ns + int(share * PERIOD_NS), one.ready + ready
        )

    def beat(self, *silent: int, passed_s: float = PERIOD_S) -> list[Stuck]:
        self.now_s += passed_s
        for rank, one in enumerate(self.signs):
            if rank not in silent:
                self.signs[rank] = Signs(one.beats + 1, one.points, one.busy_ns, one.ready)
        return self.watch.look(self.now_s, self.signs)

    def wait_for(self, rank: int) -> None:
        """Everybody else comes to the next point, and waits there."""
        for other in range(len(self.signs)):
            if other != rank:
                self.step(other, points=1)
        assert self.beat() == []

    def until_stuck(self, longest_s: float, doing: Callable[[], None] = lambda: None) -> Stuck:
        """What is found, which must not take longer."""
        began_s = self.now_s
        while self.now_s - began_s < longest_s:
            doing()
            found = self.beat()
            if found:
                (stuck,) = found
                return stuck
        raise AssertionError("nobody was found to be stuck")

    def goes_well(self, for_s: float, doing: Callable[[], None] = lambda: None) -> None:
        began_s = self.now_s
        while self.now_s - began_s < for_s:
            doing()
            assert self.beat() == []


@pytest.fixture
def group() -> Group:
    ranks = Group()
    for rank in range(3):
        ranks.step(rank, points=7)
    assert ranks.beat() == []
    return ranks


def test_a_rank_that_does_nothing_while_others_wait_is_stuck(group: Group) -> None:
    group.goes_well(60.0)
    group.wait_for(1)
    stuck = group.until_stuck(IDLE_S + 2 * PERIOD_S)
    assert (stuck.rank, stuck.did) == (1, "nothing")
    assert stuck.seconds > IDLE_S


@pytest.mark.parametrize("laggard", [0, 2])
def test_rank_0_is_judged_as_any_other(group: Group, laggard: int) -> None:
    group.wait_for(laggard)
    assert group.until_stuck(4.0).rank == laggard


def test_nobody_is_waited_for_between_steps_or_while_all_compute(group: Group) -> None:
    """Rank 0 may take its time to send the next plan; nor does a step in which all are slow count."""
    group.goes_well(300.0)
    group.goes_well(300.0, lambda: group.step(0, share=1.0))

    def all_compute() -> None:
        for rank in range(3):
            group.step(rank, share=1.0)

    group.goes_well(300.0, all_compute)


def test_time_counts_from_when_the_others_wait(group: Group) -> None:
    """It is idle, perhaps in a wait of its own, long before anybody is in need of it."""
    group.goes_well(IDLE_S - PERIOD_S)
    group.wait_for(1)
    group.goes_well(IDLE_S - PERIOD_S)
    group.step(1, points=1)
    group.goes_well(60.0)


@pytest.mark.parametrize("share", [0.06, 0.5, 1.0, 4.0])
def test_a_rank_that_computes_is_slow_not_stuck(group: Group, share: float) -> None:
    """Ten times as long as the others, on a part of a core or on several."""
    group.wait_for(1)
    group.goes_well(15.0, lambda: group.step(1, share=share))
    group.step(1, points=1)
    group.goes_well(60.0)


def test_a_starved_rank_is_slow_not_stuck(group: Group) -> None:
    """It could run, or waits for pages of its weights; it gets next to nothing of the machine."""
    group.wait_for(1)
    group.goes_well(100.0, lambda: group.step(1, ready=True, share=0.01))


def test_a_moment_of_work_is_a_new_beginning(group: Group) -> None:
    group.wait_for(1)
    for _ in range(20):
        group.goes_well(IDLE_S - PERIOD_S)
        group.step(1, share=0.5)
        assert group.beat() == []


def test_a_library_that_looks_around_is_no_work(group: Group) -> None:
    group.wait_for(1)
    assert group.until_stuck(4.0, lambda: group.step(1, share=0.01)).did == "nothing"


def test_a_rank_that_computes_for_ever_has_used_its_time_in_the_end(group: Group) -> None:
    group.wait_for(1)
    stuck = group.until_stuck(BUSY_S + 1.0, lambda: group.step(1, share=1.0))
    assert (stuck.rank, stuck.did) == (1, "computed")


def test_several_threads_use_up_no_more_than_the_time_that_passed(group: Group) -> None:
    group.wait_for(1)
    group.goes_well(BUSY_S - 1.0, lambda: group.step(1, share=8.0))


def test_a_rank_with_half_a_core_gets_twice_the_time(group: Group) -> None:
    group.wait_for(1)
    group.goes_well(2 * BUSY_S - 1.0, lambda: group.step(1, share=0.5))
    assert group.until_stuck(2.0, lambda: group.step(1, share=0.5)).did == "computed"


def test_where_ranks_were_slow_they_may_be_slow_again(group: Group) -> None:
    group.wait_for(2)
    group.goes_well(6.0, lambda: group.step(2, share=1.0))
    group.step(2, points=1)
    assert group.beat() == []
    group.wait_for(1)
    group.goes_well(6.0 * MANY_TIMES - 1.0, lambda: group.step(1, share=1.0))
    assert group.until_stuck(2.0, lambda: group.step(1, share=1.0)).rank == 1


def test_what_was_learnt_has_an_end(group: Group) -> None:
    group.wait_for(2)
    group.goes_well(19.0, lambda: group.step(2, share=1.0))
    group.step(2, points=1)
    assert group.beat() == []
    group.wait_for(1)
    group.goes_well(MOST_S - 1.0, lambda: group.step(1, share=1.0))
    group.until_stuck(2.0, lambda: group.step(1, share=1.0))


def test_a_watcher_that_was_stopped_counts_nothing_of_that_time(group: Group) -> None:
    group.wait_for(1)
    assert group.beat(passed_s=600.0) == []
    assert group.beat(passed_s=600.0) == []
    group.goes_well(IDLE_S - 5 * PERIOD_S)
    group.until_stuck(1.0)


def test_time_without_beats_is_no_evidence(group: Group) -> None:
    """The process does not run, so it cannot show what it does: that is `PeerWatch`'s business."""
    group.wait_for(1)
    for _ in range(400):
        assert group.beat(1) == []
    group.goes_well(IDLE_S - 2 * PERIOD_S)
    group.until_stuck(1.0)


def test_rare_beats_count_for_the_time_between_them(group: Group) -> None:
    """As far as a watcher may look away: on a loaded machine it takes longer, but ends."""
    group.wait_for(1)
    began_s = group.now_s
    while not group.beat(1) and not group.beat(1) and not group.beat():
        assert group.now_s - began_s < 2 * IDLE_S
    assert group.now_s - began_s > IDLE_S


def test_signs_are_shared(tmp_path: Path) -> None:
    mine, other = (SharedSigns(tmp_path / "signs", 3, rank) for rank in (0, 2))
    mine.beat()
    other.beat()
    other.beat()
    other.reached()
    other.busy(5)
    mine.ready()
    assert mine.read() == other.read() == [Signs(1, 0, 0, 1), Signs(), Signs(2, 1, 5, 0)]


def test_a_rank_measures_itself_only_while_it_stands_still_behind(tmp_path: Path) -> None:
    measured: list[int] = []

    def measure(thread: int) -> Activity:
        measured.append(thread)
        return Activity(10 * len(measured), ready=len(measured) == 4)

    mine, other = (SharedSigns(tmp_path / "signs", 2, rank) for rank in (0, 1))
    beater = Beater(mine, measure)
    for signs in (mine, other):
        signs.reached()
    for _ in range(3):
        beater.beat()
    other.reached()
    mine.reached()
    other.reached()
    beater.beat()  # behind, but it has moved
    assert mine.read()[0] == Signs(4, 2, 0, 0)
    beater.beat()  # nothing to compare with: it may have worked
    assert mine.read()[0] == Signs(5, 2, 0, 1)
    beater.beat()
    beater.beat()
    assert mine.read()[0] == Signs(7, 2, 20, 1)
    beater.beat()
    assert mine.read()[0] == Signs(8, 2, 30, 2)
    assert measured == [threading.get_native_id()] * 4
    mine.reached()
    beater.beat()
    assert len(measured) == 4


@contextmanager
def step(doing: Callable[[threading.Event], None]) -> Iterator[int]:
    """A thread that does it until the event is set; the kernel's number of it."""
    over = threading.Event()
    thread = threading.Thread(target=doing, args=(over,))
    thread.start()
    try:
        yield thread.native_id or 0
    finally:
        over.set()
        thread.join()


def compute(over: threading.Event) -> None:
    while not over.is_set():
        pass


def rest(over: threading.Event) -> None:
    over.wait()


def seen(thread: int, what: Callable[[Activity, Activity], bool]) -> bool:
    """Whether it is ever true of what was measured first and what is measured now."""
    first = step_activity(thread)
    deadline_s = time.monotonic() + 30.0
    while time.monotonic() < deadline_s:
        if what(first, step_activity(thread)):
            return True
        time.sleep(0.02)
    return False


def test_a_step_that_computes_uses_cpu_time_and_one_that_waits_does_not() -> None:
    with step(compute) as thread:
        assert seen(thread, lambda first, now: now.cpu_ns > first.cpu_ns + 50_000_000)
        assert seen(thread, lambda first, now: now.ready)
        with step(rest) as idle:
            # Another Python thread computes, which is not this step's doing.
            first = step_activity(idle)
            time.sleep(0.3)
            now = step_activity(idle)
            assert now.cpu_ns - first.cpu_ns < 50_000_000


def test_a_compiler_that_the_step_has_started_is_its_work() -> None:
    """The step's thread does nothing but wait for it."""

    def compile_something(over: threading.Event) -> None:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as compiler:
            over.wait()
            compiler.kill()

    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel does not tell which processes a thread has started")
    with step(compile_something) as thread:
        assert seen(thread, lambda first, now: now.ready)
    with step(rest) as thread:
        assert seen(thread, lambda first, now: not now.ready)
