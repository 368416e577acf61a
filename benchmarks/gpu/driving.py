"""How the benchmark drives an engine: rows of conversations of any age, plans of a step, chunks.

An engine keeps no lengths, so a conversation of four million tokens is a matter of the token_index that
a row names; its kv_slot holds keys of some kind, and reading them costs what reading real ones costs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from benchmarks.gpu.shapes import SINK_TOKENS
from engine.protocol import Engine, Logits, Row, SampleRequest, StepPlan, TokenIds
from engine.sampling import SamplingParams
from engine.window import SinkWindow
from engine_build.spec import EngineSpec

NO_HISTORY: TokenIds = np.zeros(0, np.int32)
GREEDY = SamplingParams(temperature=0.0)


def window_of(spec: EngineSpec, sink_tokens: int = SINK_TOKENS) -> SinkWindow:
    """The window of a conversation that pins `sink_tokens`."""
    return SinkWindow(sink_tokens, spec.capacity - sink_tokens, spec.slot_tokens - sink_tokens)


def random_tokens(seed: int, count: int, vocab_size: int) -> TokenIds:
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.int32)


def request(params: SamplingParams, k: int, history: TokenIds = NO_HISTORY) -> SampleRequest:
    return SampleRequest(params, turn=1, k=k, history=history)


def decode_plans(
    spec: EngineSpec, batch: int, steps: int, age: int = 0, params: SamplingParams = GREEDY
) -> list[StepPlan]:
    """`steps` decode steps of `batch` full conversations of at least `age` tokens, each of its own age."""
    window = window_of(spec)
    ages = [max(age, 2 * spec.slot_tokens) + 17 * slot for slot in range(batch)]
    tokens = random_tokens(batch, steps * batch, spec.model.vocab_size).reshape(steps, batch, 1)
    history = random_tokens(7, spec.capacity, spec.model.vocab_size)
    return [
        StepPlan(
            tuple(
                Row(
                    slot,
                    ages[slot] + step,
                    tokens[step, slot],
                    window,
                    sample=request(params, step, history),
                )
                for slot in range(batch)
            )
        )
        for step in range(steps)
    ]


def prefill_plans(
    spec: EngineSpec, start: int, tokens: TokenIds, kv_slot: int = 0, window_start: int = 0
) -> list[StepPlan]:
    """One row a step, `max_chunk` tokens at a time; the last one samples."""
    window = window_of(spec)
    chunks = list(cut(len(tokens), [spec.max_chunk]))
    return [
        StepPlan(
            (
                Row(
                    kv_slot,
                    start + begin,
                    tokens[begin:end],
                    window,
                    window_start,
                    sample=request(GREEDY, 0) if end == len(tokens) else None,
                ),
            )
        )
        for begin, end in chunks
    ]


def step_seconds(engine: Engine, plans: Iterable[StepPlan]) -> list[float]:
    """Seconds of each step, by the host's clock: from the plan to the sampled ids on the host."""
    seconds = []
    for plan in plans:
        begin = time.perf_counter()
        engine.step(plan)
        seconds.append(time.perf_counter() - begin)
    return seconds


def warm_up(engine: Engine, plans: Sequence[StepPlan], at_least_s: float) -> float:
    """Run the plans, again and again until `at_least_s` have passed; seconds of the very last step.

    First launches compile kernels and record graphs; TensorRT-RTX compiles better kernels for the shapes that
    it meets in the background, while it runs.
    """
    begin = time.monotonic()
    while True:
        seconds = step_seconds(engine, plans)
        if time.monotonic() - begin >= at_least_s:
            return seconds[-1]


def cut(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive chunks of these sizes, over and over, until `count`."""
    begin, turn = 0, 0
    while begin < count:
        end = min(count, begin + sizes[turn % len(sizes)])
        yield begin, end
        begin, turn = end, turn + 1


def feed(
    engine: Engine,
    tokens: TokenIds,
    row: Row,
    sizes: Sequence[int],
) -> Logits:
    """Run `tokens` from `row.start` on in chunks of these sizes; all logits, [len(tokens), vocab]."""
    found = []
    for begin, end in cut(len(tokens), sizes):
        part = Row(
            row.kv_slot,
            row.start + begin,
            tokens[begin:end],
            row.window,
            row.window_start,
            logits="all",
        )
        (result,) = engine.step(StepPlan((part,))).rows
        if result.logits is None:
            raise RuntimeError(f"the engine gave no logits: {result.failed}")
        found.append(result.logits)
    return np.concatenate(found)
