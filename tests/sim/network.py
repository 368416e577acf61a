"""Everything between a process and the store: delay, loss of requests and of replies, outages."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.sim.virtual import Process, VirtualLoop

STORE_EPOCH_S = 4.0e9
"""Where the store's clock starts: so late that a real server never drops a key on its own."""


class Lost(Exception):
    """The request, or the reply to it, was lost."""


@dataclass(slots=True)
class Network:
    """`loss` is the chance that a message is lost, each way; `delay_s` the longest usual delay."""

    loop: VirtualLoop
    random: random.Random
    loss: float
    delay_s: float
    store_is_up: bool = True
    clock_offset_s: float = 0.0
    trace: list[str] = field(default_factory=list)

    def store_now_s(self) -> float:
        return STORE_EPOCH_S + self.loop.now_s + self.clock_offset_s

    def note(self, who: str, what: str) -> None:
        """A line of the trace."""
        self.trace.append(f"{self.loop.now_s:9.4f} {who:6} {what}")

    async def request(self, process: Process) -> None:
        """A message to the store. Raises Lost."""
        await process.gate()
        await process.sleep(self._delay())
        if not self.store_is_up or self.random.random() < self.loss:
            raise Lost("request lost")

    async def reply(self, process: Process) -> None:
        """A message from the store. Raises Lost."""
        await process.sleep(self._delay())
        if self.random.random() < self.loss:
            raise Lost("reply lost")

    def _delay(self) -> float:
        """Mostly short, sometimes long enough to be overtaken by much else."""
        if self.random.random() < 0.06:
            return self.random.uniform(0.0, 0.4)
        return self.random.uniform(0.0, self.delay_s)
