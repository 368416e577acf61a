"""What tensor-parallel ranks do together, whatever carries it.

Every rank makes the same calls in the same order. All of them raise EngineDead when the other ranks do
not come: a rank that has lost the others can do nothing more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Collective(Protocol):
    """A group of `size` ranks; this process is number `rank`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, values: Floats) -> None:
        """Replace `values`, C-contiguous, by the sum of all ranks'."""
        ...

    def gather(self, values: Floats) -> Floats | None:
        """The values of all ranks, [size, *shape], on rank 0; None on the others."""
        ...

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's `data`, on every rank; what the others give is not looked at."""
        ...


_REDUCE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Reducer:
    """`Collective.all_reduce` as the function that engine/kernels/allreduce.c calls.

    `address` is its graph input, int64 [2]. An exception cannot pass through C: it is kept in `failed`.
    """

    def __init__(self, all_reduce: Callable[[Floats], None]) -> None:
        self.failed: BaseException | None = None
        self._all_reduce = all_reduce
        self._function = _REDUCE(self._call)
        where = ctypes.cast(self._function, ctypes.c_void_p).value
        self.address = np.array([where, 0], dtype=np.int64)

    def _call(self, context: int | None, values: int, count: int) -> int:
        try:
            memory = (ctypes.c_float * count).from_address(values)
            self._all_reduce(np.frombuffer(memoryview(memory).cast("B"), dtype=np.float32))
        except BaseException as error:
            self.failed = error
            return 1
        return 0
