"""Device memory and launches of a CUDA engine: weights, kv_slots, graphs, sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.cuda_decoder import MOST_SPLIT, CudaDecoder, DeviceStep
from engine.cuda_graphs import DecodeGraphs
from engine.cuda_group import RankGroup
from engine.cuda_kernels.attention import Tiling, decode_tiling, interpreter_tiling, prefill_tiling
from engine.cuda_kernels.common import interpreted
from engine.cuda_linear import LinearLayers
from engine.cuda_options import CudaOptions
from engine.cuda_sampling import DeviceSampler
from engine.cuda_slots import NUM_STAGING, PinnedSlots
from engine.cuda_step import Layout, PackedStep, pack_decode, pack_mixed
from engine.cuda_tuning import tune
from engine.cuda_weights import DTYPES, Source, load_weights, part_of
from engine.protocol import Logits, Row, SampleRequest
from engine.sampling import Sampled
from engine_build.shard import shard_shape
from engine_build.spec import KV_TILE, EngineSpec, SpecError

_MIB = 2**20
_LIBRARIES_BYTES = 1024 * _MIB
"""Workspaces of cuBLAS, code of the kernels, bookkeeping of the graphs, NCCL's buffers."""


def reserve_bytes(spec: EngineSpec, options: CudaOptions) -> int:
    """What a rank keeps free of kv_slots: the activations of its largest step, twice (a graph's and a mixed
    step's), logits, and a GiB for libraries. `spec.model` is the rank's own shape."""
    model = spec.model
    heads = model.num_heads * model.head_dim
    kv = model.num_kv_heads * model.head_dim
    widths = 3 * model.hidden_size + 4 * heads + 2 * kv + 3 * model.intermediate_size
    per_token = widths * spec.kv_bytes + 8 * model.rope.rotary_dim
    logits = 3 * options.max_running * model.vocab_size * 4
    return 2 * options.max_step_tokens * per_token + logits + _LIBRARIES_BYTES


