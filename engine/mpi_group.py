"""Processes of one machine as a group of ranks, started and joined by MPI: MPICH and its launcher.

The only file that imports mpi4py. Importing it starts MPI, which a process can do once in its life.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mpi4py
import numpy as np

from engine.collective import Floats
from engine.protocol import EngineDead
from engine_build.spec import SpecError

mpi4py.rc(finalize=False)  # at exit it would wait for ranks that are gone
from mpi4py import MPI  # noqa: E402

_BLOCK_BYTES = 4096
_LENGTH_BYTES = 8
_REPORT_BYTES = 16384

_SPIN_S = 0.002
_SHORTEST_NAP_S, _LONGEST_NAP_S = 20e-6, 1e-3


class MpiGroup:
    """This process's membership: made by `spawn` on rank 0, by `join` on the ranks that it starts."""

    def __init__(self, comm: MPI.Intracomm, link: MPI.Intercomm, timeout_s: float) -> None:
        self._comm = comm
        self._link = link
        self.collective = MpiCollective(comm, timeout_s)

    @classmethod
    def spawn(cls, arguments: Sequence[str], num_others: int, timeout_s: float) -> MpiGroup:
        """Start Python with these arguments so many times, each to call `join`; this is rank 0.

        Raises SpecError where MPI's launcher is missing, EngineDead if it fails or if this process has
        left a group before.
        """
        if MPI.Is_finalized():
            raise EngineDead("a process can start tensor-parallel ranks once. Start a new process")
        _leave_process_group()
        try:
            with _launcher_environment():
                link = MPI.COMM_SELF.Spawn(sys.executable, list(arguments), num_others)
            return cls(link.Merge(high=False), link, timeout_s)
        except MPI.Exception as error:
            raise EngineDead(f"the ranks could not be started: {error}") from error

    @classmethod
    def join(cls, timeout_s: float) -> MpiGroup:
        """The group of the process that started this one."""
        parent = MPI.Comm.Get_parent()
        return cls(parent.Merge(high=True), parent, timeout_s)

    def leave(self) -> None:
        """All ranks together. MPI ends with it: the launcher takes an end without that for a crash, and
        would kill this process."""
        self._comm.Free()
        self._link.Disconnect()
        MPI.Finalize()


class MpiCollective:
    """See `engine.collective.Collective`; ranks are those of `comm`, all on this machine.

    No call blocks inside MPI: requests are polled. Polling spins, yielding, for as long as each rank can
    have a core of its own, then naps.

    `reached` is called at each point that all ranks come to in the same order: where a rank enters an
    all-reduce or a gather, where rank 0 broadcasts, and where another rank has got what was broadcast, so
    that waiting for it is no point. `failed` ends every wait with EngineDead, as `timeout_s` does.
    """

    def __init__(self, comm: MPI.Intracomm, timeout_s: float) -> None:
        self.failed: str | None = None
        self.timeout_s = timeout_s
        self.reached: Callable[[], None] = lambda: None
        self._comm = comm
        self._spin_s = _SPIN_S if comm.size <= len(os.sched_getaffinity(0)) else 0.0

    @property
    def rank(self) -> int:
        return int(self._comm.rank)

    @property
    def size(self) -> int:
        return int(self._comm.size)

    def all_reduce(self, values: Floats) -> None:
        """See `Collective.all_reduce`."""
        self.reached()
        self._wait(self._comm.Iallreduce(MPI.IN_PLACE, values), self.timeout_s)

    def gather(self, values: Floats) -> Floats | None:
        """See `Collective.gather`."""
        values = np.ascontiguousarray(values)
        every = np.empty((self.size, *values.shape), np.float32) if self.rank == 0 else None
        self.reached()
        self._wait(self._comm.Igather(values, every, root=0), self.timeout_s)
        return every

    def broadcast(self, data: bytes) -> bytes:
        """See `Collective.broadcast`."""
        return self._broadcast(data, self.timeout_s)

    def next_message(self, timeout_s: float | None = None) -> bytes:
        """What rank 0 broadcasts next, however long that takes or within so many seconds."""
        return self._broadcast(b"", timeout_s)

    def gather_text(self, text: str, timeout_s: float) -> list[str]:
        """The texts of all ranks (their last 16 KiB) on rank 0, nothing on the others."""
        mine = np.zeros(_REPORT_BYTES, np.uint8)
        data = text.encode()[-_REPORT_BYTES:]
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        every = np.empty((self.size, _REPORT_BYTES), np.uint8) if self.rank == 0 else None
        self._wait(self._comm.Igather(mine, every, root=0), timeout_s)
        if every is None:
            return []
        return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in every]

    def _broadcast(self, data: bytes, timeout_s: float | None) -> bytes:
        """Length and beginning in one block, what does not fit into it in a second message."""
        block = np.zeros(_BLOCK_BYTES, np.uint8)
        room = _BLOCK_BYTES - _LENGTH_BYTES
        if self.rank == 0:
            head = len(data).to_bytes(_LENGTH_BYTES, "little") + data[:room]
            block[: len(head)] = np.frombuffer(head, np.uint8)
            self.reached()
        self._wait(self._comm.Ibcast(block, root=0), timeout_s)
        if self.rank != 0:
            self.reached()
        length = int.from_bytes(block[:_LENGTH_BYTES].tobytes(), "little")
        received = block[_LENGTH_BYTES : _LENGTH_BYTES + length].tobytes()
        if length <= room:
            return received
        rest = np.zeros(length - room, np.uint8)
        if self.rank == 0:
            rest[:] = np.frombuffer(data[room:], np.uint8)
        self._wait(self._comm.Ibcast(rest, root=0), self.timeout_s)
        return received + rest.tobytes()

    def _wait(self, request: MPI.Request, timeout_s: float | None) -> None:
        began_s = time.perf_counter()
        try:
            while not request.Test():
                if self.failed is not None:
                    raise EngineDead(self.failed)
                waited_s = time.perf_counter() - began_s
                if timeout_s is not None and waited_s > timeout_s:
                    raise EngineDead(f"the other ranks did not come for {timeout_s:.0f} s")
                if waited_s < self._spin_s:
                    os.sched_yield()
                else:
                    time.sleep(min(max(waited_s / 20, _SHORTEST_NAP_S), _LONGEST_NAP_S))
        except MPI.Exception as error:
            raise EngineDead(f"MPI: {error}") from error


def _leave_process_group() -> None:
    """The launcher kills rank 0's whole process group, and a Ray worker shares the one of its node."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


@contextlib.contextmanager
def _launcher_environment() -> Iterator[None]:
    """`mpiexec` of this environment first on PATH, and this code importable in the ranks."""
    beside, code = str(Path(sys.executable).parent), str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [beside, os.environ.get("PATH", "")]))
    if shutil.which("mpiexec", path=path) is None:
        raise SpecError(
            "tp_size",
            "there is no mpiexec to start tensor-parallel ranks with",
            "Install the `mpich` package into this environment",
        )
    imports = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH", "")]))
    before = {name: os.environ.get(name) for name in ("PATH", "PYTHONPATH")}
    os.environ.update(PATH=path, PYTHONPATH=imports)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
