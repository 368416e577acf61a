"""The decoder on a CUDA GPU: our own Triton kernels, one CUDA graph for each bucket of decode rows.

    step = check plan -> pack it into a vector -> one copy -> replay a graph, or launch -> wait for tokens

On device "cpu" the same kernels run in Triton's interpreter: slow, exact, and what the tests use.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.cuda_memory import most_logits
from engine.cuda_options import CudaOptions
from engine.cuda_step import num_logits
from engine.plan_check import check_plan, check_rings
from engine.protocol import EngineDead, Row, RowResult, StepPlan, StepResult
from engine_build.engine_names import WEIGHTS_FILE
from engine_build.manifest import SPEC
from engine_build.shard import rank_folder
from engine_build.spec import EngineSpec, SpecError

if TYPE_CHECKING:
    from engine.cuda_runtime import CudaRuntime
    from engine.cuda_weights import Source

DEFAULT_OPTIONS = CudaOptions()


class CudaEngine:
    """See `engine.protocol.Engine`.

    `memory_budget_bytes` is for kv_slots alone; None takes what is free on the GPU after the weights, less
    a reserve for a step's activations and the graphs (cuda_memory.py). `device` is "cuda",
    "cuda:N", or "cpu" for Triton's interpreter, which must be chosen before triton is imported (this
    constructor does it when it can). `capacity` replaces the one in spec.json. With
    `options.tensor_parallel` this process holds its rank's part, and every rank runs the same plans.

    Raises SpecError naming the field and what to do: no such device, another target's engine, weights or
    not even one kv_slot that do not fit.
    """

    def __init__(
        self,
        engine_dir: Path,
        *,
        memory_budget_bytes: int | None = None,
        device: str = "cuda",
        capacity: int | None = None,
        options: CudaOptions = DEFAULT_OPTIONS,
    ) -> None:
        spec = EngineSpec.from_json((engine_dir / SPEC).read_text(encoding="utf-8"))
        spec = spec if capacity is None else dataclasses.replace(spec, capacity=capacity)
        place = _device(device, spec)
        from engine.cuda_weights import from_file

        parallel = options.tensor_parallel
        folder = rank_folder(engine_dir, parallel.rank if parallel else 0, spec.tp_size)
        source = from_file(folder / WEIGHTS_FILE, place)
        self._start(spec, source, memory_budget_bytes, place, options)

    @classmethod
    def from_tensors(
        cls,
        spec: EngineSpec,
        tensors: Mapping[str, torch.Tensor],
        *,
        memory_budget_bytes: int | None = None,
        device: str = "cuda",
        options: CudaOptions = DEFAULT_OPTIONS,
    ) -> CudaEngine:
        """An engine without files, of torch tensors under Hugging Face names; one rank only."""
        place = _device(device, spec)
        from engine.cuda_weights import from_tensors

        engine = cls.__new__(cls)
        source = from_tensors(tensors, spec, place)
        engine._start(spec, source, memory_budget_bytes, place, options)
        return engine

    @classmethod
    def with_random_weights(
        cls,
        spec: EngineSpec,
        *,
        memory_budget_bytes: int | None = None,
        device: str = "cuda",
        seed: int = 0,
        options: CudaOptions = DEFAULT_OPTIONS,
    ) -> CudaEngine:
        """An engine without files, its weights drawn on the device: for measuring speed. One rank only."""
        place = _device(device, spec)
        from engine.cuda_weights import random_weights

        engine = cls.__new__(cls)
        source = random_weights(spec, seed, place)
        engine._start(spec, source, memory_budget_bytes, place, options)
        return engine

    def _start(
        self,
        spec: EngineSpec,
        source: Source,
        memory_budget_bytes: int | None,
        device: torch.device,
        options: CudaOptions,
    ) -> None:
        from engine.cuda_runtime import CudaRuntime

        ranks = options.tensor_parallel.size if options.tensor_parallel else 1
        if ranks != spec.tp_size:
            raise SpecError(
                "tp_size",
                f"the engine is cut for {spec.tp_size} ranks, {ranks} run it",
                f"Start {spec.tp_size} ranks, or build with --tp {ranks}",
            )
        self._spec, self._options = spec, options
        try:
            self._runtime: CudaRuntime | None = CudaRuntime(
                spec, source, memory_budget_bytes, device, options
            )
        except torch.OutOfMemoryError as error:
            raise SpecError(
                "memory_budget_bytes",
                f"the GPU's memory does not hold this engine: {error}",
                "Free the GPU, lower the budget or max_running, or use more ranks",
            ) from error
        self._max_resident = self._runtime.max_resident
        self._host_slots = self._runtime.host.num_slots

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def max_resident(self) -> int:
        return self._max_resident

    @property
    def host_slots(self) -> int:
        """See `HasHostSlots`."""
        return self._host_slots

    @property
    def slots(self) -> torch.Tensor:
        """[max_resident, layers, 2, kv_heads, places, padded head_dim]: all memory of kv_slot n is
        `slots[n]`, contiguous. Work on it belongs on the current stream, between steps."""
        return self._alive().slots

    @property
    def choices(self) -> Mapping[str, str]:
        """Which kernel was measured best for which layer, for `CudaOptions.choices` of a later start."""
        return self._alive().choices

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`. Raises ValueError naming the field of a plan that it cannot run."""
        runtime = self._alive()
        check_plan(plan, self._spec, self._max_resident, self._host_slots)
        check_rings(plan)
        results: list[RowResult] = []
        try:
            runtime.enter_thread()
            runtime.host.run(plan.copies)
            for rows in _parts(plan.rows, self._spec, self._options):
                results += _run(runtime, rows)
        except EngineDead:
            raise
        except Exception as error:
            raise EngineDead(f"CUDA engine: {error}") from error
        return StepResult(tuple(results))

    def close(self) -> None:
        """See `Engine.close`."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None

    def _alive(self) -> CudaRuntime:
        if self._runtime is None:
            raise EngineDead("the engine is closed")
        return self._runtime


def _device(name: str, spec: EngineSpec) -> torch.device:
    """The device, and Triton in the mode that it needs."""
    if spec.target != "cuda":
        raise SpecError(
            "target", f"this engine was built for {spec.target!r}", "Build it with --target cuda"
        )
    device = torch.device(name)
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        if not interpret and "triton" in sys.modules:
            raise SpecError(
                "device",
                "triton was imported to compile for a GPU, it cannot also interpret on the CPU",
                "Set TRITON_INTERPRET=1 in the environment of this process",
            )
        os.environ["TRITON_INTERPRET"] = "1"
    elif interpret:
        raise SpecError(
            "device", "TRITON_INTERPRET=1 keeps kernels on the CPU", "Unset it, or use device cpu"
        )
    elif not torch.cuda.is_available():
        raise SpecError("device", "torch finds no CUDA GPU", "Run `nvidia-smi`, or use target cpu")
    elif device.index is None:
        # Current devices are set by number.
        device = torch.device("cuda", torch.cuda.current_device())
    elif device.index >= torch.cuda.device_count():
        raise SpecError(
            "device",
            f"there is no {name}: {torch.cuda.device_count()} GPUs are visible",
            "Give this process as many GPUs as the engine has ranks (CUDA_VISIBLE_DEVICES)",
        )
    return device


def _parts(
    rows: Sequence[Row], spec: EngineSpec, options: CudaOptions
) -> Iterator[tuple[Row, ...]]:
    """The plan's rows in runs of at most `max_running` rows, `max_step_tokens` tokens and the rows of
    logits that there is memory for (at least a row)."""
    most = most_logits(spec, options)
    part: list[Row] = []
    tokens = logits = 0
    for row in rows:
        full = len(part) == options.max_running or logits + num_logits(row) > most
        if part and (full or tokens + len(row.tokens) > options.max_step_tokens):
            yield tuple(part)
            part, tokens, logits = [], 0, 0
        part.append(row)
        tokens += len(row.tokens)
        logits += num_logits(row)
    if part:
        yield tuple(part)


def _run(runtime: CudaRuntime, rows: tuple[Row, ...]) -> list[RowResult]:
    computed = runtime.run(rows)
    if not runtime.answers:
        return [RowResult() for _ in rows]
    drawn = iter(computed.drawn)
    results = []
    for row, (first, end) in zip(rows, computed.logits_of, strict=True):
        logits = runtime.to_host(computed.logits[first:end]) if row.logits != "none" else None
        if row.sample is None:
            results.append(RowResult(logits=logits))
            continue
        one = next(drawn)
        results.append(RowResult(one.token_id, one.logprob, one.top, logits, one.failed))
    return results
