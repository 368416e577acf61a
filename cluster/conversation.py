"""What a conversation is to the control plane: frozen records of ids and counts, and the hash chain."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]

CONVERSATION_ID = re.compile(r"conv_[0-9a-f]{32}\Z")
GENESIS = "0" * 64


def new_conversation_id() -> str:
    """`conv_` and 128 random bits in hex."""
    return f"conv_{secrets.token_hex(16)}"


def new_nonce() -> str:
    """128 random bits in hex: tells one claim of a turn from every other, also from its own retry."""
    return secrets.token_hex(16)


def chain_head(previous: str, input_ids: TokenIds, output_ids: TokenIds) -> str:
    """h_t = SHA-256(h_{t-1} || input ids || output ids), hex; ids as little-endian int32.

    Both id lists are preceded by their length, so that no two turns share a preimage.
    """
    digest = hashlib.sha256(bytes.fromhex(previous))
    for ids in (input_ids, output_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def history_hash(previous: str, role: str, content: str) -> str:
    """Hash of a transcript that ends in this message, from the hash of the one before it, hex.

    The key by which a client that resends its whole history is matched to its conversation.
    """
    canonical = json.dumps([previous, role, content], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of the transcript. Display only: the token ids are the truth."""

    role: str
    content: str

    def encode(self) -> bytes:
        """Stored form: a JSON pair. Lone surrogates survive the round trip."""
        pair = json.dumps([self.role, self.content], ensure_ascii=False, separators=(",", ":"))
        return pair.encode("utf-8", "surrogatepass")

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """Inverse of `encode`."""
        role, content = json.loads(data.decode("utf-8", "surrogatepass"))
        return cls(role, content)


@dataclass(frozen=True, slots=True)
class ReplayLog:
    """The token ids that rebuild a cache: `sink_ids` at 0.., `recent_ids` ending at token_count - 1."""

    sink_ids: TokenIds
    recent_ids: TokenIds
    token_count: int

    def advanced(self, ids: TokenIds, sink_tokens: int, recent_tokens: int) -> ReplayLog:
        """The log after `ids`: the first `sink_tokens` of all are sinks, of the rest the last
        `recent_tokens` are kept."""
        missing = max(0, sink_tokens - len(self.sink_ids))
        recent = np.concatenate([self.recent_ids, ids[missing:]])
        return ReplayLog(
            sink_ids=np.concatenate([self.sink_ids, ids[:missing]]),
            recent_ids=recent[max(0, len(recent) - recent_tokens) :],
            token_count=self.token_count + len(ids),
        )

    @property
    def recent_start(self) -> int:
        """token_index of the first recent id."""
        return self.token_count - len(self.recent_ids)

    @property
    def is_whole(self) -> bool:
        """Whether no token lies between the sinks and the recent ids: replay is then exact."""
        return self.recent_start <= len(self.sink_ids)

    def holds(self, token_index: int) -> bool:
        """Whether all tokens from `token_index` on are in the log; none is below 0."""
        return token_index >= (0 if self.is_whole else self.recent_start)

    def ids_at(self, start: int, length: int) -> TokenIds | None:
        """The tokens `start`, `start` + 1, ..., int32, if all of them are in the log."""
        if not self.holds(start) or start + length > self.token_count:
            return None
        ids, first = self.recent_ids, self.recent_start
        if self.is_whole:
            ids, first = np.concatenate([self.sink_ids, self.recent_ids]), 0
        return ids[start - first : start - first + length]


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of ownership: the store accepts writes only from the latest one."""

    epoch: int
    nonce: str


@dataclass(frozen=True, slots=True)
class NewConversation:
    """What `create` needs. S = `sink_tokens` and R = `window_tokens` are fixed for life.

    Raises ValueError when `window_tokens` or `replay_windows` is below 1 or `sink_tokens` below 0.
    """

    conversation_id: str
    tenant: str
    fingerprint: str
    sink_tokens: int
    window_tokens: int
    replay_windows: int
    metadata: dict[str, str] = field(default_factory=dict)
    history: str = GENESIS
    messages: tuple[Message, ...] = ()
    """The pinned prefix as messages (system), already part of `history`; goes to the transcript."""

    def __post_init__(self) -> None:
        if self.window_tokens < 1 or self.replay_windows < 1 or self.sink_tokens < 0:
            raise ValueError(
                f"sink_tokens {self.sink_tokens}, window_tokens {self.window_tokens}, "
                f"replay_windows {self.replay_windows}: need at least 0, 1 and 1"
            )

    @property
    def recent_tokens(self) -> int:
        """The most ids past the sinks that are kept for replay."""
        return self.replay_windows * self.window_tokens


@dataclass(frozen=True, slots=True)
class Conversation:
    """The stored record, without its token ids.

    `owner` is the replica that runs the turn, or else the one that committed the last turn (its slot
    is the one that may be resident). `running` is false once the lease has run out. `result` is what
    the last commit left; `num_messages` the transcript has had so far, dropped ones included.
    """

    conversation_id: str
    tenant: str
    fingerprint: str
    sink_tokens: int
    window_tokens: int
    turn: int
    token_count: int
    head: str
    history: str
    owner: str
    epoch: int
    running: bool
    created_s: float
    updated_s: float
    metadata: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)
    replay_windows: int = 0
    num_messages: int = 0


@dataclass(frozen=True, slots=True)
class BeginTurn:
    """A claim to run a turn. `expect_turn` / `expect_head`, when given, must match the record.

    `nonce` names the claim: sending the same claim again returns the same ownership. `key` names the
    turn, whoever claims it: the client's idempotency key, or one made for the request ("" means the
    nonce). `request_hash` tells one request from another under the same key. `steal` says that the
    owner of a running turn of this key is gone: it is taken over before its lease ends. `blameless`: it
    was not seen dead, but let go of the turn, or went silent.
    """

    conversation_id: str
    tenant: str
    replica: str
    input_ids: TokenIds
    fingerprint: str
    lease_s: float
    expect_turn: int | None = None
    expect_head: str | None = None
    nonce: str = field(default_factory=new_nonce)
    key: str = ""
    request_hash: str = ""
    steal: bool = False
    blameless: bool = False


@dataclass(frozen=True, slots=True)
class Ownership:
    """STARTED or RESUME: the fence, the record as of now, and how to rebuild its cache.

    `replay` ends where the committed conversation ends: it does not include this turn's `input_ids`.
    `output_ids` are what earlier owners of the turn have stored, int32; `attempt` is 0 for a new turn
    and counts its takeovers since it last stored a token.
    """

    fence: Fence
    conversation: Conversation
    replay: ReplayLog
    input_ids: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))
    output_ids: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))
    attempt: int = 0
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class CommittedTurn:
    """DONE: the turn of this key was committed. `reply_ids` are its output without the closing ids,
    int32; `head` and `turn` are those right after it, `result` is what its commit left."""

    turn: int
    head: str
    reply_ids: TokenIds
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BusyTurn:
    """BUSY: the turn of this key is running at `owner`, whose lease ends in `retry_after_s` unless
    renewed. `turn` is the number it will have once committed, `output_ids` what it has stored so far,
    int32."""

    owner: str
    turn: int
    output_ids: TokenIds
    retry_after_s: float


Begun = Ownership | CommittedTurn | BusyTurn


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Output tokens `k`, `k` + 1, ... of a running turn, int32; none of them just renews the lease."""

    conversation_id: str
    tenant: str
    fence: Fence
    k: int
    token_ids: TokenIds
    lease_s: float


