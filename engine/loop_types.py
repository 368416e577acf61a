"""What the owner of an `engine.loop.EngineLoop` gives and gets: configuration, handle, figures, errors.

LoopError
|- Overloaded      the waiting queue is full: try again later
|- TurnRunning     the conversation has a turn that has not been settled or discarded
|- LoopStopped     the loop is stopping or dead: another replica must take the turn
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.residency import Resident


class LoopError(Exception):
    """Base of what `EngineLoop.submit` raises."""


class Overloaded(LoopError):
    """The waiting queue is full."""


class TurnRunning(LoopError):
    """The conversation has a turn that has not been settled or discarded."""


class LoopStopped(LoopError):
    """The loop takes no more turns."""


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """`max_running` turns a step (never more than the engine has slots), `prefill_tokens` beside them
    (0: one whole chunk), `max_waiting` turns in the queue."""

    max_running: int = 16
    prefill_tokens: int = 0
    max_waiting: int = 64


@dataclass(frozen=True, slots=True)
class LoopStats:
    """A consistent picture. `unsettled` turns have ended and hold their slot until their commit.

    `step_running_s` is the age of the step that runs now, 0 between steps; `dead` says why the loop
    is dead, None while it lives. `residents` are clean slots, latest use first, of limited number.
    `host_hits` conversations came back from host memory, where `host_slots_used` are kept now.
    """

    running: int
    waiting: int
    unsettled: int
    num_slots: int
    free_slots: int
    clean_slots: int
    num_steps: int
    prefilled_tokens: int
    generated_tokens: int
    evicted_slots: int
    host_slots: int
    host_slots_used: int
    host_hits: int
    step_running_s: float
    dead: str | None
    residents: tuple[Resident, ...]


class TurnHandle:
    """What `submit` returns: a way to cancel exactly this turn."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def cancel(self) -> None:
        """End the turn before the next step, with TurnEnded("cancelled") unless it has ended."""
        self._cancel()
