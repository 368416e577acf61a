"""What a running turn has produced: events that passed the gate in, a growing log and a commit out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.conversation import (
    Conversation,
    Message,
    TokenIds,
    TurnCommit,
    chain_head,
    history_hash,
)
from deployments.output_gate import ClaimLost, LaneEvent
from deployments.turn_call import TurnDone, TurnUsage
from deployments.turn_claim import TurnClaim
from deployments.turn_ending import ENGINE_DEAD, FAILED, HANDED_OVER, Ending, lost_claim, refused
from deployments.turn_log import TurnLog
from engine.protocol import FinishReason
from engine.turn import StopCheck, TokenSampled, TurnEnded, TurnError, TurnStarted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClosedReply:
    """A reply as it is committed: `output_ids` decode to `text`; `closing_ids` end the turn. int32."""

    output_ids: TokenIds
    closing_ids: TokenIds
    text: str


class ReplyCodec(Protocol):
    """What a replica knows about text (see deployments.text)."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""
        ...

    def stop_check(self, stop: Sequence[str]) -> StopCheck | None:
        """None when there is no stop string."""
        ...

    def close_reply(self, sampled: Sequence[int], stop: Sequence[str]) -> ClosedReply:
        """`sampled` ids without a final end token, cut before the first of `stop`."""
        ...


class TurnProgress:
    """One turn's, from its first event to its last. Times are of `time.perf_counter`."""

    def __init__(
        self, claim: TurnClaim, codec: ReplyCodec, turn_log: TurnLog, began_s: float
    ) -> None:
        self._claim = claim
        self._codec = codec
        self._log = turn_log
        self._began_s = began_s
        self._claimed_s = time.perf_counter()
        self._started: TurnStarted | None = None
        self._ended: TurnEnded | None = None
        self._sampled = list(claim.sampled)
        if self._sampled:
            # Stored long ago: nobody needs to wait for the cache to be rebuilt.
            self._log.accept(claim.accepted(claim.cold_recovery))
            self._log.show(self._visible(self._sampled)[len(self._log) :])

    @property
    def has_new_tokens(self) -> bool:
        """Whether this replica has sampled any."""
        return len(self._sampled) > len(self._claim.sampled)

    def end(self, reason: FinishReason) -> None:
        """The turn needs no engine: it has ended already."""
        self._started = TurnStarted("none", 0, 0)
        self._ended = TurnEnded(reason, 0)

    def take(self, events: Sequence[LaneEvent]) -> TurnEnded | Ending | None:
        """Show what these events bring, all their tokens at once; the end if it is among them."""
        end: TurnEnded | Ending | None = None
        fresh: list[TokenSampled] = []
        for event in events:
            match event:
                case TurnStarted():
                    self._started = event
                    self._log.accept(self._claim.accepted(event.recovery))
                case TokenSampled():
                    self._sampled.append(event.token_id)
                    if self._visible([event.token_id]):
                        fresh.append(event)
                case TurnEnded(reason="cancelled"):
                    end = HANDED_OVER
                case TurnEnded():
                    self._ended = end = event
                case TurnError():
                    name = self._claim.call.conversation_id
                    log.error("turn of %s failed: %s", name, event.message)
                    end = ENGINE_DEAD if event.fatal else FAILED
                case ClaimLost():
                    end = lost_claim(event.error, self._claim.call.conversation_id)
        if fresh:
            pairs = [(event.logprob, event.top) for event in fresh if event.logprob is not None]
            wanted = self._claim.call.sampling.logprobs
            self._log.show([event.token_id for event in fresh], pairs if wanted else ())
        return end

    def outcome(self) -> Outcome:
        """Raises TurnStopped unless the turn was started and has ended."""
        started, ended, claim = self._started, self._ended, self._claim
        if started is None or ended is None:
            raise refused("internal_error", "The engine ended a turn that it had not started.")
        call, record = claim.call, claim.ownership.conversation
        reply = self._codec.close_reply(self._sampled, call.stop)
        committed_ids = np.concatenate([reply.output_ids, reply.closing_ids]).astype(np.int32)
        context = claim.base_tokens + len(claim.input_ids)
        usage = TurnUsage(
            input_tokens=len(claim.input_ids),
            output_tokens=len(self._sampled),
            context_tokens=claim.base_tokens,
            cached_tokens=started.cached_tokens,
            prefill_tokens=started.prefill_tokens,
            evicted_tokens=claim.window.num_slid(context + len(committed_ids)),
            recovery=started.recovery,
        )
        result = {
            "finish_reason": ended.reason,
            "usage": dataclasses.asdict(usage),
            "completion_id": call.completion_id,
            "created_s": call.created_s,
        }
        commit = TurnCommit(
            conversation_id=call.conversation_id,
            tenant=call.tenant,
            fence=claim.ownership.fence,
            output_ids=committed_ids,
            head=chain_head(record.head, claim.input_ids, committed_ids),
            history=history_hash(call.history, "assistant", reply.text),
            messages=(*call.messages, Message("assistant", reply.text)),
            result=result,
            reply_tokens=len(reply.output_ids),
        )
        cached = context + _common_prefix(self._sampled, committed_ids)
        timings = {"begin_s": self._claimed_s - self._began_s, **ended.timings}
        return Outcome(
            commit, cached, reply.output_ids, usage, timings, ended.reason, self._began_s
        )

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        """Without the end token, which is no part of the reply."""
        if self._claim.call.ignore_eos:
            return list(token_ids)
        return [token_id for token_id in token_ids if token_id not in self._codec.eos_ids]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A turn ready to be committed. The first `cached_tokens` of the conversation's log as committed
    may be in the slot."""

    commit: TurnCommit
    cached_tokens: int
    output_ids: TokenIds
    usage: TurnUsage
    timings: dict[str, float]
    finish_reason: FinishReason
    began_s: float

    def done(self, committed: Conversation, commit_s: float) -> TurnDone:
        """The last item; `commit_s` is what the store took."""
        turn_s = time.perf_counter() - self.began_s
        return TurnDone(
            turn=committed.turn,
            head=committed.head,
            finish_reason=self.finish_reason,
            output_ids=self.output_ids,
            usage=self.usage,
            timings={**self.timings, "commit_s": commit_s, "turn_s": turn_s},
            record=committed,
        )


def _common_prefix(left: Sequence[int], right: TokenIds) -> int:
    pairs = zip(left, right.tolist(), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
