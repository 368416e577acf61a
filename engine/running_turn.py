"""A turn inside the loop: what it has run so far and what its next row is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from engine.protocol import (
    Engine,
    Row,
    RowResult,
    SampleRequest,
    StepPlan,
    StepResult,
    TokenIds,
    TurnFailed,
)
from engine.scheduler import Share
from engine.turn import Prefill, Segment, TurnEvent, TurnRequest
from engine_build.spec import EngineSpec

OnEvent = Callable[[TurnEvent], None]


@dataclass(slots=True, eq=False)
class RunningTurn:
    """Mutable; touched only by `engine.loop.EngineLoop`, which explains its phases.

    `length` tokens of the conversation are cached in `kv_slot` (-1: it never had one). `forgotten`:
    discarded by its owner, or its callback raised; it is told nothing more and its slot is discarded
    as soon as it ends.
    """

    number: int
    request: TurnRequest
    on_event: OnEvent
    submitted_s: float
    phase: Literal["waiting", "running", "ended"] = "waiting"
    cancelled: bool = False
    forgotten: bool = False
    kv_slot: int = -1
    segments: tuple[Segment, ...] = ()
    window_start: int = 0
    length: int = 0
    num_sampled: int = 0
    last_token: int = -1
    history: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))
    started_s: float | None = None
    first_token_s: float | None = None

    def row(self, share: Share) -> Row:
        """The tokens of `share`, which must be the next ones."""
        request = self.request
        if share.segment >= 0:
            segment = self.segments[share.segment]
            start = segment.start + share.offset
            tokens = segment.tokens[share.offset : share.offset + share.count]
        else:
            start = self.length
            tokens = np.array([self.last_token], dtype=np.int32)
        sample: SampleRequest | None = None
        if share.samples:
            history = self.history[: len(request.retained) + self.num_sampled]
            sample = SampleRequest(request.sampling, request.turn, self.num_sampled, history)
        return Row(self.kv_slot, start, tokens, request.window, self.window_start, sample)

    def begin(self, prefill: Prefill) -> None:
        """The turn has its slot: run `prefill`, then sample after what earlier engines have sampled."""
        earlier = self.request.output_ids
        self.segments = prefill.segments
        self.length = prefill.segments[0].start
        self.history = np.concatenate([self.request.retained, earlier])
        self.num_sampled = len(earlier)

    def append(self, token: int) -> None:
        """Count output `token`, also for penalties: in a buffer that doubles as it fills."""
        self.num_sampled += 1
        self.last_token = token
        used = len(self.request.retained) + self.num_sampled
        if used > len(self.history):
            grown = np.zeros(2 * used + 64, dtype=np.int32)
            grown[: used - 1] = self.history[: used - 1]
            self.history = grown
        self.history[used - 1] = token

    def timings(self, now_s: float) -> dict[str, float]:
        """See `engine.turn.TurnEnded`."""
        timings = {}
        if self.started_s is not None:
            timings["queue_s"] = self.started_s - self.submitted_s
            if self.first_token_s is not None:
                timings["prefill_s"] = self.first_token_s - self.started_s
                timings["ttft_s"] = self.first_token_s - self.submitted_s
                timings["decode_s"] = now_s - self.first_token_s
        return timings


def run_plan(engine: Engine, plan: StepPlan) -> StepResult:
    """A step; where the engine raises TurnFailed each row says so. Raises what ends the engine."""
    try:
        result = engine.step(plan)
    except TurnFailed as error:
        return StepResult(tuple(RowResult(failed=str(error)) for _ in plan.rows))
    if len(result.rows) != len(plan.rows):
        raise RuntimeError("the engine returned another number of rows than planned")
    return result


def check_request(request: TurnRequest, spec: EngineSpec) -> None:
    """Raises ValueError unless there is a token left to sample and the window fits the engine's slots."""
    window = request.window
    if request.max_tokens <= len(request.output_ids):
        raise ValueError("max_tokens must be at least 1 and more than there are output_ids")
    if window.slot_tokens > spec.slot_tokens or window.sink_tokens > spec.max_sink_tokens:
        raise ValueError(f"the engine's slots are too small for {window}")


def checked_counts(prefill: Prefill, request: TurnRequest, vocab_size: int) -> list[int]:
    """Token counts of the segments. Raises ValueError unless they rise, end with input and `output_ids`
    and are, like the retained tokens, of the vocabulary: an engine that met another id would be dead."""
    end = request.token_count + request.input_tokens + len(request.output_ids)
    reached = 0
    for segment in prefill.segments:
        if segment.start < reached or not len(segment.tokens):
            raise ValueError(f"the segment at {segment.start} is empty or overlaps")
        reached = segment.start + len(segment.tokens)
    if reached != end:
        raise ValueError(f"the segments end at {reached}, what there is to run at {end}")
    for ids in (
        request.retained,
        request.output_ids,
        *(segment.tokens for segment in prefill.segments),
    ):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"a token id is not in 0..{vocab_size - 1}")
    return [len(segment.tokens) for segment in prefill.segments]
