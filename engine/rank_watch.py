"""Whether the other ranks still move, and whether one that moves is stuck: signs in shared memory, judged by
rank 0.

    beats     +1 four times a second, by a thread of the rank's own: does the *process* run?
    points    +1 at each place that every rank comes to in the same order: does its *step* get on?
    busy, ready   what the rank's step does while it is behind: CPU time used, beats at which it was
              runnable or waited for a disk

A process whose beats stand still is stopped, dead, or so stuck that no thread of it runs (`PeerWatch`).
Beats go on while a rank waits for work and while a step takes long, so neither is mistaken for that.

A rank whose beats go on is **stuck or slow** (`ProgressWatch`). All ranks pass the same points: a plan that
came, and on CPUs each all-reduce and gather of it, two a layer. Who has passed fewer than another is the one
that is waited for. Time counts against nobody else: not between steps, whatever rank 0 does then, and not
against those who wait. What tells stuck from slow is what the laggard does meanwhile, not how long it takes:

    nothing, for `idle_s`    no CPU time, no thread that could run or waits for a disk: a lock, a wait that
                             nobody ends, a lost wake-up. Computing is never like that, however slow the
                             machine: a starved thread is runnable, one whose weights page in waits for a disk
    CPU time over `busy_s`   an endless loop looks like a long computation, so it gets far more than half a
                             layer takes, and `MANY_TIMES` what any rank was ever seen to need. CPU time, not
                             time: a rank that gets little of the machine is given longer

So a deadlock ends the replica within 5 s and a loop after 20 s of CPU time; a rank that is slow, by as much
as that, is waited for. What is left (all wait at the same point) ends with `RankTimeouts.step_s`.

GPU ranks return from a step as soon as its kernels are launched; rank 0 alone waits for its device. Their
points are a plan that came and a plan that is launched; rank 0 counts the second when it sends the first, as
it has nothing to do but to wait. So a host that is stuck before all is launched is found. A device that never
finishes leaves every host where it should be: nothing here tells, and the age of the step does
(`step_timeout_s`).
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.rank_activity import Activity

BEAT_PERIOD_S = 0.25
RANK_TIMEOUT_S = 3.5
"""A counter that stands still for so long means a hung rank. With a beat, what it takes to notice and to
kill, the replica is gone within 5 s."""

IDLE_S = 3.0
"""As above; the first beat after a rank is waited for only begins to measure what it does."""
BUSY_S = 20.0
MANY_TIMES = 10.0
_WORKS = 0.05
"""CPU time per time of a step that does something; threads of libraries that only look around use less."""


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


@dataclass(frozen=True, slots=True)
class Signs:
    """What a rank shows of itself: counters that only grow. `busy_ns` is CPU time."""

    beats: int = 0
    points: int = 0
    busy_ns: int = 0
    ready: int = 0


@dataclass(frozen=True, slots=True)
class ProgressLimits:
    """Seconds that a rank may keep the others waiting: without doing anything, and of CPU time. What is
    learnt of slow ranks raises the latter, up to `most_s`."""

    idle_s: float = IDLE_S
    busy_s: float = BUSY_S
    most_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Stuck:
    """A rank that will not come, and what it did while it was waited for."""

    rank: int
    did: Literal["nothing", "computed"]
    seconds: float


@dataclass(slots=True)
class _Account:
    """Of one rank, since it is waited for at the point where it stands. `open_s`: since its last beat."""

    idle_s: float = 0.0
    busy_s: float = 0.0
    open_s: float = 0.0


class ProgressWatch:
    """Says which ranks are stuck while others wait for them (see the module). Pure, as `PeerWatch` is:
    a watcher that was stopped counts nothing for that time, nor does a rank whose beats stand still."""

    def __init__(
        self, num_ranks: int, limits: ProgressLimits, period_s: float = BEAT_PERIOD_S
    ) -> None:
        self._limits = limits
        self._longest_gap_s = 2 * period_s
        self._seen = [Signs()] * num_ranks
        self._accounts = [_Account() for _ in range(num_ranks)]
        self._slowest_s = 0.0
        self._looked_s: float | None = None

    def look(self, now_s: float, signs: Sequence[Signs]) -> list[Stuck]:
        """The ranks that are stuck, as far as is known by now."""
        gap_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        front = max(one.points for one in signs)
        for rank, one in enumerate(signs):
            seen, self._seen[rank] = self._seen[rank], one
            if one.points != seen.points:
                # It was slow, and came: the next may be as slow, or have more to do.
                self._slowest_s = max(self._slowest_s, self._accounts[rank].busy_s)
            if one.points != seen.points or one.points == front:
                self._accounts[rank] = _Account()
            else:
                _charge(self._accounts[rank], seen, one, gap_s, self._longest_gap_s)
        return [found for rank in range(len(signs)) if (found := self._judge(rank)) is not None]

    def _judge(self, rank: int) -> Stuck | None:
        account, limits = self._accounts[rank], self._limits
        if account.idle_s > limits.idle_s:
            return Stuck(rank, "nothing", account.idle_s)
        if account.busy_s > min(max(limits.busy_s, MANY_TIMES * self._slowest_s), limits.most_s):
            return Stuck(rank, "computed", account.busy_s)
        return None


def _charge(account: _Account, seen: Signs, now: Signs, gap_s: float, longest_gap_s: float) -> None:
    """Several threads that compute at once use no more than the time that passed. Without a new beat
    nothing is known of that time yet."""
    passed_s = account.open_s = min(account.open_s + gap_s, longest_gap_s)
    if now.beats == seen.beats:
        return
    account.open_s = 0.0
    used_s = min((now.busy_ns - seen.busy_ns) / 1e9, passed_s)
    account.busy_s += used_s
    if used_s >= _WORKS * passed_s or now.ready != seen.ready:
        account.idle_s = 0.0
    else:
        account.idle_s += passed_s


class SharedSigns:
    """The signs of all ranks in a file that each of them maps; this process is `rank`."""

    _FIELDS = 4
    _BEATS, _POINTS, _BUSY_NS, _READY = range(4)

    def __init__(self, path: Path, num_ranks: int, rank: int) -> None:
        size = 8 * self._FIELDS * num_ranks
        if rank == 0:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._cells = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        self.rank = rank
        self._first = rank * self._FIELDS
        self.step_thread = threading.get_native_id()
        """The thread that passed the last point, as the kernel numbers it."""

    def reached(self) -> None:
        """This rank is at the next point. On the way of every all-reduce: it costs well below 1 us."""
        self._cells[self._first + self._POINTS] += 1
        self.step_thread = threading.get_native_id()

    def beat(self) -> None:
        self._cells[self._first + self._BEATS] += 1

    def busy(self, nanoseconds: int) -> None:
        self._cells[self._first + self._BUSY_NS] += nanoseconds

    def ready(self) -> None:
        self._cells[self._first + self._READY] += 1

    def read(self) -> list[Signs]:
        cells = self._cells.tolist()
        return [Signs(*cells[at : at + self._FIELDS]) for at in range(0, len(cells), self._FIELDS)]


class Beater:
    """What a rank says of itself at every beat. What its step does is measured only while it stands still
    behind another rank: a group that gets on pays for nothing."""

    def __init__(self, signs: SharedSigns, measure: Callable[[int], Activity]) -> None:
        self._signs = signs
        self._measure = measure
        self._points = 0
        self._before: Activity | None = None

    def beat(self) -> None:
        every = self._signs.read()
        mine = every[self._signs.rank]
        stands = mine.points == self._points and mine.points < max(one.points for one in every)
        now = self._measure(self._signs.step_thread) if stands else None
        if now is not None:
            if self._before is None or now.ready:
                # Nothing to compare with yet: the rank has the benefit of the doubt.
                self._signs.ready()
            if self._before is not None:
                self._signs.busy(max(0, now.cpu_ns - self._before.cpu_ns))
        self._before, self._points = now, mine.points
        self._signs.beat()  # last: a new beat means that the rest is new


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


class Watcher:
    """Rank 0's eye on all ranks, itself among them: it tells of the first that hangs or is stuck.

    Nobody is taken for stuck before `watches_progress` is set.
    """

    def __init__(
        self,
        signs: SharedSigns,
        timeout_s: float,
        limits: ProgressLimits,
        on_hang: Callable[[int, str], None],
    ) -> None:
        num_ranks = len(signs.read())
        self.watches_progress = False
        self._signs = signs
        self._timeout_s = timeout_s
        self._peers = PeerWatch(num_ranks, timeout_s)
        self._progress = ProgressWatch(num_ranks, limits)
        self._on_hang = on_hang

    def look(self) -> None:
        now_s, signs = time.monotonic(), self._signs.read()
        hung = self._peers.look(now_s, [one.beats for one in signs])
        if hung:
            self._on_hang(hung[0], f"has not moved for {self._timeout_s} s")
        elif self.watches_progress:
            for stuck in self._progress.look(now_s, signs)[:1]:
                self._on_hang(stuck.rank, describe(stuck))


def describe(stuck: Stuck) -> str:
    """For the log, after the name of the rank."""
    if stuck.did == "nothing":
        return f"is stuck in a step: it did nothing for {stuck.seconds:.1f} s while others waited for it"
    return f"is stuck in a step: others waited for it while it computed for {stuck.seconds:.1f} s"
