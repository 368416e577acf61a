"""What the engine is told about a claimed turn."""

from __future__ import annotations

import numpy as np

from cluster.conversation import GENESIS, Conversation, Fence, Ownership, ReplayLog
from deployments.turn_call import TurnCall
from deployments.turn_claim import TurnClaim
from engine.sampling import SamplingParams

END = 2


async def test_penalties_do_not_count_what_ends_a_turn() -> None:
    """Else frequency penalties grow with every turn and replies never end."""
    record = Conversation(
        conversation_id="conv_" + "0" * 32,
        tenant="t",
        fingerprint="f",
        sink_tokens=2,
        window_tokens=6,
        turn=1,
        token_count=6,
        head=GENESIS,
        history=GENESIS,
        owner="",
        epoch=1,
        running=True,
        created_s=0.0,
        updated_s=0.0,
        metadata={},
    )
    sinks, recent = np.array([9, 8], np.int32), np.array([5, END, 6, END], np.int32)
    replay = ReplayLog(sink_ids=sinks, recent_ids=recent, token_count=6)
    inputs = np.array([7, END, 5], np.int32)
    call = TurnCall(
        tenant="t",
        conversation_id=record.conversation_id,
        input_ids=inputs,
        messages=(),
        history=GENESIS,
        sampling=SamplingParams(),
        max_tokens=4,
    )
    claim = TurnClaim(call, Ownership(Fence(1, "n"), record, replay), "replica", slot_tokens=10)
    request = claim.request(frozenset({END}), None)
    assert request.retained.tolist() == [9, 8, 5, 6, 7, 5]
    assert request.retained.dtype == np.int32
    assert request.prefill(None).segments[-1].tokens[-3:].tolist() == inputs.tolist()
