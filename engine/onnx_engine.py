"""The decoder on ONNX Runtime: any CPU, 8-bit or float32 weights, caches that are never copied.

    step = check plan -> bring decode rows together -> one run for all of them
                      -> one run per prefill chunk -> after each run: write K and V, sample

Memory of the kv_slots is one array [layer, key/value, physical row, kv_head, place, head_dim]: any
contiguous range of rows can be bound to the graph by address. Pages are touched when first used.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from engine.graph_run import GraphRun, RunShape
from engine.plan_check import check_plan
from engine.protocol import EngineDead, Logits, Row, RowResult, StepPlan, StepResult
from engine.rotary import Rotary
from engine.row_map import RowMap
from engine.sampling import sample_rows
from engine.step_inputs import pieces, place_spans, visible_chunk, visible_past
from engine_build.graph import GRAPH_FILE
from engine_build.manifest import SPEC
from engine_build.spec import EngineSpec, SpecError

_CACHED_RUNS = 64
_MIB = 2**20

Caches = npt.NDArray[np.float32]


@dataclass(slots=True)
class StepTimes:
    """Seconds spent since the engine started, by phase, and what they bought."""

    prepare_s: float = 0.0
    run_s: float = 0.0
    write_s: float = 0.0
    sample_s: float = 0.0
    swap_s: float = 0.0
    num_steps: int = 0
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_swaps: int = 0


class OnnxEngine:
    """See `engine.protocol.Engine`.

    `memory_budget_bytes` is for kv_slots alone: `max_resident` is as many as fit. `capacity` replaces
    the one in spec.json: the graph fits any. `spinning` lets idle threads burn CPU to start a few
    microseconds sooner. `profile` makes ONNX Runtime write a trace with this prefix until `close`.

    Raises SpecError if not even one slot fits the budget or a number of threads makes no sense.
    """

    def __init__(
        self,
        engine_dir: Path,
        *,
        memory_budget_bytes: int,
        threads: int = 1,
        spinning: bool = False,
        capacity: int | None = None,
        profile: Path | None = None,
    ) -> None:
        spec = EngineSpec.from_json((engine_dir / SPEC).read_text(encoding="utf-8"))
        self._spec = spec if capacity is None else dataclasses.replace(spec, capacity=capacity)
        if threads < 1:
            raise SpecError("threads", f"{threads} is not positive", "Use 1 to the number of cores")
        self._max_resident = memory_budget_bytes // self._spec.slot_bytes
        if self._max_resident < 1:
            raise SpecError(
                "memory_budget_bytes",
                f"{memory_budget_bytes / _MIB:.1f} MiB do not hold one kv_slot "
                f"({self._spec.slot_bytes / _MIB:.1f} MiB)",
                "Raise the budget or lower the capacity",
            )
        self.times = StepTimes()
        self._session: onnxruntime.InferenceSession | None = _session(
            engine_dir / GRAPH_FILE, threads, spinning, profile
        )
        model = self._spec.model
        self._caches: Caches = np.zeros(
            (
                model.num_layers,
                2,
                self._max_resident,
                model.num_kv_heads,
                self._spec.slot_tokens,
                model.head_dim,
            ),
            dtype=np.float32,
        )
        self._rows = RowMap(self._max_resident)
        self._used: set[int] = set()
        self._runs: OrderedDict[RunShape, GraphRun] = OrderedDict()
        self._rotary = Rotary(model.rope)

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def max_resident(self) -> int:
        return self._max_resident

    @property
    def num_prepared_runs(self) -> int:
        """Shapes of runs that are bound and kept, at most 64."""
        return len(self._runs)

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`. Raises ValueError naming the field of a plan that it cannot run."""
        if self._session is None:
            raise EngineDead("the engine is closed")
        check_plan(plan, self._spec, self._max_resident)
        results: dict[int, RowResult] = {}
        decoding = [row for row in plan.rows if len(row.tokens) == 1]
        if decoding:
            self._decode(decoding, results)
        for row in plan.rows:
            if len(row.tokens) > 1:
                self._prefill(row, results)
        self.times.num_steps += 1
        self.times.num_decode_tokens += len(decoding)
        return StepResult(tuple(results[row.kv_slot] for row in plan.rows))

    def close(self) -> None:
        """See `Engine.close`."""
        if self._session is not None and self._session.get_session_options().enable_profiling:
            self._session.end_profiling()
        self._runs.clear()
        self._session = None
        self._caches = np.zeros((0,) * 6, dtype=np.float32)

    def _decode(self, rows: list[Row], results: dict[int, RowResult]) -> None:
        """One token each, as one run over neighbouring physical rows."""
        first_row = self._gather([row.kv_slot for row in rows])
        rows = sorted(rows, key=lambda row: self._rows.row(row.kv_slot))
        started = time.perf_counter()
        wanted = [number for number, row in enumerate(rows) if _wants_logits(row)]
        sinks = max(1, *(row.window.sink_tokens for row in rows))
        run = self._run(RunShape(first_row, len(rows), 1, sinks, len(wanted)))
        run.token_ids[:, 0] = [row.tokens[0] for row in rows]
        run.logit_rows[:] = wanted
        starts = np.array([[row.start] for row in rows], dtype=np.int64)
        positions = [[row.window.cache_position(row.start)] for row in rows]
        run.cos[...], run.sin[...] = self._rotary.cos_sin(starts)
        run.sink_cos[...], run.sink_sin[...] = self._rotary.cos_sin(np.array(positions))
        for number, row in enumerate(rows):
            run.is_sink[number, 0, 0, 0] = run.sink_places < row.window.sink_tokens
        run.bias[...] = -np.inf
        run.bias[:, 0, 0, 0, -1] = 0.0
        past = run.bias[:, 0, 0, 0, :-1]
        past[visible_past(rows, self._spec.slot_tokens)] = 0.0
        self._execute(run, started)
        started = time.perf_counter()
        for number, row in enumerate(rows):
            self._write(run, number, row, first_row + number)
        self.times.write_s += time.perf_counter() - started
        self._finish([rows[number] for number in wanted], run.logits, results)
        for row in rows:
            results.setdefault(row.kv_slot, RowResult())

    def _prefill(self, row: Row, results: dict[int, RowResult]) -> None:
        """One conversation's chunk, as one run (seldom two, see `pieces`)."""
        all_logits: list[Logits] = []
        for begin, end in pieces(row):
            last = end == len(row.tokens)
            want_all = row.logits == "all"
            part = dataclasses.replace(row, start=row.start + begin, tokens=row.tokens[begin:end])
            num_logits = end - begin if want_all else int(last and _wants_logits(row))
            run = self._run_chunk(part, num_logits)
            if want_all:
                all_logits.append(run.logits.copy())
            if last:
                self._finish([row][:num_logits], run.logits[-1:], results)
        result = results.get(row.kv_slot, RowResult())
        if all_logits:
            result = dataclasses.replace(result, logits=np.concatenate(all_logits))
        results[row.kv_slot] = result
        self.times.num_prefill_tokens += len(row.tokens)

    def _run_chunk(self, row: Row, num_logits: int) -> GraphRun:
        started = time.perf_counter()
        physical, count = self._rows.row(row.kv_slot), len(row.tokens)
        sinks = max(1, row.window.sink_tokens)
        run = self._run(RunShape(physical, 1, count, sinks, num_logits))
        run.token_ids[0] = row.tokens
        run.logit_rows[:] = np.arange(count - num_logits, count)
        indices = row.start + np.arange(count, dtype=np.int64)
        positions = np.minimum(indices, row.window.capacity - 1)
        run.cos[0], run.sin[0] = self._rotary.cos_sin(indices)
        run.sink_cos[0], run.sink_sin[0] = self._rotary.cos_sin(positions)
        run.is_sink[0, 0, 0, 0] = run.sink_places < row.window.sink_tokens
        visible = visible_chunk(row, self._spec.slot_tokens)
        run.bias[0, 0, 0] = np.where(visible, np.float32(0), np.float32(-np.inf))
        self._execute(run, started)
        started = time.perf_counter()
        self._write(run, 0, row, physical)
        self.times.write_s += time.perf_counter() - started
        return run

    def _run(self, shape: RunShape) -> GraphRun:
        run = self._runs.get(shape)
        if run is None:
            run = GraphRun(self._session, self._spec.model, self._caches, shape)
            self._runs[shape] = run
            if len(self._runs) > _CACHED_RUNS:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(shape)
        return run

    def _execute(self, run: GraphRun, started: float) -> None:
        ready = time.perf_counter()
        try:
            run.execute()
        except Exception as error:
            raise EngineDead(f"ONNX Runtime: {error}") from error
        self.times.prepare_s += ready - started
        self.times.run_s += time.perf_counter() - ready

    def _write(self, run: GraphRun, number: int, row: Row, physical: int) -> None:
        """Copy a row's new keys and values into the places of its ring."""
        slot = self._caches[:, :, physical]
        new = run.new[:, :, number]
        for offset, place, length in place_spans(row.window, row.start, len(row.tokens)):
            slot[:, :, :, place : place + length] = new[:, :, :, offset : offset + length]
        self._used.add(physical)

    def _finish(self, rows: Sequence[Row], logits: Logits, results: dict[int, RowResult]) -> None:
        """Sample, and hand out logits, for rows whose last token's logits are given."""
        started = time.perf_counter()
        drawing = [number for number, row in enumerate(rows) if row.sample is not None]
        requests = [row.sample for row in rows if row.sample is not None]
        chosen = logits if len(drawing) == len(logits) else logits[drawing]
        for number, drawn in zip(drawing, sample_rows(chosen, requests), strict=True):
            results[rows[number].kv_slot] = RowResult(
                drawn.token_id, drawn.logprob, drawn.top, failed=drawn.failed
            )
        for number, row in enumerate(rows):
            if row.logits == "last" or (row.logits == "all" and len(row.tokens) == 1):
                result = results.get(row.kv_slot, RowResult())
                copy = logits[number : number + 1].copy()
                results[row.kv_slot] = dataclasses.replace(result, logits=copy)
        self.times.sample_s += time.perf_counter() - started

    def _gather(self, kv_slots: list[int]) -> int:
        """Bring slots to neighbouring physical rows; returns the first."""
        started = time.perf_counter()
        plan = self._rows.gather(kv_slots)
        for one, other in plan.swaps:
            self._swap(one, other)
        self.times.num_swaps += len(plan.swaps)
        self.times.swap_s += time.perf_counter() - started
        return plan.first_row

    def _swap(self, one: int, other: int) -> None:
        """Exchange two physical rows, layer by layer; a row never written to need not be read."""
        one_used, other_used = one in self._used, other in self._used
        for layer in self._caches:
            for part in layer:
                kept = part[other].copy() if other_used else None
                if one_used:
                    part[other] = part[one]
                if kept is not None:
                    part[one] = kept
        if one_used:
            self._used.add(other)
        if other_used:
            self._used.add(one)


def _wants_logits(row: Row) -> bool:
    return row.sample is not None or row.logits != "none"


def _session(
    graph: Path, threads: int, spinning: bool, profile: Path | None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
