"""Drives an engine through what a service does to it, and keeps the logits it gave.

Three conversations over the same text:

    long      slides for several windows in chunks of many sizes, then goes on greedily, token by token
    pinned    a quarter of its capacity pinned; shares steps with the long one, decoding while that prefills
    restored  the long one again, from its sinks and its newest tokens only, in the kv_slot that the pinned
              one has left full of its own keys
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.float_reference import Passage
from engine.protocol import Engine, Logits, Row, RowResult, SampleRequest, StepPlan, TokenIds
from engine.sampling import SamplingParams
from engine.window import SinkWindow
from engine_build.spec import EngineSpec

NUM_SLOTS = 2
MIN_SINK_TOKENS = 4
MIN_CAPACITIES, CAPACITIES = 4, 6
GREEDY_TOKENS = 32
_KEPT_BYTES = 1 << 30

_GREEDY = SamplingParams(temperature=0.0)

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is."""


class EngineFault(Exception):
    """The engine ran, and what it gave is no answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine said along one conversation.

    `logits` float32 [len(kept), vocab] are those after the tokens at the places `kept` of the passage.
    `num_given` of its tokens came from the text, the rest are the engine's own, drawn greedily.
    `greedy_is_top`: each of those was the likeliest by the engine's own logits.
    """

    name: str
    passage: Passage
    kept: npt.NDArray[np.int64]
    logits: Logits
    num_given: int
    greedy_is_top: bool


def default_tokens(spec: EngineSpec) -> int:
    """Tokens that a verification runs unless told otherwise: three windows of the long conversation."""
    return CAPACITIES * spec.capacity


