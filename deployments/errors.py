"""The one error table: every way a request can fail, the same on HTTP and on handles.

A handle raises `ServiceError`; HTTP renders it in OpenAI's shape:
`{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """HTTP status and OpenAI error type of a code; `retry_after_s` becomes the Retry-After header."""

    status: int
    type: str
    retry_after_s: float | None = None


INVALID = "invalid_request_error"

TABLE: dict[str, ErrorKind] = {
    "invalid_json": ErrorKind(400, INVALID),
    "duplicate_key": ErrorKind(400, INVALID),
    "invalid_encoding": ErrorKind(400, INVALID),
    "missing_field": ErrorKind(400, INVALID),
    "unknown_field": ErrorKind(400, INVALID),
    "invalid_type": ErrorKind(400, INVALID),
    "invalid_value": ErrorKind(400, INVALID),
    "unsupported_value": ErrorKind(400, INVALID),
    "input_too_long": ErrorKind(400, INVALID),
    "system_prompt_too_long": ErrorKind(400, INVALID),
    "invalid_conversation_id": ErrorKind(400, INVALID),
    "invalid_api_key": ErrorKind(401, "authentication_error"),
    "not_found": ErrorKind(404, "not_found_error"),
    "model_not_found": ErrorKind(404, "not_found_error"),
    "conversation_not_found": ErrorKind(404, "not_found_error"),
    "method_not_allowed": ErrorKind(405, INVALID),
    "conversation_busy": ErrorKind(409, "conflict_error", 1.0),
    "turn_conflict": ErrorKind(409, "conflict_error"),
    "model_changed": ErrorKind(409, "conflict_error"),
    "request_too_large": ErrorKind(413, INVALID),
    "unsupported_media_type": ErrorKind(415, INVALID),
    "idempotency_key_reused": ErrorKind(422, INVALID),
    "overloaded": ErrorKind(429, "rate_limit_error", 1.0),
    "internal_error": ErrorKind(500, "server_error"),
    "turn_failed": ErrorKind(500, "server_error"),
    "turn_quarantined": ErrorKind(500, "server_error"),
    "replica_lost": ErrorKind(503, "server_error", 1.0),
    "store_unavailable": ErrorKind(503, "server_error", 2.0),
    "store_recovering": ErrorKind(503, "server_error", 3.0),
    "not_ready": ErrorKind(503, "server_error", 5.0),
    "timeout": ErrorKind(504, "server_error"),
}


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """One failure. `param` names the field at fault ("messages[0].content"), `message` the fix."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @property
    def kind(self) -> ErrorKind:
        return TABLE[self.code]

    def body(self) -> dict[str, Any]:
        """The JSON body in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.type,
                "param": self.param,
                "code": self.code,
            }
        }


class ServiceError(Exception):
    """A failure named by the table. Survives pickling by Ray (all state is in `args`)."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info)
        self.info = info

    def __str__(self) -> str:
        where = f" ({self.info.param})" if self.info.param else ""
        return f"{self.info.code}{where}: {self.info.message}"
