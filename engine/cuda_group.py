"""The ranks of a tensor-parallel group: two all-reduces a layer and one gather of the logits.

NCCL on GPUs, gloo on CPU. A group of one needs neither, and torch.distributed is not even loaded.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

from engine.cuda_options import TensorParallel

_JOIN_TIMEOUT = timedelta(seconds=60)


class RankGroup:
    """This process's membership. Joining waits for all ranks, and raises RuntimeError if they stay away."""

    def __init__(self, parallel: TensorParallel | None, device: torch.device) -> None:
        self.rank = parallel.rank if parallel else 0
        self.size = parallel.size if parallel else 1
        self._device = device
        if parallel is not None and parallel.size > 1:
            import torch.distributed

            torch.distributed.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                init_method=parallel.address,
                rank=parallel.rank,
                world_size=parallel.size,
                timeout=_JOIN_TIMEOUT,
            )

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
        """Leave the group."""
        if self.size > 1:
            torch.distributed.destroy_process_group()
