"""A TensorRT plan on a GPU: memory by torch, passes by TensorRT. All that this engine does on one is here.

Weights, cache rows, inputs and logits are torch tensors; the plan gets their addresses. All work goes to one
stream, in order, and the host waits in `draw` and `logits` alone. Decode passes of each bucket have a context
of their own, so that what a CUDA graph recorded stays true; prefill shares one context, whose shape changes.
All contexts share one block of scratch memory, as no two run at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.cuda_sampling import REQUEST_WORDS, DeviceSampler
from engine.cuda_upload import Upload
from engine.nccl import NcclGroup
from engine.protocol import EngineDead, Logits, SampleRequest
from engine.sampling import Sampled
from engine.tensorrt_engine import RuntimeOptions
from engine.tensorrt_inputs import PassInputs
from engine.tensorrt_memory import rows_of_budget, rows_that_fit
from engine_build.engine_names import LOGIT_ROWS, LOGITS, WEIGHTS_FILE
from engine_build.files import sinkserve_home
from engine_build.plan import plan_file
from engine_build.plan_inputs import (
    ANGLES,
    PRESENT,
    QUERY_AGES,
    ROW_FIELDS,
    TOKEN_IDS,
    WRITE_PLACES,
    cache_names,
    is_input,
)
from engine_build.plan_profiles import (
    Size,
    decode_buckets,
    input_shapes,
    plan_profiles,
    profile_for,
)
from engine_build.shard import rank_folder
from engine_build.spec import EngineSpec, SpecError
from engine_build.tensorrt_library import OpenPlan
from engine_build.weights import read_weight_file

_KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GivenWeights = Callable[[torch.device], Mapping[str, torch.Tensor]]
_PREFILLED_TOGETHER = 8
"""Prefilled rows whose logits may be held beside those of a decode pass."""


class TensorRtRuntime:
    """See `PlanRuntime`.

    `weights` gives the plan's weights, tensors on this device by name; None: the engine's file. Raises
    SpecError without a GPU, for a budget below one kv_slot, and for a plan that cannot run here.
    """

    def __init__(
        self,
        engine_dir: Path,
        spec: EngineSpec,
        options: RuntimeOptions,
        weights: GivenWeights | None = None,
    ) -> None:
        self._spec = spec
        self._device = _own_gpu(spec, options)
        self._group = None if options.collective is None else NcclGroup(options.collective)
        self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            plan = plan_file(spec, engine_dir, options.rank).read_bytes()
            name = f"{hashlib.sha256(plan).hexdigest()[:16]}.kernels"
            self._plan = OpenPlan(spec.target, plan, sinkserve_home() / "tensorrt" / name)
            if weights is None:
                shard = rank_folder(engine_dir, options.rank, spec.tp_size)
                self._weights = self._from_file(shard / WEIGHTS_FILE)
            else:
                self._weights = dict(weights(self._device))
            scratch_bytes = max(self._plan.engine.device_memory_size_v2, 1)
            self._scratch = self._empty((scratch_bytes,), torch.uint8)
            vocab = spec.model.vocab_size
            most = decode_buckets(options.max_running)[-1]
            self._decode_logits = self._empty((most, vocab // spec.tp_size), torch.float32)
            self._prefill_logits = self._empty((1, vocab // spec.tp_size), torch.float32)
            self._max_held = most + _PREFILLED_TOGETHER
            limit_s = None if options.collective is None else options.step_s
            upload = Upload(self._max_held * REQUEST_WORDS, self._device, limit_s)
            self._sampler = DeviceSampler(self._max_held, vocab, self._device, upload=upload)
            self._num_rows = self._rows_that_fit(options.memory_budget_bytes)
            shape = input_shapes(spec, Size(self._num_rows, 1, 1))[cache_names(0)[0]]
            layers = spec.model.num_layers
            dtype = _KV_DTYPES[spec.kv_dtype]
            try:
                self._cache = torch.zeros((2 * layers, *shape), dtype=dtype, device=self._device)
            except torch.OutOfMemoryError as error:
                raise SpecError(
                    "memory_budget_bytes",
                    f"the GPU's memory does not hold {self._num_rows} kv_slots: {error}",
                    "Free the GPU, lower the budget, or use more ranks",
                ) from error
        self._passes: dict[tuple[int, int, bool], _Pass] = {}
        self._held: list[torch.Tensor] = []
        self._last = self._decode_logits[:0]
        self._stream.synchronize()

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def max_held(self) -> int:
        return self._max_held

    @property
    def cache(self) -> torch.Tensor:
        """Keys and values, [2 * layers, num_rows, kv_heads, places, head_dim]."""
        return self._cache

    def run(self, inputs: PassInputs, first_row: int, hold: range) -> None:
        """See `PlanRuntime.run`. Raises EngineDead in TensorRT's own words."""
        try:
            self._run(inputs, first_row, hold)
        except RuntimeError as error:
            raise EngineDead(f"{self._spec.target}: {error} ({self._plan.said()})") from error

    def _run(self, inputs: PassInputs, first_row: int, hold: range) -> None:
        decode = inputs.chunk == 1 and first_row == 0
        with torch.cuda.stream(self._stream):
            if decode:
                # What an earlier decode pass held is about to be overwritten.
                self._held = [held.clone() for held in self._held]
                logits = self._decode_logits[: inputs.batch]
            else:
                logits = self._room_for(len(inputs.logit_rows))
            key = (profile_for(inputs.batch, inputs.chunk), inputs.batch, decode)
            if key not in self._passes:
                self._passes[key] = self._pass(inputs, decode)
            self._passes[key].run(inputs, self._cache_addresses(first_row), logits)
            logits = self._whole(logits)
            self._last = logits
            if len(hold):
                held = logits[hold.start : hold.stop]
                self._held.append(held if decode else held.clone())

    def logits(self) -> Logits:
        """See `PlanRuntime.logits`."""
        with torch.cuda.stream(self._stream):
            copied: Logits = self._last.to("cpu", copy=True).numpy()
        return copied

    def draw(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """See `PlanRuntime.draw`."""
        with torch.cuda.stream(self._stream):
            self._sampler.prepare(requests)
            logits = self._held[0] if len(self._held) == 1 else torch.cat(self._held)
            self._sampler.run(logits)
            self._held = []
            return self._sampler.read(logits)

    def swap(self, row: int, other: int) -> None:
        """See `PlanRuntime.swap`."""
        with torch.cuda.stream(self._stream):
            kept = self._cache[:, row].clone()
            self._cache[:, row].copy_(self._cache[:, other])
            self._cache[:, other].copy_(kept)

    def clear(self, row: int) -> None:
        """See `PlanRuntime.clear`."""
        with torch.cuda.stream(self._stream):
            self._cache[:, row].zero_()

    def close(self) -> None:
        """See `PlanRuntime.close`."""
        self._passes = {}  # first: NCCL waits for the graphs that hold its collectives
        if self._group is not None:
            self._group.close()  # a rank that waits for a dead one never gets to the end
        self._stream.synchronize()
        self._plan.close()
        self._held = []
        self._weights = {}
        for name in ("_cache", "_scratch", "_decode_logits", "_prefill_logits", "_last"):
            setattr(self, name, self._empty((0,), torch.uint8))
        torch.cuda.empty_cache()

    def _pass(self, inputs: PassInputs, decode: bool) -> _Pass:
        """A context for such passes: one for each decode bucket, one for prefill, one for single tokens
        that a ring's end cut off."""
        profile = profile_for(inputs.batch, inputs.chunk)
        most = plan_profiles(self._spec)[profile].most
        size = Size(inputs.batch, most.chunk, max(inputs.batch, most.chunk))
        context = self._plan.context(profile, self._stream.cuda_stream)
        if self._group is not None and not context.set_communicator(self._group.capsule()):
            raise RuntimeError("the plan takes no communicator")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        for name, tensor in self._weights.items():
            _check(context.set_tensor_address(name, tensor.data_ptr()), name)
        for layer in range(self._spec.model.num_layers):
            shape = input_shapes(self._spec, size)
            for name in cache_names(layer):
                _check(context.set_input_shape(name, shape[name]), name)
        buffers = {
            name: self._empty(input_shapes(self._spec, size)[name], dtype)
            for name, dtype in _INPUT_DTYPES.items()
        }
        for name, buffer in buffers.items():
            _check(context.set_tensor_address(name, buffer.data_ptr()), name)
        capture = decode and not self._plan.captures
        return _Pass(context, buffers, self._stream, capture)

    def _cache_addresses(self, first_row: int) -> dict[str, int]:
        """Where each layer's keys and values of the rows from `first_row` on begin."""
        base = self._cache.data_ptr()
        row_bytes = self._cache.stride(1) * self._cache.element_size()
        layer_bytes = self._cache.stride(0) * self._cache.element_size()
        names = [name for n in range(self._spec.model.num_layers) for name in cache_names(n)]
        return {
            name: base + number * layer_bytes + first_row * row_bytes
            for number, name in enumerate(names)
        }

    def _room_for(self, count: int) -> torch.Tensor:
        """Rows for the logits of a prefill pass; more than one only when somebody wants to see all."""
        if count > len(self._prefill_logits):
            columns = self._spec.model.vocab_size // self._spec.tp_size
            self._prefill_logits = self._empty((count, columns), torch.float32)
        return self._prefill_logits[:count]

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] on every rank, of each rank's [rows, vocab / tp_size]."""
        if self._group is None:
            return part
        parts = self._empty((self._group.size, *part.shape), torch.float32)
        self._group.all_gather(
            part.data_ptr(), parts.data_ptr(), part.numel(), self._stream.cuda_stream
        )
        return parts.transpose(0, 1).flatten(1)

    def _rows_that_fit(self, budget: int | None) -> int:
        if budget is not None:
            return rows_of_budget(self._spec, budget)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return rows_that_fit(self._spec, self._max_held, free)

    def _from_file(self, file: Path) -> dict[str, torch.Tensor]:
        stored = read_weight_file(file)
        names = [name for name in stored if is_input(name, self._spec)]
        return {name: self._uploaded(stored[name]) for name in names}

    def _uploaded(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """The bytes of a mapped weight on the GPU: the plan knows their type."""
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        return torch.from_numpy(raw.copy()).to(self._device)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)


