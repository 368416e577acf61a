"""What the ingress asks of a replica and what comes back: the seam between the two deployments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.conversation import Conversation, Message, TokenIds
from deployments.errors import ErrorInfo
from engine.protocol import FinishReason
from engine.sampling import SamplingParams, TokenLogprob
from engine.turn import Recovery

OnDisconnect = Literal["cancel", "finish"]


@dataclass(frozen=True, slots=True)
class TurnCall:
    """One turn of a conversation that exists in the store.

    `input_ids` is the template applied to this turn's new messages, up to where the reply starts.
    `history` is the transcript hash including `messages`. `owner_hint` is the owner in the record the
    ingress has just read ("" for none); only the router looks at it.

    `key` names the turn across calls and `request_hash` what it asks for (see BeginTurn). A call with
    the key of a running turn joins it; of one whose owner died (`steal` says that it did), resumes it;
    of a committed one, gets its TurnDone again. `blameless`: that owner was not seen dead, but let go of
    the turn, or went silent. `shown_ids` are output tokens that the client has been
    shown already, int32: they are part of the reply, and tokens are sent from there on. `on_disconnect`
    says what closing the generator does to a turn that nobody else has joined.

    `completion_id` and `created_s` (Unix time) name the reply: the replica keeps those of the call that
    started the turn in the commit's `result`, under these names, and every TurnAccepted carries them, so
    that all answers to one key are the same. `avoid` is a replica that was just seen dead ("" for none);
    only the router looks at it.
    """

    tenant: str
    conversation_id: str
    input_ids: TokenIds
    messages: tuple[Message, ...]
    history: str
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    expect_turn: int | None = None
    expect_head: str | None = None
    owner_hint: str = ""
    timeout_s: float = 600.0
    key: str = ""
    request_hash: str = ""
    steal: bool = False
    blameless: bool = False
    shown_ids: tuple[int, ...] = ()
    on_disconnect: OnDisconnect = "cancel"
    completion_id: str = ""
    created_s: int = 0
    avoid: str = ""


@dataclass(frozen=True, slots=True)
class FollowCall:
    """Read the turn that `owner_hint` is running of this conversation, from its first token, whatever
    its key: the same items as of a joined TurnCall. Claims nothing; closing it cancels nothing. Refused
    (`replica_lost`) by a replica that runs no turn of it."""

    tenant: str
    conversation_id: str
    owner_hint: str
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class TurnAccepted:
    """First item: the replica owns the conversation and the turn is in its engine, or was committed.

    `completion_id`, `created_s` and `stop` are those of the call that started the turn ("", 0 and none
    if that is not known here).
    """

    turn: int
    replica: str
    recovery: Recovery
    completion_id: str = ""
    created_s: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """Tokens `k`, `k` + 1, ... of the reply; `logprobs` (token, alternatives) only if asked for."""

    k: int
    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class TurnUsage:
    """Counts in tokens. `input_tokens` are this turn's own; `context_tokens` is the age of the
    conversation before it; `cached_tokens` of that context, at most the capacity, were resident;
    `prefill_tokens` were computed before the first output token; `evicted_tokens` have slid out of the
    window since the conversation began."""

    input_tokens: int
    output_tokens: int
    context_tokens: int
    cached_tokens: int
    prefill_tokens: int
    evicted_tokens: int
    recovery: Recovery


@dataclass(frozen=True, slots=True)
class TurnDone:
    """Last item of a committed turn. `output_ids` is the reply as committed, without the closing ids;
    `record` the conversation as this commit left it, None for a commit of earlier."""

    turn: int
    head: str
    finish_reason: FinishReason
    output_ids: TokenIds
    usage: TurnUsage
    timings: dict[str, float] = field(default_factory=dict)
    record: Conversation | None = None


@dataclass(frozen=True, slots=True)
class TurnRefused:
    """Last item of a turn that this call did not see committed. `resumable`: the turn and its tokens so
    far are kept in the store; the same call with `steal` goes on with it at another replica. `fatal`: the
    engine died, perhaps of this turn."""

    error: ErrorInfo
    resumable: bool = False
    fatal: bool = False


TurnItem = TurnAccepted | TurnTokens | TurnDone | TurnRefused


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """Figures of one replica by metric name ([a-z_]+), e.g. resident_conversations, free_slots."""

    replica: str
    values: dict[str, float]
