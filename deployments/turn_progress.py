"""What a running turn has produced: engine events in, items for the client and the commit out."""

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
from deployments.errors import ErrorInfo, ServiceError
from deployments.store_errors import store_error_info
from deployments.turn_call import TurnAccepted, TurnDone, TurnItem, TurnTokens, TurnUsage
from deployments.turn_claim import ClaimLost, TurnClaim
from engine.turn import StopCheck, TokenSampled, TurnEnded, TurnError, TurnEvent, TurnStarted

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

    def __init__(self, claim: TurnClaim, codec: ReplyCodec, began_s: float) -> None:
        self._claim = claim
        self._codec = codec
        self._began_s = began_s
        self._claimed_s = time.perf_counter()
        self._started: TurnStarted | None = None
        self._ended: TurnEnded | None = None
        self._sampled: list[int] = []
        self._shown = 0

    @property
    def has_ended(self) -> bool:
        return self._ended is not None

    def read(self, events: Sequence[TurnEvent | ClaimLost]) -> list[TurnItem]:
        """The items that these events make, all their tokens in one. Raises ServiceError."""
        items: list[TurnItem] = []
        fresh: list[TokenSampled] = []
        call = self._claim.call
        for event in events:
            match event:
                case TurnStarted():
                    self._started = event
                    items.append(
                        TurnAccepted(self._claim.turn, self._claim.replica, event.recovery)
                    )
                case TokenSampled():
                    self._sampled.append(event.token_id)
                    if call.ignore_eos or event.token_id not in self._codec.eos_ids:
                        fresh.append(event)
                case TurnEnded(reason="cancelled"):
                    raise _refused("replica_lost", "The replica is stopping; send the turn again.")
                case TurnEnded():
                    self._ended = event
                case TurnError():
                    log.error("turn of %s failed: %s", call.conversation_id, event.message)
                    code = "replica_lost" if event.fatal else "turn_failed"
                    raise _refused(code, "The engine failed; nothing of the turn was committed.")
                case ClaimLost():
                    raise ServiceError(store_error_info(event.error, call.conversation_id))
        if fresh:
            items.append(_tokens(fresh, self._shown, call.sampling.logprobs))
            self._shown += len(fresh)
        return items

    def outcome(self) -> Outcome:
        """Raises ServiceError unless the turn was started and has ended."""
        started, ended, claim = self._started, self._ended, self._claim
        if started is None or ended is None:
            raise _refused("internal_error", "The engine ended a turn that it had not started.")
        call, record = claim.call, claim.ownership.conversation
        reply = self._codec.close_reply(self._sampled, call.stop)
        committed_ids = np.concatenate([reply.output_ids, reply.closing_ids]).astype(np.int32)
        context = claim.base_tokens + len(call.input_ids)
        usage = TurnUsage(
            input_tokens=len(call.input_ids),
            output_tokens=len(self._sampled),
            context_tokens=claim.base_tokens,
            cached_tokens=started.cached_tokens,
            prefill_tokens=started.prefill_tokens,
            evicted_tokens=claim.window.num_slid(context + len(committed_ids)),
            recovery=started.recovery,
        )
        commit = TurnCommit(
            conversation_id=call.conversation_id,
            tenant=call.tenant,
            fence=claim.ownership.fence,
            output_ids=committed_ids,
            head=chain_head(record.head, call.input_ids, committed_ids),
            history=history_hash(call.history, "assistant", reply.text),
            messages=(*call.messages, Message("assistant", reply.text)),
            result={"finish_reason": ended.reason, "usage": dataclasses.asdict(usage)},
        )
        cached = context + _common_prefix(self._sampled, committed_ids)
        timings = {"begin_s": self._claimed_s - self._began_s, **ended.timings}
        return Outcome(commit, cached, reply.output_ids, usage, timings, ended, self._began_s)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A turn ready to be committed. The first `cached_tokens` of the conversation's log as committed
    may be in the slot."""

    commit: TurnCommit
    cached_tokens: int
    output_ids: TokenIds
    usage: TurnUsage
    timings: dict[str, float]
    ended: TurnEnded
    began_s: float

    def done(self, committed: Conversation, commit_s: float) -> TurnDone:
        """The last item; `commit_s` is what the store took."""
        turn_s = time.perf_counter() - self.began_s
        return TurnDone(
            turn=committed.turn,
            head=committed.head,
            finish_reason=self.ended.reason,
            output_ids=self.output_ids,
            usage=self.usage,
            timings={**self.timings, "commit_s": commit_s, "turn_s": turn_s},
        )


def _refused(code: str, message: str) -> ServiceError:
    return ServiceError(ErrorInfo(code, message))


def _tokens(events: Sequence[TokenSampled], first: int, logprobs: bool) -> TurnTokens:
    pairs = [(event.logprob, event.top) for event in events if event.logprob is not None]
    return TurnTokens(
        k=first,
        token_ids=tuple(event.token_id for event in events),
        logprobs=tuple(pairs) if logprobs else (),
    )


def _common_prefix(left: Sequence[int], right: TokenIds) -> int:
    pairs = zip(left, right.tolist(), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
