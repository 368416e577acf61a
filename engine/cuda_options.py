"""How a CUDA engine is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine_build.spec import SpecError, Target

INTERPRETER = "Triton's interpreter"
"""What stands for the name of a GPU where there is none."""


def interpreted(target: Target) -> bool:
    """Whether this process runs the kernels of engines for `target` in Triton's interpreter, on the CPU.

    Triton's own switch decides, TRITON_INTERPRET=1 in the environment: a slow way to try a CUDA engine
    without a GPU. What was verified so does not count on a GPU, nor the other way round.
    """
    return target == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This process's part in a group of `size` ranks. `address` is torch's: `tcp://host:port`.

    `start_s`: the longest that ranks wait for each other while weights are loaded and kernels compiled;
    `step_s`: the longest wait inside a step.
    """

    rank: int
    size: int
    address: str
    start_s: float = 600.0
    step_s: float = 120.0


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """`max_running` rows decode in one captured graph at most; larger steps run in several parts, as do
    steps of more than `max_step_tokens` tokens. `host_memory_bytes` of pinned memory are for conversations
    that lost their kv_slot.

    `capture` uses CUDA graphs for decode steps. `overlap` starts each kernel while the one before drains
    (programmatic dependent launch; Hopper and later). `tune` measures at start which kernel serves each
    linear layer best, or `choices` brings what an earlier start measured (`CudaEngine.choices`).
    """

    max_running: int = 64
    host_memory_bytes: int = 0
    max_step_tokens: int = 8192
    capture: bool = True
    overlap: bool = False
    tune: bool = False
    choices: Mapping[str, str] = field(default_factory=dict)
    tensor_parallel: TensorParallel | None = None

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise SpecError("max_running", f"{self.max_running} is not positive", "Use 1 to 512")
        if self.max_step_tokens < 1:
            raise SpecError(
                "max_step_tokens", f"{self.max_step_tokens} is not positive", "Use 2048 to 16384"
            )

    def buckets(self) -> list[int]:
        """Numbers of rows that decode steps are padded to: powers of two, then `max_running`."""
        sizes = [1]
        while sizes[-1] < self.max_running:
            sizes.append(min(2 * sizes[-1], self.max_running))
        return sizes
