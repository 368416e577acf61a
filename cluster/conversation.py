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


@dataclass(frozen=True, slots=True)
class ReplayLog:
    """The token ids that rebuild a cache: `sink_ids` at 0.., `recent_ids` ending at token_count - 1."""

    sink_ids: TokenIds
    recent_ids: TokenIds
    token_count: int

    @property
    def recent_start(self) -> int:
        """token_index of the first recent id."""
        return self.token_count - len(self.recent_ids)

    @property
    def is_whole(self) -> bool:
        """Whether no token lies between the sinks and the recent ids: replay is then exact."""
        return self.recent_start <= len(self.sink_ids)


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of ownership: the store accepts writes only from the latest one."""

    epoch: int
    nonce: str


@dataclass(frozen=True, slots=True)
class NewConversation:
    """What `create` needs. S = `sink_tokens` and R = `window_tokens` are fixed for life."""

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


@dataclass(frozen=True, slots=True)
class Conversation:
    """The stored record, without its token ids."""

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


@dataclass(frozen=True, slots=True)
class BeginTurn:
    """A claim to run the next turn. `expect_turn` / `expect_head`, when given, must match the record."""

    conversation_id: str
    tenant: str
    replica: str
    input_ids: TokenIds
    fingerprint: str
    lease_s: float
    expect_turn: int | None = None
    expect_head: str | None = None


@dataclass(frozen=True, slots=True)
class Ownership:
    """What a successful `begin` returns: the fence, the record as of now, and how to rebuild its cache.

    `replay` ends where the committed conversation ends: it does not include this turn's input.
    """

    fence: Fence
    conversation: Conversation
    replay: ReplayLog


@dataclass(frozen=True, slots=True)
class TurnCommit:
    """The end of a turn. `messages` are appended to the transcript; `result` is small JSON (usage...)."""

    conversation_id: str
    tenant: str
    fence: Fence
    output_ids: TokenIds
    head: str
    history: str
    messages: tuple[Message, ...]
    result: dict[str, Any] = field(default_factory=dict)
