"""A tensor-parallel rank in trouble: beats and all, but one all-reduce of it comes late, or never.

TP_TROUBLE=KIND:RANK in the environment says which trouble, and whose. The program of ranks other than 0.
"""

from __future__ import annotations

import functools
import os
import threading
import time

import numpy as np

from engine.collective import Collective, Floats
from engine.protocol import Engine
from engine.rank_executors import OpenExecutor, RankOptions, open_executor

CALLS_BEFORE = 40
"""All-reduces before the trouble: ten steps of the tiny model."""
SLOW_S = 7.0
"""Longer than a rank may do nothing, and than the replica may take to die; of CPU time."""


def lock() -> None:
    """Deadlock: the GIL is free, so beats go on."""
    held = threading.Lock()
    held.acquire()
    held.acquire()


def loop() -> None:
    """Compute for ever."""
    while True:
        pass


def slow() -> None:
    """Compute for long, at times without Python."""
    matrix = np.random.default_rng(0).standard_normal((400, 400))
    began_s = time.thread_time()
    while time.thread_time() < began_s + SLOW_S:
        matrix = np.tanh(matrix @ matrix)


TROUBLES = {"lock": lock, "loop": loop, "slow": slow}


class Troubled:
    """`collective`, in trouble once."""

    def __init__(self, collective: Collective, kind: str) -> None:
        self._collective = collective
        self._trouble = TROUBLES[kind]
        self._calls = 0

    @property
    def rank(self) -> int:
        return self._collective.rank

    @property
    def size(self) -> int:
        return self._collective.size

    def all_reduce(self, values: Floats) -> None:
        """See `Collective.all_reduce`."""
        self._calls += 1
        if self._calls == CALLS_BEFORE:
            self._trouble()
        self._collective.all_reduce(values)

    def gather(self, values: Floats) -> Floats | None:
        """See `Collective.gather`."""
        return self._collective.gather(values)

    def broadcast(self, data: bytes) -> bytes:
        """See `Collective.broadcast`."""
        return self._collective.broadcast(data)


def open_troubled(options: RankOptions, collective: Collective, whole: OpenExecutor) -> Engine:
    """What `whole` opens, in trouble on the rank that is to be."""
    kind, victim = os.environ["TP_TROUBLE"].split(":")
    if collective.rank == int(victim):
        return whole(options, Troubled(collective, kind))
    return whole(options, collective)


if __name__ == "__main__":
    from engine.ranks import main  # starts MPI

    main(functools.partial(open_troubled, whole=open_executor))