@dataclass(frozen=True, slots=True)
class TurnCommit:
    """The end of a turn. `messages` are appended to the transcript; `result` is small JSON (usage...).

    The first `reply_tokens` of `output_ids` are the reply, the rest closes it (None: all are reply).
    """

    conversation_id: str
    tenant: str
    fence: Fence
    output_ids: TokenIds
    head: str
    history: str
    messages: tuple[Message, ...]
    result: dict[str, Any] = field(default_factory=dict)
    reply_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Rebase:
    """The same conversation for another model, tokenizer or window: turn, hash and transcript stay,
    token ids go; the next turn's input is the transcript, tokenised anew."""

    conversation_id: str
    tenant: str
    expect_head: str
    fingerprint: str
    sink_tokens: int
    window_tokens: int
    replay_windows: int


@dataclass(frozen=True, slots=True)
class RememberedTurn:
    """What is kept of a turn under its key: a committed one, or one that was given up (`quarantined`).

    `turn` and `head` are those right after it; its reply, `reply_ids`, starts at token_index
    `reply_start`.
    """

    key: str
    request_hash: str
    turn: int
    head: str
    reply_start: int
    reply_ids: TokenIds
    result: dict[str, Any]
    quarantined: bool = False


@dataclass(frozen=True, slots=True)
class RunningSnapshot:
    """A running turn as its owner knows it: what `begin` stored and every acknowledged checkpoint.

    `key` is never empty: it is the nonce where the claim had none. The fence's epoch is the
    conversation's.
    """

    nonce: str
    key: str
    request_hash: str
    input_ids: TokenIds
    output_ids: TokenIds
    lease_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an owner knows in RAM, to bring back a store that lost its latest writes (`repair`).

    `conversation` is the record as the owner saw it last: of a running turn as `begin` answered it, else
    as `commit` did. `messages` are the transcript's last ones, the first of them at position
    `first_message`. `results` are the last turns it committed, newest first, so that a request sent
    again finds its reply also when the store has forgotten it.
    """

    conversation: Conversation
    replay: ReplayLog
    replay_windows: int
    messages: tuple[Message, ...]
    first_message: int
    running: RunningSnapshot | None = None
    results: tuple[RememberedTurn, ...] = ()
