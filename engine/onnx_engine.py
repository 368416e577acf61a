"""The decoder on ONNX Runtime: any CPU, 8-bit or float32 weights, caches that are never copied.

    step = check plan -> flatten its rows -> one run of the graph for all of them -> sample

Decode rows and prefill chunks share that run, so each weight is read once a step. The graph's attention
(engine/kernels) reads and writes the kv_slots where they are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.collective import Collective
from engine.graph_run import GraphRun, SessionOptions
from engine.kernels.compile import kernel_library
from engine.plan_check import check_plan
from engine.protocol import EngineDead, Logits, Row, RowResult, StepPlan, StepResult
from engine.rotary import Rotary
from engine.sampling import sample_rows
from engine.step_inputs import StepInputs, step_inputs
from engine_build.engine_names import GRAPH_FILE
from engine_build.files import sinkserve_home
from engine_build.manifest import SPEC
from engine_build.shard import rank_folder, rank_spec
from engine_build.spec import EngineSpec, SpecError

_MIB = 2**20


@dataclass(slots=True)
class StepTimes:
    """Seconds spent since the engine started, by phase, and what they bought."""

    prepare_s: float = 0.0
    run_s: float = 0.0
    sample_s: float = 0.0
    num_steps: int = 0
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0


class OnnxEngine:
    """See `engine.protocol.Engine`.

    `memory_budget_bytes` is for kv_slots alone: `max_resident` is as many as fit. `capacity` replaces
    the one in spec.json: the graph fits any. `spinning` lets idle threads burn CPU to start a few
    microseconds sooner. `profile` makes ONNX Runtime write a trace with this prefix until `close`.
    `host_memory_bytes` is for conversations that lost their kv_slot. On a CPU it is the same memory, but
    out of the steps' reach, so `memory_budget_bytes` uses it better.

    One rank of a tensor-parallel group takes its `collective`, and a budget and threads of its own; all
    run the same plans. Rank 0 samples and returns logits, the results of the others are empty.

    Raises SpecError if not even one slot fits the budget, a number of threads makes no sense or the engine
    was built for another number of ranks; KernelError if the graph's operators cannot be compiled here.
    """

    def __init__(  # noqa: PLR0913 - each is a choice of its own, given by name
        self,
        engine_dir: Path,
        *,
        memory_budget_bytes: int,
        threads: int = 1,
        spinning: bool = False,
        capacity: int | None = None,
        profile: Path | None = None,
        collective: Collective | None = None,
        host_memory_bytes: int = 0,
    ) -> None:
        spec = EngineSpec.from_json((engine_dir / SPEC).read_text(encoding="utf-8"))
        self._spec = spec if capacity is None else dataclasses.replace(spec, capacity=capacity)
        if threads < 1:
            raise SpecError("threads", f"{threads} is not positive", "Use 1 to the number of cores")
        rank, size = (0, 1) if collective is None else (collective.rank, collective.size)
        if self._spec.tp_size != size:
            raise SpecError(
                "tp_size",
                f"the engine was built for {self._spec.tp_size} ranks, {size} run",
                "Start it with `open_engine`, or build it again",
            )
        slot_bytes = rank_spec(self._spec).slot_bytes
        self._max_resident = memory_budget_bytes // slot_bytes
        if self._max_resident < 1:
            raise SpecError(
                "memory_budget_bytes",
                f"{memory_budget_bytes / _MIB:.1f} MiB do not hold one kv_slot "
                f"({slot_bytes / _MIB:.1f} MiB)",
                "Raise the budget or lower the capacity",
            )
        self._host_slots = host_memory_bytes // slot_bytes
        self.times = StepTimes()
        options = SessionOptions(kernel_library(sinkserve_home()), threads, spinning, profile)
        self._collective = collective
        self._run: GraphRun | None = GraphRun(
            rank_folder(engine_dir, rank, size) / GRAPH_FILE,
            self._spec,
            self._max_resident,
            options,
            None if collective is None else collective.all_reduce,
            self._host_slots,
        )
        self._rotary = Rotary(self._spec.model.rope)

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def max_resident(self) -> int:
        return self._max_resident

    @property
    def host_slots(self) -> int:
        return self._host_slots

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`. Raises ValueError naming the field of a plan that it cannot run."""
        if self._run is None:
            raise EngineDead("the engine is closed")
        check_plan(plan, self._spec, self._max_resident, self._host_slots)
        self._run.copy_slots(plan.copies)
        if not plan.rows:
            return StepResult(())
        started = time.perf_counter()
        inputs = step_inputs(plan.rows, self._rotary)
        ready = time.perf_counter()
        try:
            logits = self._whole(self._run.execute(inputs))
        except EngineDead:
            raise
        except Exception as error:
            raise EngineDead(f"ONNX Runtime: {error}") from error
        ran = time.perf_counter()
        results = (
            tuple(RowResult() for _ in plan.rows)
            if logits is None
            else _results(plan.rows, inputs, logits)
        )
        times = self.times
        times.prepare_s += ready - started
        times.run_s += ran - ready
        times.sample_s += time.perf_counter() - ran
        for row in plan.rows:
            if len(row.tokens) == 1:
                times.num_decode_tokens += 1
            else:
                times.num_prefill_tokens += len(row.tokens)
        times.num_steps += 1
        return StepResult(results)

    def _whole(self, logits: Logits) -> Logits | None:
        """The logits of the whole vocabulary, out of every rank's part, where they are wanted."""
        if self._collective is None or not len(logits):
            return logits
        parts = self._collective.gather(logits)
        if parts is None:
            return None
        whole: Logits = parts.transpose(1, 0, 2).reshape(logits.shape[0], -1)
        return whole

    def close(self) -> None:
        """See `Engine.close`."""
        if self._run is not None:
            self._run.close()
        self._run = None


def _results(rows: Sequence[Row], inputs: StepInputs, logits: Logits) -> tuple[RowResult, ...]:
    """Sample for the rows that ask for it, and copy logits for those that want to see them."""
    drawing = [number for number, row in enumerate(rows) if row.sample is not None]
    last = [inputs.logits_of[number][1] - 1 for number in drawing]
    requests = [row.sample for row in rows if row.sample is not None]
    chosen = logits if len(drawing) == len(logits) else logits[last]
    drawn = dict(zip(drawing, sample_rows(chosen, requests), strict=True))
    results = []
    for number, (row, (first, end)) in enumerate(zip(rows, inputs.logits_of, strict=True)):
        result = RowResult()
        if number in drawn:
            one = drawn[number]
            result = RowResult(one.token_id, one.logprob, one.top, failed=one.failed)
        if row.logits != "none":
            result = dataclasses.replace(result, logits=logits[first:end].copy())
        results.append(result)
    return tuple(results)
