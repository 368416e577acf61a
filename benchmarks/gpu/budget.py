"""What to measure next, in the time that is left. Pure: an injected clock, no I/O.

A run has a budget because a lent machine has one. Tasks are tried in order of importance; one that no
longer fits is left for `--resume`, a shorter one after it may still fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SAVING_S = 5.0
"""Kept back at the end, for the last save and the summary."""

PATIENCE, MOST_PATIENCE_S = 4.0, 150.0
"""A task may take this many times its estimate before it is given up, but not so many seconds more: one that
hangs must not cost the others their time."""


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement: `section` of `model` with `parameters`. Lower `importance` comes first.

    `estimate_s` includes the start of a process and the compilation of kernels.
    """

    section: str
    model: str
    importance: int
    estimate_s: float
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """Which engine it is about: "cuda" where the parameters name none."""
        return str(self.parameters.get("engine", "cuda"))

    @property
    def key(self) -> str:
        """Its name in the results: section/model and what sets it apart."""
        rest = [f"{name}={value}" for name, value in self.parameters.items()]
        return "/".join([self.section, self.model, *rest])


class Budget:
    """`total_s` from now on, by `clock` (seconds, monotonic)."""

    def __init__(self, total_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end = clock() + total_s - SAVING_S

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._end - self._clock())

    def allows(self, task: Task) -> bool:
        return task.estimate_s <= self.remaining_s

    def timeout_s(self, task: Task) -> float:
        """How long the task may take: some patience, but never beyond the budget."""
        longest = min(PATIENCE * task.estimate_s, task.estimate_s + MOST_PATIENCE_S)
        return min(self.remaining_s, longest)


def in_order(
    tasks: Sequence[Task],
    only: Collection[str] = (),
    done: Collection[str] = (),
    failed_before: Collection[str] = (),
) -> list[Task]:
    """What is left to do, most important first: `only` these sections (all if empty), not `done` keys.

    What failed in an earlier call comes last: it may hang again.
    """
    left = [t for t in tasks if (not only or t.section in only) and t.key not in done]
    return sorted(left, key=lambda task: (task.key in failed_before, task.importance))


def fitting(tasks: Sequence[Task], budget_s: float) -> tuple[list[Task], list[Task]]:
    """Which of the ordered tasks fit by their estimates, and which are left for a later call."""
    now = 0.0
    chosen, left = [], []
    budget = Budget(budget_s, lambda: now)
    for task in tasks:
        if budget.allows(task):
            chosen.append(task)
            now += task.estimate_s
        else:
            left.append(task)
    return chosen, left
