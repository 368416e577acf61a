"""HTTP bodies and queries in, JSON out; all errors in OpenAI's shape."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.errors import ErrorInfo
from deployments.strict_json import decode_json, refuse, shown

_DRAIN_FACTOR = 4


async def json_body(request: Request, limit: int) -> object:
    """The body as Python values, not yet checked. Raises ServiceError, ClientDisconnect."""
    _check_content_type(request)
    return decode_json(await _read(request, limit), limit)


async def _read(request: Request, limit: int) -> bytes:
    """The body. Some of a body that is too large is still read, or its sender sees no answer."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > _DRAIN_FACTOR * limit:
            break
    if size > limit:
        refuse("request_too_large", f"The body has more than {limit} bytes.")
    return b"".join(parts)


def _check_content_type(request: Request) -> None:
    kind, *parameters = request.headers.get("content-type", "").lower().split(";")
    if kind.strip() != "application/json":
        message = "Send JSON with the header `Content-Type: application/json`."
        refuse("unsupported_media_type", message)
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8"):
            refuse("unsupported_media_type", "The charset must be utf-8.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        refuse("unsupported_media_type", "Send the body without Content-Encoding.")


def query_of(request: Request, *known: str) -> dict[str, str]:
    """The query's parameters, each of `known` at most once. Raises ServiceError."""
    values: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            refuse("unknown_field", f"The parameter {shown(name)!r} is not known.", shown(name))
        if name in values:
            refuse("duplicate_key", "The parameter is given twice.", name)
        values[name] = value
    return values


def count_of(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """An integer parameter from `low` to `high`. Raises ServiceError."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        refuse("invalid_type", "Expected an integer.", name)
    if not low <= int(text) <= high:
        refuse("invalid_value", f"Must be from {low} to {high}.", name)
    return int(text)


def dump_json(value: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def json_response(
    value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON body as UTF-8."""
    return Response(dump_json(value), status, headers, media_type="application/json")


def error_response(info: ErrorInfo) -> Response:
    """An error of the table. Only errors with Retry-After are worth repeating, and say so to the
    official clients, which otherwise repeat every 409 and 5xx."""
    retry_after_s = info.retry_after_s or info.kind.retry_after_s
    headers = {"X-Should-Retry": "false" if retry_after_s is None else "true"}
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if info.kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(info.body(), info.kind.status, headers)


def internal_error_info(reference: str) -> ErrorInfo:
    """A fault of ours; the log has it under `reference`."""
    message = f"Something failed inside the service; its log has it under {reference}."
    return ErrorInfo("internal_error", message)
