"""A turn cut at some token and resumed on the real engine: the same tokens, though prefilled in chunks."""

from __future__ import annotations

import queue

import numpy as np
import pytest

from cluster.conversation import ReplayLog
from cluster.restore import plan_restore, retained_ids
from engine.loop import EngineLoop
from engine.onnx_engine import OnnxEngine
from engine.sampling import SamplingParams
from engine.turn import Prefill, Segment, TokenSampled, TurnEnded, TurnEvent, TurnRequest
from tests.engine_fixtures import make_engine, random_tokens, window_of

PARAMS = SamplingParams(
    temperature=0.8, seed=9, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.4
)
TOKENS = 40


@pytest.fixture(scope="module")
def engine() -> OnnxEngine:
    """float32: prefill and decode differ by less than what moves a drawn token."""
    return make_engine(capacity=40, max_chunk=20, slots=2)


def run_turn(loop: EngineLoop, name: str, output: list[int], tokens: int = TOKENS) -> list[int]:
    """The tokens that follow `output`, in a conversation that is cold and longer than its window."""
    window = window_of(loop._engine.spec, 4)
    empty = np.zeros(0, np.int32)
    log = ReplayLog(empty, empty, 0).advanced(random_tokens(3, 90), 4, 1000)
    input_ids = random_tokens(5, 11)
    ids = np.concatenate([input_ids, np.array(output, np.int32)])

    def prefill(resident_length: int | None) -> Prefill:
        plan = plan_restore(log, ids, resident_length)
        segments = tuple(Segment(one.start, one.tokens) for one in plan.segments)
        return Prefill(segments, plan.window_start, plan.recovery)

    events: queue.Queue[TurnEvent] = queue.Queue()
    loop.submit(
        TurnRequest(
            conversation_id=name,
            turn=3,
            head="head",
            window=window,
            token_count=90,
            input_tokens=11,
            prefill=prefill,
            retained=retained_ids(log, input_ids),
            sampling=PARAMS,
            max_tokens=tokens,
            eos_ids=frozenset(),
            output_ids=np.array(output, np.int32),
        ),
        events.put,
    )
    sampled: list[int] = []
    while not isinstance(event := events.get(timeout=60), TurnEnded):
        if isinstance(event, TokenSampled):
            assert event.k == len(output) + len(sampled)
            sampled.append(event.token_id)
    loop.discard(name)
    return sampled


def test_a_cut_turn_goes_on_with_the_same_tokens(engine: OnnxEngine) -> None:
    loop = EngineLoop(engine)
    whole = run_turn(loop, "whole", [])
    assert len(whole) == TOKENS
    # Had the tokens so far not been run, or counted, another text would follow.
    assert run_turn(loop, "forgetful", [], 20) != whole[20:]
    for k in (1, 7, 20, 33, 39):
        assert run_turn(loop, f"cut at {k}", whole[:k]) == whole[k:], k
    assert loop.stop(drain=False, timeout_s=20)
