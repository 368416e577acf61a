"""Whether the other ranks' processes still move: counters in shared memory, judged by rank 0.

Each rank adds one to its counter four times a second, in a thread of its own. That goes on while it
waits for work and while a step takes long, so neither is mistaken for a hang; it stops when the process
is stopped, dead, or so stuck that no thread of it runs.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

BEAT_PERIOD_S = 0.25
RANK_TIMEOUT_S = 3.5
"""A counter that stands still for so long means a hung rank. With a beat, what it takes to notice and to
kill, the replica is gone within 5 s."""


class PeerWatch:
    """Says which ranks stand still. Pure: it is told the time and the counters.

    Time counts against a rank only while the watcher itself looks regularly: a watcher that was stopped,
    perhaps with everybody else, starts by looking again.
    """

    def __init__(self, num_ranks: int, timeout_s: float, period_s: float = BEAT_PERIOD_S) -> None:
        self._timeout_s = timeout_s
        self._longest_gap_s = 2 * period_s
        self._seen: list[int | None] = [None] * num_ranks
        self._still_s = [0.0] * num_ranks
        self._looked_s: float | None = None

    def look(self, now_s: float, beats: Sequence[int]) -> list[int]:
        """The ranks whose counters have not changed for longer than the timeout."""
        gap_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        for rank, beat in enumerate(beats):
            still = beat == self._seen[rank]
            self._still_s[rank] += min(gap_s, self._longest_gap_s)
            if not still:
                self._seen[rank], self._still_s[rank] = beat, 0.0
        return [rank for rank, still_s in enumerate(self._still_s) if still_s > self._timeout_s]


class Beats:
    """One counter for each rank in a file that all of them map."""

    def __init__(self, path: Path, num_ranks: int, rank: int) -> None:
        size = 8 * num_ranks
        if rank == 0:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)
        self._counters = np.frombuffer(self._memory, dtype=np.int64)
        self._rank = rank

    def beat(self) -> None:
        self._counters[self._rank] += 1

    def read(self) -> list[int]:
        counters: list[int] = self._counters.tolist()
        return counters


class BeatThread:
    """Calls `tick` every period until `stop`."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_PERIOD_S):
            self._tick()

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def watcher(
    beats: Beats, num_ranks: int, timeout_s: float, on_hang: Callable[[int], None]
) -> Callable[[], None]:
    """Rank 0's tick: beat, look, and tell of the first rank that hangs."""
    watch = PeerWatch(num_ranks, timeout_s)

    def tick() -> None:
        beats.beat()
        hung = watch.look(time.monotonic(), beats.read())
        if hung:
            on_hang(hung[0])

    return tick
