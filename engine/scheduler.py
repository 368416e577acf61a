"""Continuous batching: which running turns get how many tokens of the next step. Ints only.

A turn is a list of segments to prefill and then decodes, one token a step, until it is removed:

    add(segments) -> | prefill chunk | ... | last chunk | decode | decode | ... -> remove
                                            first sample ^

Every decoding turn is in every step. Prefills share what is left of the token budget, one chunk each,
the one with the least left to prefill first: a short prompt overtakes the replays that a lost replica
left behind, and of many replays the first are done long before the last. Every `PATIENCE`-th step
the one that has waited longest goes first instead, so that short prompts without end starve nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 4


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """At most `max_running` turns, `token_budget` tokens a step, `max_chunk` of them of one turn.

    Raises ValueError unless `token_budget` > `max_running`, so that a step full of decoding turns
    still prefills; `max_running + max_chunk` leaves room for one whole chunk.
    """

    max_running: int
    token_budget: int
    max_chunk: int

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_chunk < 1:
            raise ValueError("max_running and max_chunk must be at least 1")
        if self.token_budget <= self.max_running:
            raise ValueError("token_budget must be more than max_running")


@dataclass(frozen=True, slots=True)
class Share:
    """`count` tokens of a turn: of its segment number `segment` from `offset`, or one decode token
    (`segment` -1). `samples` says whether the row draws a token."""

    turn: int
    segment: int
    offset: int
    count: int
    samples: bool


@dataclass(slots=True)
class _Prefill:
    """`left` tokens are still to be handed out, from `offset` of number `segment` on."""

    segments: tuple[int, ...]
    left: int
    segment: int = 0
    offset: int = 0


class Scheduler:
    """Turns are named by ints that the caller chooses; a name may be used again once removed."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._prefills: dict[int, _Prefill] = {}
        # In the order in which they last had a chunk, or came.
        self._queue: deque[int] = deque()
        self._num_prefill_steps = 0
        self._decodes: dict[int, None] = {}

    @property
    def num_running(self) -> int:
        return len(self._prefills) + len(self._decodes)

    @property
    def has_room(self) -> bool:
        return self.num_running < self._config.max_running

    def add(self, turn: int, segments: Sequence[int]) -> None:
        """Start a turn that prefills `segments`, a token count each, none empty, at least one.

        Raises ValueError for anything else, for a turn that runs already and when there is no room.
        """
        if turn in self._prefills or turn in self._decodes:
            raise ValueError(f"turn {turn} runs already")
        if not self.has_room:
            raise ValueError(f"{self.num_running} turns run already")
        if not segments or min(segments) < 1:
            raise ValueError("a turn needs at least one segment, and no segment may be empty")
        self._prefills[turn] = _Prefill(tuple(segments), sum(segments))
        self._queue.append(turn)

    def remove(self, turn: int) -> None:
        """End a turn, wherever it stands. Raises ValueError if it does not run."""
        if turn in self._prefills:
            del self._prefills[turn]
            self._queue.remove(turn)
        elif turn in self._decodes:
            del self._decodes[turn]
        else:
            raise ValueError(f"turn {turn} does not run")

    def schedule(self) -> list[Share]:
        """The next step: decoding turns in the order they got there, then prefill chunks.

        Each call takes the step as done: a token is handed out once. The first prefill gets whatever
        fits, later ones a whole chunk or nothing, since a sliver costs nearly as much to run.
        """
        shares = [Share(turn, -1, 0, 1, samples=True) for turn in self._decodes]
        budget = self._config.token_budget - len(shares)
        for place, turn in enumerate(self._in_order()):
            prefill = self._prefills[turn]
            in_segment = prefill.segments[prefill.segment] - prefill.offset
            count = min(in_segment, self._config.max_chunk)
            if count > budget and place > 0:
                break
            count = min(count, budget)
            budget -= count
            shares.append(self._advance(turn, prefill, count))
        return shares

    def _in_order(self) -> list[int]:
        """The prefilling turns, who goes first first."""
        ordered = sorted(self._queue, key=lambda turn: self._prefills[turn].left)
        if ordered:
            self._num_prefill_steps += 1
            if self._num_prefill_steps % PATIENCE == 0:
                oldest = self._queue[0]
                ordered.remove(oldest)
                ordered.insert(0, oldest)
        return ordered

    def _advance(self, turn: int, prefill: _Prefill, count: int) -> Share:
        segment, offset = prefill.segment, prefill.offset
        prefill.offset += count
        prefill.left -= count
        self._queue.remove(turn)
        if prefill.offset == prefill.segments[segment]:
            prefill.segment, prefill.offset = segment + 1, 0
        done = prefill.segment == len(prefill.segments)
        if done:
            del self._prefills[turn]
            self._decodes[turn] = None
        else:
            self._queue.append(turn)
        return Share(turn, segment, offset, count, samples=done)

    def check_integrity(self) -> None:
        """Raises RuntimeError if the bookkeeping contradicts itself."""
        if sorted(self._queue) != sorted(self._prefills):
            raise RuntimeError("the prefill queue and the prefilling turns differ")
        if self._prefills.keys() & self._decodes.keys():
            raise RuntimeError("a turn both prefills and decodes")
        if self.num_running > self._config.max_running:
            raise RuntimeError("more turns run than max_running")
        for turn, prefill in self._prefills.items():
            if not 0 <= prefill.offset < prefill.segments[prefill.segment]:
                raise RuntimeError(f"turn {turn} prefills outside its segment")
            if prefill.left != sum(prefill.segments[prefill.segment :]) - prefill.offset:
                raise RuntimeError(f"turn {turn} has miscounted what it has left")
