"""The way between the host and the device in a step: one copy there, one wait for what comes back."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.protocol import EngineDead

Ints = npt.NDArray[np.int64]

_NUM_BUFFERS = 2
_SPIN_S, _NAP_S = 0.05, 1e-4


class Upload:
    """A vector of int64 at a fixed place on the device, written from pinned memory that is never freed.

    The host fills one buffer while the copy out of the other may still wait for its turn on the stream.
    `limit_s` is the longest that the host waits for the device, without limit if None: see `wait`.
    """

    def __init__(self, num_words: int, device: torch.device, limit_s: float | None = None) -> None:
        self._limit_s = limit_s
        on_gpu = device.type == "cuda"
        self.device = torch.zeros(num_words, dtype=torch.int64, device=device)
        self._host = [
            torch.zeros(num_words, dtype=torch.int64, pin_memory=on_gpu)
            for _ in range(_NUM_BUFFERS)
        ]
        self._arrays: list[Ints] = [host.numpy() for host in self._host]
        self._copied: list[Any] = [torch.cuda.Event() for _ in self._host] if on_gpu else []
        self._turn = 0

    def room(self) -> Ints:
        """Where to write the next vector: good until `send`. Waits for the copy before the last."""
        if self._copied:
            self.wait(self._copied[self._turn])
        return self._arrays[self._turn]

    def send(self, count: int) -> None:
        """Copy the first `count` words to the device, in the order of the current stream."""
        self.device[:count].copy_(self._host[self._turn][:count], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        self._turn = (self._turn + 1) % _NUM_BUFFERS

    def wait(self, event: Any) -> None:
        """Wait for an event. With a limit, which ranks have, raise EngineDead when it is over: a kernel that
        waits for a rank that is gone never ends, and CUDA has no wait that gives up."""
        if self._limit_s is None:
            event.synchronize()
            return
        began_s = time.monotonic()
        while not event.query():
            waited_s = time.monotonic() - began_s
            if waited_s > self._limit_s:
                raise EngineDead(
                    f"the GPU has not come to the end of a step for {self._limit_s:g} s: "
                    "another rank does not take part in it"
                )
            if waited_s > _SPIN_S:
                time.sleep(_NAP_S)
