"""Device memory and launches of a CUDA engine: weights, kv_slots, graphs, sampler.

A step is one copy there (tokens, rows, what to draw), then a graph or launches, then one copy back of what
was drawn, which is the only thing the host waits for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.cuda_decoder import MOST_SPLIT, CudaDecoder, DeviceStep
from engine.cuda_graphs import DecodeGraphs
from engine.cuda_group import RankGroup
from engine.cuda_kernels.attention import Tiling, decode_tiling, interpreter_tiling, prefill_tiling
from engine.cuda_kernels.common import interpreted
from engine.cuda_linear import LinearLayers
from engine.cuda_memory import largest_step_tokens, most_logits, slots_of_budget, slots_that_fit
from engine.cuda_options import CudaOptions
from engine.cuda_sampling import REQUEST_WORDS, DeviceSampler
from engine.cuda_slots import PinnedSlots
from engine.cuda_step import Layout, PackedStep, most_words, pack_decode, pack_mixed
from engine.cuda_tuning import tune
from engine.cuda_upload import Upload
from engine.cuda_weights import DTYPES, Source, load_weights, part_of
from engine.protocol import Logits, Row
from engine.sampling import Sampled
from engine_build.shard import shard_shape
from engine_build.spec import KV_TILE, EngineSpec, ModelShape, SpecError


@dataclass(frozen=True, slots=True)
class Computed:
    """Logits float32 [n, vocab], good until the next run; each row's (first, end) there; what each row
    that samples drew, in their order."""

    logits: Tensor
    logits_of: tuple[tuple[int, int], ...]
    drawn: Sequence[Sampled]


class CudaRuntime:
    """Runs rows; knows nothing of plans. `source` gives the weights.

    Nothing is allocated after the start but the activations of steps that no graph holds, and the largest of
    those was run here once. Raises SpecError for memory that holds no kv_slot, torch.OutOfMemoryError for
    what the estimates left out.
    """

    def __init__(
        self,
        spec: EngineSpec,
        source: Source,
        memory_budget_bytes: int | None,
        device: torch.device,
        options: CudaOptions,
    ) -> None:
        self._device, self._options = device, options
        self._thread = 0
        self.enter_thread()
        self._group = RankGroup(options.tensor_parallel, device)
        part = part_of(options)
        model = shard_shape(spec.model, part.size)
        self._spec = local = dataclasses.replace(spec, model=model)
        weights = load_weights(spec, model, part, source)
        self._processors = 1
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        linear = LinearLayers(options.choices, self._processors, options.overlap)
        if options.tune and device.type == "cuda":
            tune(linear, weights, options.buckets())
        self.choices: Mapping[str, str] = {key: str(one) for key, one in linear.chosen.items()}
        size = (options.max_running, spec.model.vocab_size)
        self._logits = torch.empty(size, dtype=torch.float32, device=device)
        self._request_words = options.max_running * REQUEST_WORDS
        self._request_words += self._request_words % 2  # what follows begins at 16 bytes
        longest = most_words(
            largest_step_tokens(spec, options), options.max_running, most_logits(spec, options)
        )
        self._upload = Upload(self._request_words + longest, device, self._group.limit_s)
        self._sampler: DeviceSampler | None = None
        if self.answers:
            self._sampler = DeviceSampler(*size, device, upload=self._upload)
        fitting = self._slots_that_fit(memory_budget_bytes)
        self.max_resident = self._group.least(fitting)
        self.slots = _empty_slots(local, self.max_resident, device)
        self.host = PinnedSlots(self.slots, options.host_memory_bytes // local.slot_bytes)
        self._decoder = CudaDecoder(
            model, weights, self.slots, linear, self._group, options.overlap
        )
        self._tilings = {bucket: self._decode_tiling(bucket) for bucket in options.buckets()}
        self._graphs: DecodeGraphs | None = None
        if device.type == "cuda":
            if options.capture:
                self._graphs = self._capture()
                torch.cuda.empty_cache()
            self._warm_up()

    @property
    def answers(self) -> bool:
        """Whether this rank's tokens and logits are looked at: the others' would be the same."""
        return self._group.rank == 0

    def enter_thread(self) -> None:
        """Make the calling thread's current device this one: CUDA keeps one for each thread, at first GPU 0.
        The thread that runs steps is seldom the one that started the engine."""
        if self._device.type == "cuda" and self._thread != threading.get_ident():
            torch.cuda.set_device(self._device)
            self._thread = threading.get_ident()

    def run(self, rows: Sequence[Row]) -> Computed:
        """Run rows, wait for the tokens that they draw."""
        if all(len(row.tokens) == 1 for row in rows):
            bucket = next(size for size in self._tilings if size >= len(rows))
            packed, tiling = pack_decode(rows, bucket), self._tilings[bucket]
        else:
            tiling = self._mixed_tiling([len(row.tokens) for row in rows])
            packed = pack_mixed(rows, tiling.queries(self._spec.model.heads_per_kv_head))
        requests = [row.sample for row in rows if row.sample is not None]
        draws = self._sampler is not None and bool(requests)
        room = self._upload.room()
        if self._sampler is not None:
            self._sampler.place(requests, packed.draw_at, room)
        self._send(packed, room)
        if packed.decode and self._graphs is not None:
            logits = self._graphs.run(packed.layout.rows)
        else:
            logits = self._launch(packed, tiling)
            if self._sampler is not None and draws:
                self._sampler.run(logits[: packed.draw_at[-1] + 1])
        drawn = self._sampler.read(logits) if self._sampler is not None and draws else ()
        return Computed(logits, packed.logits_of, drawn)

    def to_host(self, logits: Tensor) -> Logits:
        """A copy of the caller's own."""
        return np.array(logits.cpu().numpy(), copy=True)

    def close(self) -> None:
        """Leave the group and give the memory back. Does not wait for other ranks."""
        self._graphs = None  # first: NCCL waits for the graphs that hold its collectives
        self._group.close()
        if self._device.type == "cuda":
            # A device that failed says so again to whoever waits for it.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self._device)
        self.host.close()

    def _send(self, packed: PackedStep, room: npt.NDArray[np.int64]) -> None:
        end = self._request_words + packed.layout.num_words
        room[self._request_words : end] = packed.words
        self._upload.send(end)

    def _launch(self, packed: PackedStep, tiling: Tiling) -> Tensor:
        """Run a step that was sent."""
        words = self._upload.device[self._request_words :]
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

    def _mixed_tiling(self, counts: Sequence[int]) -> Tiling:
        if interpreted(self._device):
            return interpreter_tiling(self._spec.model.heads_per_kv_head)
        return mixed_tiling(counts, self._spec.model, self._processors)

    def _capture(self) -> DecodeGraphs:
        words = self._upload.device[self._request_words :]
        return DecodeGraphs(self._decoder, self._sampler, self._tilings, words, self._logits)

    def _warm_up(self) -> None:
        """Compile what steps launch, so that no turn waits for it, and see that the largest step fits: first,
        so that smaller ones find room in its blocks. Rows are padding and write nothing."""
        if self._graphs is None:
            for bucket, tiling in self._tilings.items():
                self._run_padding(pack_decode((), bucket), tiling)
        tokens = largest_step_tokens(self._spec, self._options)
        while tokens > 1:
            tiling = self._mixed_tiling([tokens])
            tiles = -(-tokens // tiling.queries(self._spec.model.heads_per_kv_head))
            logits = min(tokens, most_logits(self._spec, self._options))
            layout = Layout(tokens, 1, tiles, logits)
            words = np.zeros(layout.num_words, dtype=np.int64)
            self._run_padding(PackedStep(layout, words, (), (), decode=False), tiling)
            tokens = -(-tokens // 2)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _run_padding(self, packed: PackedStep, tiling: Tiling) -> None:
        room = self._upload.room()
        if self._sampler is not None:
            self._sampler.place((), (), room)
        self._send(packed, room)
        logits = self._launch(packed, tiling)
        if self._sampler is not None:
            self._sampler.run(logits[: self._options.max_running])

    def _slots_that_fit(self, budget_bytes: int | None) -> int:
        """What a budget holds, or what is free now that all of fixed size is there."""
        if budget_bytes is not None:
            return slots_of_budget(self._spec, budget_bytes)
        if self._device.type == "cpu":
            raise SpecError("memory_budget_bytes", "a CPU has no memory of its own", "Say how much")
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return slots_that_fit(self._spec, self._options, free, self._group.size)


def mixed_tiling(counts: Sequence[int], model: ModelShape, num_processors: int) -> Tiling:
    """For rows of these numbers of tokens: rows are split where their tiles leave processors idle."""
    group, dim = model.heads_per_kv_head, model.head_dim
    split = prefill_tiling(group, dim, split=True)
    tiles = sum(-(-count // split.queries(group)) for count in counts)
    if 2 * tiles * model.num_kv_heads <= min(num_processors, MOST_SPLIT):
        return split
    return prefill_tiling(group, dim, split=False)


def _empty_slots(spec: EngineSpec, count: int, device: torch.device) -> Tensor:
    """Memory of exactly `spec.slot_bytes` each. Zeros, so that no page is touched first in a turn."""
    model = spec.model
    places, dim = (-(-size // KV_TILE) * KV_TILE for size in (spec.slot_tokens, model.head_dim))
    size = (count, model.num_layers, 2, model.num_kv_heads, places, dim)
    return torch.zeros(size, dtype=DTYPES[spec.kv_dtype], device=device)
