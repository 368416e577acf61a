"""Tensor-parallel ranks of the CUDA engine as threads of one process, for tests that must be quick.

One of them computes at a time, and gives way where ranks meet: the interpreter is not made for threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from engine.cuda_options import TensorParallel
from tests.cuda_fixtures import torch

Result = TypeVar("Result")


class Meeting:
    """What `size` ranks share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size)
        self.brought: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What all ranks brought, in order of rank."""
        self.brought[rank] = value
        self.turn.release()
        try:
            self.barrier.wait()
            every = list(self.brought)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return every


class ThreadGroup:
    """Stands for `engine.cuda_group.RankGroup`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self.limit_s = None
        self._meeting = meeting

    def all_reduce(self, values: torch.Tensor) -> None:
        every = self._meeting.exchange(self.rank, values.clone())
        values.copy_(torch.stack(every).sum(0))

    def least(self, count: int) -> int:
        counts: list[int] = self._meeting.exchange(self.rank, count)
        return min(counts)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meeting.exchange(self.rank, values.clone()), dim=1)

    def close(self) -> None:
        pass


def as_ranks(
    monkeypatch: pytest.MonkeyPatch, size: int, work: Callable[[TensorParallel], Result]
) -> list[Result]:
    """What `work` gives on each rank; an error on one of them ends all."""
    meeting = Meeting(size)

    def join(parallel: TensorParallel, device: object) -> ThreadGroup:
        return ThreadGroup(meeting, parallel.rank)

    def run(rank: int) -> Result:
        with meeting.turn:
            try:
                return work(TensorParallel(rank, size, "of threads"))
            except BaseException:
                meeting.barrier.abort()
                raise

    monkeypatch.setattr("engine.cuda_runtime.RankGroup", join)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
