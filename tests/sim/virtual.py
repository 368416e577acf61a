"""Virtual time: an event loop whose clock jumps to the next timer, and processes that crash and pause.

One thread, no I/O: whatever runs on the loop happens in an order that the timers alone decide, so the
same random numbers give the same run. A simulated hour costs nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class Deadlock(Exception):
    """Nothing is left to happen, and the main task has not ended."""


class _NoFiles:
    """A selector that never finds anything and lets time pass at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[NoReturn]:
        if timeout is None:
            raise Deadlock("every task waits for another one")
        self._loop.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """An asyncio loop in virtual seconds from 0 on. `failed` gets the first error of a process."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.failed: asyncio.Future[None] = self.create_future()
        self._selector = _NoFiles(self)

    def time(self) -> float:
        return self.now_s

    def _process_events(self, event_list: list[NoReturn]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nothing sleeps, so nothing is to be woken."""


def report_failure(error: BaseException) -> None:
    """The run is to end with this error, if it is the first."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, VirtualLoop) and not loop.failed.done():
        loop.failed.set_exception(error)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Process:
    """What a fault hits: everything that awaits `gate` stops when the process is paused or dead.

    A dead process's tasks are never told; they stay where they are, as those of a killed process do,
    until `bury` clears them away after the run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.died = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()
        self._tasks: list[asyncio.Task[Any]] = []
        self._buried = False

    @property
    def is_up(self) -> bool:
        return self._awake.is_set() and not self.died.is_set()

    def spawn(self, step: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(step)
        self._tasks.append(task)
        task.add_done_callback(self._look_at)
        return task

    @staticmethod
    def _look_at(task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            report_failure(error)

    async def gate(self) -> None:
        """Go on once the process runs; never, if it is dead."""
        while not self.is_up:
            if self._buried:
                raise asyncio.CancelledError
            if self.died.is_set():
                await asyncio.Event().wait()
            await self._awake.wait()

    async def sleep(self, seconds: float) -> None:
        """Let time pass here."""
        await asyncio.sleep(seconds)
        await self.gate()

    def pause(self) -> None:
        self._awake.clear()

    def resume(self) -> None:
        self._awake.set()

    def crash(self) -> None:
        self.died.set()
        # Whoever waits to be resumed must see that it never will be.
        self._awake.set()

    async def bury(self) -> None:
        """After the run: end what is left."""
        self._buried = True
        self.died.set()
        self._awake.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def bury_all() -> None:
    """End whatever else is left on the loop."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


class Dice:
    """Named streams of one seed: what one actor draws does not shift what another one gets."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def stream(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}/{name}")