class CudaRuntime:
    """Runs rows; knows nothing of plans. `source` gives the weights."""

    def __init__(
        self,
        spec: EngineSpec,
        source: Source,
        memory_budget_bytes: int | None,
        device: torch.device,
        options: CudaOptions,
    ) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._group = RankGroup(options.tensor_parallel, device)
        part = part_of(options)
        model = shard_shape(spec.model, part.size)
        local = dataclasses.replace(spec, model=model)
        self._device, self._spec, self._options = device, local, options
        weights = load_weights(spec, model, part, source)
        fitting = _slots_that_fit(local, memory_budget_bytes, device, options)
        self.max_resident = self._group.least(fitting)
        self.slots = _empty_slots(local, self.max_resident, device)
        self.host = PinnedSlots(self.slots, options.host_memory_bytes // local.slot_bytes)
        self._processors = 1
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        linear = LinearLayers(options.choices, self._processors, options.overlap)
        if options.tune and device.type == "cuda":
            tune(linear, weights, options.buckets())
        self.choices: Mapping[str, str] = {key: str(one) for key, one in linear.chosen.items()}
        self._decoder = CudaDecoder(
            model, weights, self.slots, linear, self._group, options.overlap
        )
        size = (options.max_running, spec.model.vocab_size)
        self._logits = torch.empty(size, dtype=torch.float32, device=device)
        self._sampler = DeviceSampler(options.max_running, spec.model.vocab_size, device)
        self._graphs: DecodeGraphs | None = None
        if device.type == "cuda":
            self._warm_up()
            if options.capture:
                self._graphs = DecodeGraphs(
                    self._decoder, options.buckets(), self._decode_tiling, self._logits
                )

    @property
    def answers(self) -> bool:
        """Whether this rank's tokens and logits are looked at: the others' would be the same."""
        return self._group.rank == 0

    def compute(self, rows: Sequence[Row]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Run rows: logits float32 [n, vocab], good until the next call; each row's (first, end) there."""
        if all(len(row.tokens) == 1 for row in rows):
            bucket = next(size for size in self._options.buckets() if size >= len(rows))
            packed = pack_decode(rows, bucket)
            if self._graphs is not None:
                return self._graphs.run(packed), packed.logits_of
            return self._launch(packed, self._decode_tiling(bucket)), packed.logits_of
        tiling = self._mixed_tiling(1)
        packed = pack_mixed(rows, tiling.queries(self._spec.model.heads_per_kv_head))
        return self._launch(packed, self._mixed_tiling(packed.layout.tiles)), packed.logits_of

    def sample(
        self, logits: Tensor, rows: Sequence[int], requests: Sequence[SampleRequest]
    ) -> list[Sampled]:
        """A token for each request from its row of `logits`; waits for the device."""
        wanted = logits[: len(rows)]
        if list(rows) != list(range(len(rows))):
            wanted = logits[torch.tensor(rows, device=self._device)]
        self._sampler.prepare(requests)
        self._sampler.run(wanted)
        return self._sampler.read(wanted)

    def to_host(self, logits: Tensor) -> Logits:
        """A copy of the caller's own."""
        return np.array(logits.cpu().numpy(), copy=True)

    def close(self) -> None:
        """Give the memory back and leave the group."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.host.close()
        self._group.close()

    def _launch(self, packed: PackedStep, tiling: Tiling) -> Tensor:
        words = torch.from_numpy(packed.words)
        if self._device.type == "cuda":
            words = words.pin_memory().to(self._device, non_blocking=True)
        step = DeviceStep.of(words, packed.layout, tiling, packed.decode)
        count = packed.layout.logits
        logits = self._logits[:count]
        if count > len(self._logits):
            logits = self._logits.new_empty((count, self._logits.shape[1]))
        self._decoder.run(step, logits)
        return logits

    def _decode_tiling(self, bucket: int) -> Tiling:
        model = self._spec.model
        if interpreted(self._device):
            return interpreter_tiling(model.heads_per_kv_head)
        return decode_tiling(
            self._spec.capacity,
            bucket * model.num_kv_heads,
            model.heads_per_kv_head,
            self._processors,
        )

    def _mixed_tiling(self, tiles: int) -> Tiling:
        model = self._spec.model
        if interpreted(self._device):
            return interpreter_tiling(model.heads_per_kv_head)
        few = tiles * model.num_kv_heads * 2 <= min(self._processors, MOST_SPLIT)
        return prefill_tiling(model.heads_per_kv_head, model.head_dim, split=few)

    def _warm_up(self) -> None:
        """Compile what mixed steps launch, so that no turn waits for it. Padding rows write nothing."""
        queries = self._mixed_tiling(1).queries(self._spec.model.heads_per_kv_head)
        tokens = 1
        while tokens < self._options.max_step_tokens:
            tokens = min(2 * tokens, self._options.max_step_tokens)
            tiles = -(-tokens // queries)
            layout = Layout(tokens, 1, tiles, 1)
            words = np.zeros(layout.num_words, dtype=np.int64)
            self._launch(PackedStep(layout, words, (), decode=False), self._mixed_tiling(tiles))
        torch.cuda.synchronize(self._device)


def _slots_that_fit(
    spec: EngineSpec, budget_bytes: int | None, device: torch.device, options: CudaOptions
) -> int:
    if budget_bytes is None:
        if device.type == "cpu":
            raise SpecError("memory_budget_bytes", "a CPU has no memory of its own", "Say how much")
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        staging = NUM_STAGING * spec.slot_bytes if options.host_memory_bytes else 0
        budget_bytes = max(0, free - reserve_bytes(spec, options) - staging)
    count = budget_bytes // spec.slot_bytes
    if count < 1:
        raise SpecError(
            "memory_budget_bytes",
            f"{budget_bytes / _MIB:.1f} MiB do not hold one kv_slot ({spec.slot_bytes / _MIB:.1f} MiB)",
            "Free the GPU, raise the budget, lower the capacity, or use more ranks",
        )
    return count


def _empty_slots(spec: EngineSpec, count: int, device: torch.device) -> Tensor:
    """Memory of exactly `spec.slot_bytes` each. Zeros, so that no page is touched first in a turn."""
    model = spec.model
    places, dim = (-(-size // KV_TILE) * KV_TILE for size in (spec.slot_tokens, model.head_dim))
    size = (count, model.num_layers, 2, model.num_kv_heads, places, dim)
    return torch.zeros(size, dtype=DTYPES[spec.kv_dtype], device=device)
