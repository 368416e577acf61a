"""The ranks of a tensor-parallel group: two all-reduces a layer and one gather of the logits.

NCCL on GPUs, gloo on CPU. A group of one needs neither, and torch.distributed is not even loaded.

Collectives are put on the caller's current stream, so a CUDA graph may hold them. Torch's watchdog sees only
those that no graph holds: what bounds the wait for a rank that is gone is `Upload.wait`.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

from engine.cuda_options import TensorParallel


class RankGroup:
    """This process's membership. Joining waits for all ranks, and raises RuntimeError if they stay away."""

    def __init__(self, parallel: TensorParallel | None, device: torch.device) -> None:
        self.rank = parallel.rank if parallel else 0
        self.size = parallel.size if parallel else 1
        self.limit_s = parallel.step_s if parallel and parallel.size > 1 else None
        self._device = device
        self._joined = False
        if parallel is not None and parallel.size > 1:
            import torch.distributed

            on_gpu = device.type == "cuda"
            torch.distributed.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=parallel.address,
                rank=parallel.rank,
                world_size=parallel.size,
                # Also how long a rank may load its weights while another one waits in `least`.
                timeout=timedelta(seconds=parallel.start_s),
                # Connects now: before memory is measured, and where a failure still says what failed.
                device_id=device if on_gpu else None,
            )
            self._joined = True

    def all_reduce(self, values: Tensor) -> None:
        """Replace `values` by the sum of all ranks'."""
        if self.size > 1:
            torch.distributed.all_reduce(values)

    def least(self, count: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.size == 1:
            return count
        number = torch.tensor([count], device=self._device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MIN)
        return int(number.item())

    def gather(self, values: Tensor) -> Tensor:
        """[n, part] of each rank as [n, size * part], in order of rank."""
        parts = values.new_empty((self.size * len(values), values.shape[1]))
        torch.distributed.all_gather_into_tensor(parts, values)
        return parts.view(self.size, *values.shape).transpose(0, 1).flatten(1)

    def close(self) -> None:
        """Leave the group; idempotent. On GPUs without waiting for the others, and collectives that wait for
        one of them end. Graphs that hold collectives must be gone: NCCL waits for that (its
        `commDestroySync`)."""
        if not self._joined:
            return
        self._joined = False
        if self._device.type == "cuda":
            # `destroy_process_group` would wait for what is under way, for ever if a rank is gone.
            torch.distributed.distributed_c10d._abort_process_group()
        else:
            torch.distributed.destroy_process_group()
