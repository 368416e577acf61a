"""A protocol with one deliberate fault, and which runs should notice it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.sim.replica import Host, SimReplica
from tests.sim.world import Cast, Plan

MAX_SEEDS = 60


@dataclass(frozen=True, slots=True)
class Edit:
    """In the Lua function `function`, `old` becomes `new`."""

    function: str
    old: str
    new: str

    def apply(self, library: str) -> str:
        """The mutated library. Raises ValueError unless `old` is there exactly once."""
        start = library.index(f"local function {self.function}(")
        stop = library.index("\nend\n", start)
        body = library[start:stop]
        if body.count(self.old) != 1:
            raise ValueError(f"{self.function} says {self.old!r} {body.count(self.old)} times")
        return library[:start] + body.replace(self.old, self.new) + library[stop:]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`kinds` of faults that bring it out; `noisy`: the only toy that does (None: both do). `start`
    is where the search begins: seeds before it are known not to bring it out."""

    kinds: tuple[str, ...]
    make: Callable[[Host], SimReplica] = SimReplica
    edit: Edit | None = None
    noisy: bool | None = None
    start: int = 0

    @property
    def players(self) -> Cast:
        return Cast(self.make)

    def library(self, library: str) -> str:
        """The store's functions."""
        return self.edit.apply(library) if self.edit else library

    def plans(self, noisy: bool | None = None) -> Iterator[Plan]:
        """Runs that should notice the fault; with `noisy`, on this toy alone."""
        only = self.noisy if noisy is None else noisy
        for seed in range(self.start, self.start + MAX_SEEDS):
            kind = self.kinds[seed % len(self.kinds)]
            both = seed // len(self.kinds) % 2 == 1
            yield Plan(seed, kind, both if only is None else only)
