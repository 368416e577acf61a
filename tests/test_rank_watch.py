"""Who stands still, judged by counters and a clock of the test's."""

from __future__ import annotations

from pathlib import Path

from engine.rank_watch import Beats, PeerWatch

PERIOD_S, TIMEOUT_S = 0.25, 3.5


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


def test_counters_are_shared(tmp_path: Path) -> None:
    mine, other = Beats(tmp_path / "beats", 3, 0), Beats(tmp_path / "beats", 3, 2)
    mine.beat()
    other.beat()
    other.beat()
    assert mine.read() == other.read() == [1, 0, 2]