_INPUT_DTYPES = {
    TOKEN_IDS: torch.int64,
    ANGLES: torch.float32,
    WRITE_PLACES: torch.int64,
    QUERY_AGES: torch.int32,
    ROW_FIELDS: torch.int32,
    LOGIT_ROWS: torch.int64,
}


class _Pass:
    """A context with its input buffers, at fixed addresses.

    With `capture`, its first run is plain (TensorRT settles what it put off), the second is recorded as a
    CUDA graph, and later ones replay it: all must then have one shape, one cache address, one output.
    """

    def __init__(
        self,
        context: Any,
        buffers: dict[str, torch.Tensor],
        stream: torch.cuda.Stream,
        capture: bool,
    ) -> None:
        self._context = context
        self._buffers = buffers
        self._stream = stream
        self._capture = capture
        self._bound: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._num_runs = 0
        self._graph: Any = None

    def run(self, inputs: PassInputs, caches: dict[str, int], logits: torch.Tensor) -> None:
        """Copy the inputs, then run; nothing here waits for the GPU."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            TOKEN_IDS: inputs.token_ids,
            ANGLES: inputs.angles,
            WRITE_PLACES: inputs.write_places,
            QUERY_AGES: inputs.query_ages,
            ROW_FIELDS: inputs.row_fields,
            LOGIT_ROWS: inputs.logit_rows,
        }
        for name, array in arrays.items():
            # Pinned memory goes back to torch's pool when the copy is done, not before.
            pinned = torch.from_numpy(np.ascontiguousarray(array)).reshape(-1).pin_memory()
            self._buffers[name].view(-1)[: len(pinned)].copy_(pinned, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
            return
        for name, array in arrays.items():
            if self._shapes.get(name) != array.shape:
                _check(self._context.set_input_shape(name, array.shape), name)
                self._shapes[name] = array.shape
        addresses = {LOGITS: logits.data_ptr(), **caches}
        addresses.update({name + PRESENT: address for name, address in caches.items()})
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                _check(self._context.set_tensor_address(name, address), name)
                self._bound[name] = address
        if self._capture and self._num_runs == 1:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._enqueue()
            self._graph.replay()
        else:
            self._enqueue()
        self._num_runs += 1

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("the plan could not be enqueued")


def _own_gpu(spec: EngineSpec, options: RuntimeOptions) -> torch.device:
    """Rank n computes on GPU n. Raises SpecError where there is none."""
    if not torch.cuda.is_available():
        raise SpecError(
            "target", f"{spec.target} needs a GPU that torch can use", "Use --target cpu here"
        )
    if options.num_ranks > torch.cuda.device_count():
        raise SpecError(
            "tp_size",
            f"{options.num_ranks} ranks need as many GPUs, {torch.cuda.device_count()} are visible",
            "Give the replica more GPUs, or build with a smaller --tp",
        )
    device = torch.device("cuda", options.rank)
    torch.cuda.set_device(device)
    return device


def _check(done: bool, name: str) -> None:
    if not done:
        raise RuntimeError(f"the plan takes no such input or output: {name}")
