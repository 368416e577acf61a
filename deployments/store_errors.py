"""Errors of the conversation store as errors of the table."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator

from cluster.store import (
    Conflict,
    Fenced,
    KeyReused,
    ModelChanged,
    NotFound,
    Quarantined,
    Recovering,
    RolledBack,
    StoreError,
    TurnConflict,
    TurnTooLong,
)
from deployments.errors import ErrorInfo, ServiceError

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def store_errors(conversation_id: str = "") -> AsyncGenerator[None, None]:
    """Raises the table's error for an error of the store."""
    try:
        yield
    except StoreError as error:
        raise ServiceError(store_error_info(error, conversation_id)) from error


def store_error_info(error: StoreError, conversation_id: str = "") -> ErrorInfo:
    """What a client is told about an error of the store."""
    match error:
        case NotFound():
            message = f"There is no conversation {conversation_id}."
            return ErrorInfo("conversation_not_found", message, "conversation")
        case Conflict(retry_after_s=retry_after_s):
            message = "Another turn of this conversation is running."
            return ErrorInfo("conversation_busy", message, "conversation", retry_after_s)
        case TurnConflict(turn=turn, head=head):
            return turn_conflict_info(turn, head)
        case ModelChanged():
            return ErrorInfo("model_changed", MODEL_CHANGED, "conversation")
        case TurnTooLong(tokens=tokens, limit=limit):
            return input_too_long_info(tokens, limit)
        case KeyReused():
            return KEY_REUSED
        case Quarantined():
            return ErrorInfo("turn_quarantined", QUARANTINED, "conversation")
        case Fenced():
            return ErrorInfo("replica_lost", "Another replica has taken over the conversation.")
        case Recovering(retry_after_s=retry_after_s):
            return ErrorInfo("store_recovering", RECOVERING, None, retry_after_s)
        case RolledBack():
            return ErrorInfo("store_recovering", RECOVERING)
        case _:
            log.warning("store: %s", error)
            return ErrorInfo("store_unavailable", "The conversation store does not answer.")


MODEL_CHANGED = "The conversation was held with another model; start a new one."
QUARANTINED = "This turn has brought down every replica that ran it; it is not run again."
RECOVERING = "The conversation store has restarted and is being brought up to date."
KEY_REUSED = ErrorInfo(
    "idempotency_key_reused",
    "This idempotency key was used with another request; make a new one for every request.",
    "idempotency_key",
)


def turn_conflict_info(turn: int, head: str) -> ErrorInfo:
    """The caller's view is stale."""
    message = f'The conversation is at turn {turn}, ETag "{head}"; read it again before you go on.'
    return ErrorInfo("turn_conflict", message, "conversation")


def input_too_long_info(tokens: int, limit: int) -> ErrorInfo:
    """Too much input for one turn."""
    message = f"The input takes {tokens} tokens; one turn may bring at most {limit}."
    return ErrorInfo("input_too_long", message, "messages")
