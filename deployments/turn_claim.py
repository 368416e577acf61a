"""A claimed turn: what its record, its call and its tokens so far mean for the engine. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.conversation import Ownership, TokenIds
from cluster.restore import plan_restore, retained_ids
from deployments.turn_call import TurnAccepted, TurnCall
from engine.protocol import FinishReason
from engine.turn import Prefill, Recovery, Segment, StopCheck, TurnRequest
from engine.window import SinkWindow


class TurnClaim:
    """What `begin` gave to a call. `sampled` are the tokens that the reply begins with because earlier
    owners of the turn have stored or shown them."""

    def __init__(
        self,
        call: TurnCall,
        ownership: Ownership,
        replica: str,
        slot_tokens: int,
        sampled: Sequence[int] = (),
    ) -> None:
        record = ownership.conversation
        self.call = call
        self.replica = replica
        self.ownership = ownership
        self.sampled = list(sampled)
        self.turn = record.turn + 1
        self.input_ids: TokenIds = ownership.input_ids if ownership.resumed else call.input_ids
        self.window = SinkWindow(
            record.sink_tokens, record.window_tokens, slot_tokens - record.sink_tokens
        )

    @property
    def key(self) -> str:
        """Names the turn in the store."""
        return self.call.key or self.ownership.fence.nonce

    @property
    def base_tokens(self) -> int:
        """Tokens of the conversation before this turn."""
        return self.ownership.conversation.token_count

    @property
    def cold_recovery(self) -> Recovery:
        """How the cache is come by if no slot holds the conversation."""
        return self._prefill(None).recovery

    def accepted(self, recovery: Recovery) -> TurnAccepted:
        """The turn's first item."""
        call = self.call
        return TurnAccepted(
            turn=self.turn,
            replica=self.replica,
            recovery=recovery,
            completion_id=call.completion_id,
            created_s=call.created_s,
            stop=call.stop,
        )

    def ended(self, eos_ids: frozenset[int], stop: StopCheck | None) -> FinishReason | None:
        """Why the turn needs no more tokens, if so. Shows `stop` those that are there; call it once."""
        for token_id in self.sampled:
            if token_id in self._end_ids(eos_ids):
                return "stop"
            if stop is not None and stop.push(token_id):
                return "stop"
        return "length" if len(self.sampled) >= self.call.max_tokens else None

    def request(self, eos_ids: frozenset[int], stop: StopCheck | None) -> TurnRequest:
        """The turn as the engine loop wants it."""
        call, record = self.call, self.ownership.conversation
        return TurnRequest(
            conversation_id=call.conversation_id,
            turn=self.turn,
            head=record.head,
            window=self.window,
            token_count=record.token_count,
            input_tokens=len(self.input_ids),
            prefill=self._prefill,
            retained=_penalised(retained_ids(self.ownership.replay, self.input_ids), eos_ids),
            sampling=call.sampling,
            max_tokens=call.max_tokens,
            eos_ids=self._end_ids(eos_ids),
            stop=stop,
            output_ids=np.array(self.sampled, np.int32),
        )

    def _end_ids(self, eos_ids: frozenset[int]) -> frozenset[int]:
        return frozenset() if self.call.ignore_eos else eos_ids

    def _prefill(self, resident_length: int | None) -> Prefill:
        ids = np.concatenate([self.input_ids, np.array(self.sampled, np.int32)])
        plan = plan_restore(self.ownership.replay, ids, resident_length)
        segments = tuple(Segment(part.start, part.tokens) for part in plan.segments)
        # A record with turns and no tokens was rebased: this input is its transcript.
        rebased = self.turn > 1 and not self.base_tokens
        return Prefill(segments, plan.window_start, "restart" if rebased else plan.recovery)


def _penalised(token_ids: TokenIds, eos_ids: frozenset[int]) -> TokenIds:
    """Without what ends a turn: every turn adds one, and penalties on them would let the replies of a
    long conversation never end."""
    kept: TokenIds = token_ids[~np.isin(token_ids, list(eos_ids))]
    return kept
