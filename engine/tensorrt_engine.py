"""The decoder as a TensorRT plan: TensorRT or TensorRT-RTX, one code.

    step = check plan -> decode rows side by side, one pass -> prefill pieces, a pass each -> draw

What decides is here and in plain arithmetic (tensorrt_inputs.py, slot_order.py); what touches a GPU is one
file behind `PlanRuntime` (tensorrt_runtime.py). The tests run this engine on the same graph in ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.collective import Collective
from engine.plan_check import check_plan
from engine.protocol import EngineDead, Logits, Row, RowResult, SampleRequest, StepPlan, StepResult
from engine.rotary import Rotary
from engine.sampling import Sampled, SamplingParams
from engine.slot_order import SlotOrder
from engine.tensorrt_inputs import (
    PassInputs,
    check_rings,
    cut_row,
    decode_inputs,
    prefill_inputs,
    starts_anew,
)
from engine.window import SinkWindow
from engine_build.manifest import SPEC
from engine_build.plan_inputs import num_places
from engine_build.plan_profiles import decode_buckets
from engine_build.spec import EngineSpec, SpecError


class PlanRuntime(Protocol):
    """A plan on a device, with its weights and a cache of `num_rows` kv_slots.

    Calls are carried out in their order. Rows of logits that were held wait to be drawn from.
    """

    @property
    def num_rows(self) -> int:
        """Cache rows: kv_slots that the device's memory holds."""
        ...

    @property
    def max_held(self) -> int:
        """The most rows of logits that may be held at once; at least that of any decode pass."""
        ...

    def run(self, inputs: PassInputs, first_row: int, hold: range) -> None:
        """Run a pass over the cache rows from `first_row` on. Its rows of logits `hold` are held."""
        ...

    def logits(self) -> Logits:
        """Logits of the last pass, float32 [len(logit_rows), vocab], the caller's own."""
        ...

    def draw(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """A token from each held row, in the order of passes; none is held after that."""
        ...

    def swap(self, row: int, other: int) -> None:
        """Exchange two cache rows."""
        ...

    def clear(self, row: int) -> None:
        """Fill a cache row with zeros."""
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """`memory_budget_bytes` is for kv_slots; None: what the device has left. `max_running` is the most
    decode rows of a step. `collective` is the group that this process is a rank of, if it is; `step_s`, the
    longest that a rank waits for the tokens of a step."""

    memory_budget_bytes: int | None = None
    max_running: int = 16
    collective: Collective | None = None
    step_s: float = 120.0

    @property
    def rank(self) -> int:
        return 0 if self.collective is None else self.collective.rank

    @property
    def num_ranks(self) -> int:
        return 1 if self.collective is None else self.collective.size


OpenRuntime = Callable[[Path, EngineSpec, RuntimeOptions], PlanRuntime]


def open_gpu_runtime(engine_dir: Path, spec: EngineSpec, options: RuntimeOptions) -> PlanRuntime:
    """The runtime on this machine's GPU; loads torch and TensorRT."""
    from engine.tensorrt_runtime import TensorRtRuntime

    return TensorRtRuntime(engine_dir, spec, options)


class TensorRtEngine:
    """See `engine.protocol.Engine`. Of tensor-parallel ranks the first alone draws and returns logits.

    `capacity`, if given, must be that of the plan: its cache has a fixed number of places. Raises
    SpecError for another one, for a budget that holds no kv_slot, for a largest step that does not run here,
    and where TensorRT, torch or a GPU is missing.
    """

    def __init__(
        self,
        engine_dir: Path,
        options: RuntimeOptions = RuntimeOptions(),
        *,
        capacity: int | None = None,
        open_runtime: OpenRuntime = open_gpu_runtime,
    ) -> None:
        spec = EngineSpec.from_json((engine_dir / SPEC).read_text(encoding="utf-8"))
        if capacity not in (None, spec.capacity):
            raise SpecError(
                "capacity",
                f"the plan was built for {spec.capacity} tokens, not {capacity}",
                f"Build it again with `sinkserve build --target {spec.target} --capacity {capacity}`",
            )
        if spec.tp_size != options.num_ranks:
            raise SpecError(
                "tp_size",
                f"the engine was built for {spec.tp_size} ranks, {options.num_ranks} run",
                "Start it with `open_engine`, or build it again",
            )
        self._spec = spec
        self._leads = options.rank == 0
        self._rotary = Rotary(spec.model.rope)
        self._spare_place = num_places(spec) - 1
        self._runtime: PlanRuntime | None = open_runtime(engine_dir, spec, options)
        try:
            self._max_resident = _least(self._runtime.num_rows, options.collective)
            self._buckets = decode_buckets(min(options.max_running, self._max_resident))
            self._order = SlotOrder(self._max_resident)
            self._warm_up()
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def max_resident(self) -> int:
        return self._max_resident

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`. Raises ValueError naming the field of a plan that it cannot run."""
        if self._runtime is None:
            raise EngineDead("the engine is closed")
        check_plan(plan, self._spec, self._max_resident)
        check_rings(plan.rows)
        step = _Step(plan.rows, self._runtime, self._leads)
        try:
            for row in plan.rows:
                if starts_anew(row):
                    self._runtime.clear(self._order.row_of(row.kv_slot))
            decode = [number for number, row in enumerate(plan.rows) if len(row.tokens) == 1]
            for begin in range(0, len(decode), self._buckets[-1]):
                self._decode(step, decode[begin : begin + self._buckets[-1]])
            for number, row in enumerate(plan.rows):
                if len(row.tokens) > 1:
                    self._prefill(step, number)
            return StepResult(step.results())
        except EngineDead:
            raise
        except Exception as error:
            raise EngineDead(f"{self._spec.target}: {error}") from error

    def close(self) -> None:
        """See `Engine.close`."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None

    def _warm_up(self) -> None:
        """Run a step of every size, so that no turn waits for kernels to be compiled or passes to be recorded
        (at their second run), and memory that does not suffice is an error now. What is written is cleared
        when a conversation begins."""
        spec, last = self._spec, self._max_resident - 1
        window = SinkWindow(0, spec.capacity, spec.slot_tokens)
        prompt = np.zeros(spec.max_chunk, np.int32)
        draw = SampleRequest(SamplingParams(temperature=0.0), 0, 0, prompt[:0])
        plans = [
            tuple(Row(slot, 0, prompt[:1], window, sample=draw) for slot in range(bucket))
            for bucket in reversed(self._buckets)
        ]
        whole = Row(last, 0, prompt, window, sample=draw, logits="all")
        # One token before the ring's end, one behind it.
        cut = Row(last, spec.slot_tokens - 1, np.zeros(2, np.int32), window, sample=draw)
        try:
            for rows in (*plans, *plans, (whole,), (cut,)):
                self.step(StepPlan(rows))
        except EngineDead as error:
            raise SpecError(
                "memory_budget_bytes",
                f"the largest steps of this engine do not run here ({error})",
                "Free the GPU, lower the budget, max_running or the capacity; or build the plan again",
            ) from error

    def _decode(self, step: _Step, numbers: Sequence[int]) -> None:
        """One token of each of these rows, in one pass."""
        rows = [step.rows[number] for number in numbers]
        bucket = next(bucket for bucket in self._buckets if bucket >= len(rows))
        for row, other in self._order.gather([row.kv_slot for row in rows], bucket):
            step.runtime.swap(row, other)
        # Rows that draw come first: the logits that are held then lie side by side.
        numbers = sorted(numbers, key=lambda number: step.rows[number].sample is None)
        rows = [step.rows[number] for number in numbers]
        drawing = [number for number in numbers if step.rows[number].sample is not None]
        at = [self._order.row_of(row.kv_slot) for row in rows]
        inputs = decode_inputs(rows, at, bucket, self._spare_place, self._rotary)
        step.run(inputs, 0, drawing, first_held=0)
        step.take_logits([(number, n, n + 1) for n, number in enumerate(numbers)])

    def _prefill(self, step: _Step, number: int) -> None:
        """The tokens of one row, in as many passes as its ring cuts it into."""
        row = step.rows[number]
        cache_row = self._order.row_of(row.kv_slot)
        for piece in cut_row(number, row):
            inputs = prefill_inputs(row, piece, row.logits == "all", self._rotary)
            ends = piece.end == len(row.tokens)
            count = len(inputs.logit_rows)
            drawing = [number] if ends and row.sample is not None else []
            step.run(inputs, cache_row, drawing, first_held=count - 1)
            if row.logits == "all" or ends:
                step.take_logits([(number, 0, count)])


def _least(num_rows: int, collective: Collective | None) -> int:
    """The cache rows that every rank has: passes of all ranks must be of one size."""
    if collective is None:
        return num_rows
    every = collective.gather(np.array([num_rows], np.float32))
    return int(collective.broadcast(b"" if every is None else str(int(every.min())).encode()))


class _Step:
    """What a step has come to so far. A rank that does not lead only runs the passes."""

    def __init__(self, rows: Sequence[Row], runtime: PlanRuntime, leads: bool) -> None:
        self.rows = rows
        self.runtime = runtime
        self._leads = leads
        self._logits: dict[int, list[Logits]] = {}
        self._held: list[int] = []
        self._drawn: dict[int, Sampled] = {}

    def run(
        self, inputs: PassInputs, first_row: int, drawing: Sequence[int], first_held: int
    ) -> None:
        """Run a pass; rows[drawing] draw from its rows of logits from `first_held` on."""
        if not self._leads:
            drawing = ()
        if len(self._held) + len(drawing) > self.runtime.max_held:
            self._draw()
        self.runtime.run(inputs, first_row, range(first_held, first_held + len(drawing)))
        self._held.extend(drawing)

    def take_logits(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Copy what rows want to see of the last pass: (number, first, end) among its logits."""
        wanted = [place for place in places if self.rows[place[0]].logits != "none"]
        if not wanted or not self._leads:
            return
        logits = self.runtime.logits()
        for number, first, end in wanted:
            self._logits.setdefault(number, []).append(logits[first:end])

    def results(self) -> tuple[RowResult, ...]:
        self._draw()
        return tuple(self._result(number) for number in range(len(self.rows)))

    def _draw(self) -> None:
        if not self._held:
            return
        requests = [self.rows[number].sample for number in self._held]
        drawn = self.runtime.draw([request for request in requests if request is not None])
        self._drawn.update(zip(self._held, drawn, strict=True))
        self._held = []

    def _result(self, number: int) -> RowResult:
        result = RowResult()
        if number in self._drawn:
            one = self._drawn[number]
            result = RowResult(one.token_id, one.logprob, one.top, failed=one.failed)
        if number in self._logits:
            result = dataclasses.replace(result, logits=np.concatenate(self._logits[number]))
        return result
