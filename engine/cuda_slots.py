"""Host slots of an engine on a GPU: pinned memory, copied to and from while steps run.

    save     kv_slot -> staging, in the step's own order (device memory: microseconds) -> host slot, beside it
    restore  host slot -> kv_slot beside the steps so far; the next step waits for it

So a step never waits for a save, and a restore only for the save that filled its host slot. Lanes are CUDA
streams: what is put on one happens in order, marks (events) hold one lane back for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.cuda_memory import NUM_STAGING
from engine.protocol import SlotCopy
from engine_build.spec import SpecError

STEPS, SAVES, RESTORES = range(3)
"""Lanes: the caller's current stream, and two of our own."""


class Lanes(Protocol):
    """Where copies are put. `mark` is passed once all that is on the lane now has happened."""

    def copy(self, lane: int, target: torch.Tensor, source: torch.Tensor) -> None: ...
    def mark(self, lane: int) -> Any: ...
    def wait(self, lane: int, mark: Any) -> None: ...


class CudaLanes:
    """Streams of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = {lane: torch.cuda.Stream(device) for lane in (SAVES, RESTORES)}

    def copy(self, lane: int, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream(lane)):
            target.copy_(source, non_blocking=True)

    def mark(self, lane: int) -> Any:
        return self._stream(lane).record_event()

    def wait(self, lane: int, mark: Any) -> None:
        self._stream(lane).wait_event(mark)

    def _stream(self, lane: int) -> Any:
        return self._own[lane] if lane in self._own else torch.cuda.current_stream(self._device)


class OneLane:
    """Everything at once and in order: for tensors in the host's memory."""

    def copy(self, lane: int, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def mark(self, lane: int) -> Any:
        return None

    def wait(self, lane: int, mark: Any) -> None:
        return None


class PinnedSlots:
    """`num_slots` host slots for `slots` [kv_slots, ...], each kv_slot contiguous.

    Holds `NUM_STAGING` kv_slots of device memory besides. Raises SpecError if the memory can't be pinned.
    """

    def __init__(self, slots: torch.Tensor, num_slots: int, lanes: Lanes | None = None) -> None:
        on_gpu = slots.device.type == "cuda"
        self._slots = slots
        self._lanes: Lanes = lanes or (CudaLanes(slots.device) if on_gpu else OneLane())
        # Not `pin_memory=True`: PyTorch rounds that up to a power of two.
        self._host = torch.empty((num_slots, *slots.shape[1:]), dtype=slots.dtype)
        self._pinned = on_gpu and num_slots > 0
        if self._pinned:
            _pin(self._host)
        num_staging = NUM_STAGING if num_slots else 0
        self._staging = slots.new_empty((num_staging, *slots.shape[1:]))
        self._staging_read: list[Any] = [None] * num_staging
        self._written: list[Any] = [None] * num_slots
        self._num_saves = 0

    @property
    def num_slots(self) -> int:
        return len(self._host)

    def run(self, copies: Sequence[SlotCopy]) -> None:
        """In order, after what is on the current stream and before what will be. Does not wait."""
        for copy in copies:
            if copy.direction == "save":
                self._save(copy.kv_slot, copy.host_slot)
            else:
                self._restore(copy.kv_slot, copy.host_slot)

    def close(self) -> None:
        """Unpin the memory; idempotent. No copy may be under way."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())
        self._pinned = False

    def _save(self, kv_slot: int, host_slot: int) -> None:
        lanes, stage = self._lanes, self._num_saves % NUM_STAGING
        self._num_saves += 1
        self._wait(STEPS, self._staging_read[stage])
        lanes.copy(STEPS, self._staging[stage], self._slots[kv_slot])
        # Restores from the host slot have been waited for by the steps.
        lanes.wait(SAVES, lanes.mark(STEPS))
        lanes.copy(SAVES, self._host[host_slot], self._staging[stage])
        self._staging_read[stage] = self._written[host_slot] = lanes.mark(SAVES)

    def _restore(self, kv_slot: int, host_slot: int) -> None:
        lanes = self._lanes
        # The slot's last reader: an earlier step, or the save of who had it.
        lanes.wait(RESTORES, lanes.mark(STEPS))
        self._wait(RESTORES, self._written[host_slot])
        lanes.copy(RESTORES, self._slots[kv_slot], self._host[host_slot])
        lanes.wait(STEPS, lanes.mark(RESTORES))

    def _wait(self, lane: int, mark: Any) -> None:
        if mark is not None:
            self._lanes.wait(lane, mark)


def _pin(memory: torch.Tensor) -> None:
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status != 0:
        raise SpecError(
            "host_memory_bytes",
            f"{memory.nbytes / 2**20:.0f} MiB of host memory cannot be pinned (CUDA error {status})",
            "Lower it, or raise the limit on locked memory (ulimit -l)",
        )
