"""The engine that is measured: one at a time, opened for a point, closed before the next."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping

import torch

from engine.cuda_options import CudaOptions
from engine.protocol import Engine
from engine_build.spec import EngineSpec

Tensors = Mapping[str, torch.Tensor]
Construct = Callable[[EngineSpec, int, str, CudaOptions, Tensors | None], Engine]


class Subject:
    """Opens engines on `device` ("cuda", or "cpu" under Triton's interpreter).

    `construct` makes one of a spec, a number of kv_slots, the device, options and weights (None: random
    ones). `options` are those of every engine opened next.
    """

    def __init__(self, device: str, memory_bytes: int, construct: Construct | None = None) -> None:
        self.device = device
        self.memory_bytes = memory_bytes
        self.options = CudaOptions()
        self._construct = construct or cuda_engine
        self._engine: Engine | None = None
        self._opened: tuple[EngineSpec, int, CudaOptions] | None = None

    def open(self, spec: EngineSpec, slots: int, *, capture: bool = True) -> Engine:
        """An engine of random weights that decodes all `slots` at once; the one that is open already if it
        is the same."""
        options = self._options_for(slots, capture)
        if self._engine is None or self._opened != (spec, slots, options):
            self.close()
            self._engine = self._construct(spec, slots, self.device, options, None)
            self._opened = spec, slots, options
        return self._engine

    def open_with(self, spec: EngineSpec, slots: int, tensors: Tensors) -> Engine:
        """An engine of these weights, float tensors under Hugging Face names."""
        self.close()
        options = self._options_for(slots, capture=True)
        self._engine = self._construct(spec, slots, self.device, options, tensors)
        return self._engine

    def close(self) -> None:
        """Free the engine and the memory that torch keeps for it."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._opened = None, None
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _options_for(self, slots: int, capture: bool) -> CudaOptions:
        return dataclasses.replace(self.options, max_running=slots, capture=capture)


def cuda_engine(
    spec: EngineSpec, slots: int, device: str, options: CudaOptions, tensors: Tensors | None
) -> Engine:
    """The CUDA engine. Its kv_slots are filled with random keys: zeros draw less power and run faster."""
    from engine.cuda_engine import CudaEngine

    budget = slots * spec.slot_bytes
    if tensors is not None:
        return CudaEngine.from_tensors(
            spec, tensors, memory_budget_bytes=budget, device=device, options=options
        )
    engine = CudaEngine.with_random_weights(
        spec, memory_budget_bytes=budget, device=device, options=options
    )
    engine.slots.normal_()
    return engine