def run_engine(
    engine: Engine, text: TokenIds, num_tokens: int, progress: Progress
) -> tuple[Answer, ...]:
    """Run `num_tokens` tokens in all: half of them the long conversation, a quarter each of the others.

    `text` gives the token ids, int32, at least half of `num_tokens`. Raises ValueError where there are too
    few to slide the window or too few kv_slots, EngineFault, and what the engine raises.
    """
    spec = engine.spec
    if num_tokens < MIN_CAPACITIES * spec.capacity:
        raise ValueError(
            f"tokens: {num_tokens} are too few to slide a window of {spec.capacity} tokens. "
            f"Use at least {MIN_CAPACITIES * spec.capacity}"
        )
    if len(text) < num_tokens // 2:
        raise ValueError(f"text: {len(text)} tokens. Give a text of at least {num_tokens // 2}")
    if engine.max_resident < NUM_SLOTS:
        raise ValueError(f"memory_budget_bytes: {NUM_SLOTS} kv_slots are needed. Raise it")
    run = _Run(engine, num_tokens, progress)
    chunk, sinks = spec.max_chunk, min(MIN_SINK_TOKENS, spec.max_sink_tokens)
    long = _Conversation(
        "long", 0, _window(spec, sinks), text[: num_tokens // 2], (chunk, 1, 7, chunk, 1, 1, 33)
    )
    pinned = _Conversation(
        "pinned",
        1,
        _window(spec, max(1, spec.capacity // 4)),
        text[num_tokens // 2 - num_tokens // 4 :][: num_tokens // 4],
        (1, chunk, 1, 1, 5),
    )
    long.greedy = GREEDY_TOKENS
    run.run([long, pinned])
    begin = num_tokens // 2 - num_tokens // 4 + sinks
    restored = _Conversation(
        "restored", 1, _window(spec, sinks), text[: num_tokens // 2], (chunk, chunk, 1), begin
    )
    run.run([restored])
    return long.answer(), pinned.answer(), restored.answer()


def _window(spec: EngineSpec, sinks: int) -> SinkWindow:
    return SinkWindow(sinks, spec.capacity - sinks, spec.slot_tokens - sinks)


@dataclass(slots=True)
class _Conversation:
    """Tokens on their way through a kv_slot. `begin`: where a bounded replay starts again after the sinks."""

    name: str
    kv_slot: int
    window: SinkWindow
    given: TokenIds
    sizes: Sequence[int]
    begin: int = 0
    greedy: int = 0
    stride: int = 1
    _tokens: list[int] = field(default_factory=list)
    _indices: list[int] = field(default_factory=list)
    _done: int = 0
    _drawn: int = 0
    _greedy_is_top: bool = True
    _kept: list[int] = field(default_factory=list)
    _logits: list[Logits] = field(default_factory=list)
    _sizes: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        first = np.arange(self.window.sink_tokens if self.begin else len(self.given))
        rest = np.arange(self.begin, len(self.given)) if self.begin else first[:0]
        self._indices = [*first.tolist(), *rest.tolist()]
        self._tokens = [int(self.given[index]) for index in self._indices]
        self._sizes = itertools.cycle(self.sizes)

    def next_row(self, max_chunk: int) -> Row | None:
        """The next tokens to run, all at consecutive indices; None at the end."""
        left = len(self._tokens) - self._done
        if not left:
            return None
        size = min(left, max_chunk, next(self._sizes))
        start = self._indices[self._done]
        while self._indices[self._done + size - 1] != start + size - 1:
            size -= 1
        drawing = size == left and self._drawn < self.greedy
        sample = SampleRequest(_GREEDY, 0, self._drawn, np.zeros(0, np.int32))
        return Row(
            self.kv_slot,
            start,
            np.array(self._tokens[self._done : self._done + size], np.int32),
            self.window,
            self.begin,
            sample=sample if drawing else None,
            logits="all",
        )

    def take(self, row: Row, result: RowResult) -> None:
        """Keep what came of it. Raises EngineFault for a row without logits or token."""
        if result.failed is not None or result.logits is None:
            raise EngineFault(f"{self.name}: no logits ({result.failed or 'and no reason'})")
        if not np.isfinite(result.logits).all():
            raise EngineFault(f"{self.name}: logits after token {row.start} are not finite")
        end = self._done + len(row.tokens)
        for place in range(self._done, end):
            if place % self.stride == 0 or end == len(self._tokens):
                self._kept.append(place)
                self._logits.append(result.logits[place - self._done].copy())
        self._done = end
        if row.sample is not None:
            if result.token_id is None:
                raise EngineFault(f"{self.name}: no token was drawn")
            last = result.logits[-1]
            self._greedy_is_top &= bool(last[result.token_id] == last.max())
            self._tokens.append(result.token_id)
            self._indices.append(self._indices[-1] + 1)
            self._drawn += 1

    def answer(self) -> Answer:
        window = self.window
        passage = Passage(
            np.array(self._tokens, np.int32),
            np.array(self._indices, np.int64),
            window.sink_tokens,
            window.window_tokens,
        )
        return Answer(
            self.name,
            passage,
            np.array(self._kept, np.int64),
            np.stack(self._logits),
            len(self._tokens) - self._drawn,
            self._greedy_is_top,
        )


@dataclass(slots=True)
class _Run:
    engine: Engine
    num_tokens: int
    progress: Progress
    _done_tokens: int = 0

    def run(self, conversations: Sequence[_Conversation]) -> None:
        """Run conversations side by side to their ends."""
        spec = self.engine.spec
        kept_bytes = 4 * spec.model.vocab_size * self.num_tokens
        for conversation in conversations:
            conversation.stride = -(-kept_bytes // _KEPT_BYTES)
        while True:
            rows = [conversation.next_row(spec.max_chunk) for conversation in conversations]
            busy = [(c, row) for c, row in zip(conversations, rows, strict=True) if row is not None]
            if not busy:
                return
            plan = StepPlan(tuple(row for _, row in busy))
            results = self.engine.step(plan).rows
            for (conversation, row), result in zip(busy, results, strict=True):
                conversation.take(row, result)
                self._done_tokens += len(row.tokens)
            self.progress("engine", min(1.0, self._done_tokens / self.num_tokens))
