"""What names a request, its turn and its events, so that whoever asks again finds the same turn.

Everything here is a pure function of what the client sent: any ingress computes the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.strict_json import refuse

_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")
_EVENT_ID = re.compile(r"([0-9]{1,15})\.([0-9]{1,15})\Z")

_NOT_HASHED = frozenset(
    {"stream", "stream_options", "idempotency_key", "last_event_id", "on_disconnect"}
    | {"conversation", "expect_turn"}
)


@dataclass(frozen=True, slots=True)
class EventId:
    """Where a stream stands: `chars` characters of the reply of turn `turn` have been sent."""

    turn: int
    chars: int

    def __str__(self) -> str:
        return f"{self.turn}.{self.chars}"


def check_event_id(value: str, param: str) -> EventId:
    """Raises ServiceError (invalid_value) unless it is one of ours."""
    found = _EVENT_ID.match(value)
    if found is None:
        refuse("invalid_value", "Must be the id of an event of this stream, e.g. 3.120.", param)
    return EventId(int(found.group(1)), int(found.group(2)))


def check_key(value: str, param: str) -> str:
    """The idempotency key itself. Raises ServiceError (invalid_value)."""
    if _KEY.match(value) is None:
        refuse("invalid_value", "Must have 1 to 255 visible ASCII characters.", param)
    return value


def new_key() -> str:
    """For a request that brings none. Never equal to a client's: it holds a space."""
    return f"- {secrets.token_hex(16)}"


def body_hash(body: Mapping[str, Any]) -> str:
    """SHA-256 of what a request asks for, hex: its body without nulls, without how the reply is to be
    delivered and without its view of the conversation."""
    asked = {
        name: value for name, value in body.items() if value is not None and name not in _NOT_HASHED
    }
    return _digest(json.dumps(asked, sort_keys=True, ensure_ascii=True, separators=(",", ":")))


def request_hash(hashed_body: str, conversation_id: str | None) -> str:
    """Of a whole request: its body and the conversation it names, if any."""
    return _digest("request", hashed_body, conversation_id or "")


def seed_of(tenant: str, conversation_id: str, key: str) -> int:
    """64 bits for a request without a seed: a turn that is run again draws the same tokens."""
    return int(_digest("seed", tenant, conversation_id, key)[:16], 16)


def conversation_id_of(tenant: str, key: str) -> str:
    """Id of the conversation that a request under a client's key starts."""
    return f"conv_{_digest('conversation', tenant, key)[:32]}"


def completion_id_of(tenant: str, conversation_id: str, key: str) -> str:
    """Id of the reply to a key."""
    return f"chatcmpl-{_digest('completion', tenant, conversation_id, key)[:24]}"


def _digest(*parts: str) -> str:
    canonical = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
