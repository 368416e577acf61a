"""A NCCL communicator of one's own, through the library that torch has loaded: TensorRT asks for the handle.

Follows nccl.h of NCCL 2: `ncclUniqueId` is 128 bytes, handed over by value; results other than 0 are errors.
"""

from __future__ import annotations

import ctypes
from typing import Any

from engine.collective import Collective
from engine.protocol import EngineDead
from engine_build.spec import SpecError

_LIBRARY = "libnccl.so.2"
_FLOAT32 = 7


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * 128),)


class NcclGroup:
    """The ranks of `collective`, one GPU each: the current device of each process.

    Every rank makes the same calls in the same order. Raises SpecError without the library, EngineDead
    for what NCCL refuses.
    """

    def __init__(self, collective: Collective) -> None:
        try:
            self._nccl = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise SpecError(
                "tp_size", f"{_LIBRARY} is not here ({error})", "Install torch built for CUDA"
            ) from error
        self._nccl.ncclGetErrorString.restype = ctypes.c_char_p
        self.size = collective.size
        unique = _UniqueId()
        if collective.rank == 0:
            self._check(self._nccl.ncclGetUniqueId(ctypes.byref(unique)))
        unique = _UniqueId.from_buffer_copy(collective.broadcast(bytes(unique)))
        self._handle = ctypes.c_void_p()
        self._check(
            self._nccl.ncclCommInitRank(
                ctypes.byref(self._handle), self.size, unique, collective.rank
            )
        )

    def capsule(self) -> Any:
        """The handle as the Python capsule that TensorRT's `set_communicator` takes."""
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(self._handle, None, None)

    def all_gather(self, sent: int, received: int, count: int, stream: int) -> None:
        """`count` float32 at device address `sent` of every rank, in order of rank, to `received`."""
        self._check(
            self._nccl.ncclAllGather(
                ctypes.c_void_p(sent),
                ctypes.c_void_p(received),
                ctypes.c_size_t(count),
                _FLOAT32,
                self._handle,
                ctypes.c_void_p(stream),
            )
        )

    def close(self) -> None:
        """Leave the group without waiting for the others; idempotent."""
        if self._handle.value is not None:
            self._nccl.ncclCommAbort(self._handle)
        self._handle = ctypes.c_void_p()

    def _check(self, result: int) -> None:
        if result:
            raise EngineDead(f"NCCL: {self._nccl.ncclGetErrorString(result).decode()}")
