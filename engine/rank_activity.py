"""What the step of this process does now, as the kernel tells it: CPU time used, and whether it wants more.

Read from /proc/self/task/*/stat (proc(5)). A step is its thread and the native threads of the libraries that
compute for it (ONNX Runtime's). Other Python threads are something else: the one that asks, a replica's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NS_PER_TICK = 10**9 // os.sysconf("SC_CLK_TCK")
_STATE, _USER, _SYSTEM = 0, 11, 12
"""Fields of `stat` after the name, which may hold spaces and brackets."""


@dataclass(frozen=True, slots=True)
class Activity:
    """`cpu_ns` grows as the step computes, in hundredths of a second; `ready`: something of it runs, could
    run, or waits for a disk, be it in a compiler that it has started."""

    cpu_ns: int
    ready: bool


def step_activity(step_thread: int) -> Activity:
    """Of the step in this process that is run by this thread, as the kernel numbers it."""
    others = {thread.native_id for thread in threading.enumerate()} - {step_thread}
    cpu_ticks, ready = 0, False
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) in others:
            continue
        for fields in _stat(task):
            cpu_ticks += int(fields[_USER]) + int(fields[_SYSTEM])
            ready = ready or _wants(fields)
    return Activity(cpu_ticks * _NS_PER_TICK, ready or _compiles(step_thread))


def _compiles(step_thread: int) -> bool:
    """Whether a process that the step's thread has started is at work: Triton runs ptxas."""
    with suppress(OSError):
        children = Path(f"/proc/self/task/{step_thread}/children").read_text(encoding="ascii")
        return any(
            _wants(fields) for pid in children.split() for fields in _stat(Path("/proc", pid))
        )
    return False


def _wants(fields: list[str]) -> bool:
    return fields[_STATE] in ("R", "D")


def _stat(folder: Path) -> Iterator[list[str]]:
    """Nothing for one that has just ended."""
    with suppress(OSError):
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        yield text[text.rindex(")") + 2 :].split()
