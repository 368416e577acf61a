"""A turn as the engine loop sees it: token ids in, token events out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from engine.protocol import FinishReason, TokenIds
from engine.sampling import SamplingParams, TokenLogprob
from engine.window import SinkWindow

Recovery = Literal["none", "exact", "replay", "restart"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens to prefill: `tokens` at token_index `start`, `start` + 1, ... int32."""

    start: int
    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class Prefill:
    """What to run before the first sampled token, in order; the last segment ends with the input.

    `recovery` says how the cache was come by (`restart`: the model changed, and the input is the
    transcript tokenised anew); `window_start` is the oldest window token_index that is
    present (see `engine.protocol.Row`). Where the first segment goes on after the resident tokens, the
    loop knows better and uses the slot's own.
    """

    segments: tuple[Segment, ...]
    window_start: int
    recovery: Recovery


class StopCheck(Protocol):
    """Watches the text of the output. Called on the engine thread, once per sampled token, in order."""

    def push(self, token_id: int) -> bool:
        """Whether a stop string is now complete."""
        ...


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn. `prefill(resident_length)` is called on the engine thread: it gets the number of
    tokens that a valid resident slot holds (None when cold) and says what to run.

    A resident slot is valid when it was settled under the same `head` (the conversation's hash).
    `retained` is what penalties count before this turn's output: retained ids incl. this input, int32.
    `output_ids` were sampled for this turn before, by an engine that is gone, int32: the segments end
    with them, penalties count them, `stop` has seen them, `max_tokens` includes them, and the next token
    is number `len(output_ids)`.
    """

    conversation_id: str
    turn: int
    head: str
    window: SinkWindow
    token_count: int
    input_tokens: int
    prefill: Callable[[int | None], Prefill]
    retained: TokenIds
    sampling: SamplingParams
    max_tokens: int
    eos_ids: frozenset[int]
    stop: StopCheck | None = None
    output_ids: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The turn has its kv_slot. `cached_tokens` of its context were resident in sinks and window,
    `prefill_tokens` will run."""

    recovery: Recovery
    cached_tokens: int
    prefill_tokens: int


@dataclass(frozen=True, slots=True)
class TokenSampled:
    """Output token number `k` of the turn."""

    k: int
    token_id: int
    logprob: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """No more tokens. The slot stays reserved (dirty) until `EngineLoop.settle` or `.discard`.

    `cached_length` tokens of the conversation are in the slot (the last sampled one is not; 0 if the
    turn was cancelled before it had a slot). `timings` in seconds: `queue_s` until it had one,
    `prefill_s` from there to the first output token, `ttft_s` their sum, `decode_s` from there to the
    end; those it never reached are missing.
    """

    reason: FinishReason
    cached_length: int
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TurnError:
    """The turn cannot go on and its slot is gone. `fatal` means the whole engine is."""

    message: str
    fatal: bool


TurnEvent = TurnStarted | TokenSampled | TurnEnded | TurnError
