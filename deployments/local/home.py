"""Where one machine's service keeps its files, and what it notes about itself while it runs.

$SINKSERVE_HOME (default ~/.sinkserve)
|- models/   downloaded checkpoints          |- data/     the embedded store: the conversations
|- engines/  built engine directories        |- logs/     of `up --detach`
|- service.json   the running service        |- service.lock   held by `up` while it lives
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Phase = Literal["starting", "ready", "stopping"]


class HomeBusy(Exception):
    """Another `up` holds this home."""


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """A process that cannot be confused with a later one of the same pid. `create_time` in Unix s."""

    pid: int
    create_time: float

    @classmethod
    def of(cls, process: psutil.Process) -> ProcessMark:
        return cls(process.pid, process.create_time())

    def find(self) -> psutil.Process | None:
        """The process, if it still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.create_time and process.status() != "zombie":
                return process
        return None


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What `up` tells the other commands. `processes` are its descendants, for a later clean-up."""

    process: ProcessMark
    phase: Phase
    url: str
    redis_url: str
    ray_address: str
    started_s: float
    processes: tuple[ProcessMark, ...] = ()


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one service on this machine."""

    root: Path

    @classmethod
    def from_env(cls) -> Home:
        return cls(Path(os.environ.get("SINKSERVE_HOME") or "~/.sinkserve").expanduser().absolute())

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def log_file(self) -> Path:
        return self.root / "logs" / "up.log"

    @property
    def chat_history(self) -> Path:
        return self.root / "chat_history"

    @property
    def ray_dir(self) -> Path:
        """Ray's own files. Outside of `root`: a Unix socket's path has at most 107 characters."""
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"sinkserve-{os.getuid()}-{digest}"

    @property
    def ray_token(self) -> Path:
        return self.root / "ray_token"

    @property
    def _state_file(self) -> Path:
        return self.root / "service.json"

    @property
    def _lock_file(self) -> Path:
        return self.root / "service.lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this home; the kernel lets go when the process dies. Raises HomeBusy."""
        self.root.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HomeBusy(str(self.root)) from error
            yield

    def is_running(self) -> bool:
        """Whether some process holds this home."""
        if not self._lock_file.exists():
            return False
        try:
            with self.locked():
                return False
        except HomeBusy:
            return True

    def read_state(self) -> ServiceState | None:
        """The last state written, also by a service that has died since; None if there is none."""
        try:
            fields = json.loads(self._state_file.read_text())
            fields["process"] = ProcessMark(**fields["process"])
            fields["processes"] = tuple(ProcessMark(**mark) for mark in fields["processes"])
            return ServiceState(**fields)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write_state(self, state: ServiceState) -> None:
        """Atomic: readers see the old state or the new one."""
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self._state_file.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600)  # a Redis URL may hold a password
        temporary.write_text(json.dumps(dataclasses.asdict(state)))
        temporary.replace(self._state_file)

    def clear_state(self) -> None:
        self._state_file.unlink(missing_ok=True)


def this_process() -> ProcessMark:
    """The mark of the process that asks."""
    return ProcessMark.of(psutil.Process())


def descendants(pid: int | None = None) -> tuple[ProcessMark, ...]:
    """Every living descendant of `pid` (default: this process)."""
    marks = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                marks.append(ProcessMark.of(process))
    return tuple(marks)


def end_processes(marks: Iterable[ProcessMark], grace_s: float = 10.0) -> int:
    """End these processes and their descendants: SIGTERM, then SIGKILL. Returns how many there were."""
    found: dict[int, psutil.Process] = {}
    for mark in marks:
        process = mark.find()
        if process is not None:
            found[process.pid] = process
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update({child.pid: child for child in process.children(recursive=True)})
    found.pop(os.getpid(), None)
    for process in found.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(list(found.values()), timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)
    return len(found)
