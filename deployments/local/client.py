"""The service's own HTTP client: what `sinkserve chat`, `status` and the benchmarks speak.

ApiError
|- Unreachable     nothing answers at the URL
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

CONNECT_TIMEOUT_S = 5.0
PATIENCE_S = 30.0
_PAUSE_S = 0.2
_MAX_PAUSE_S = 2.0
_PASSING = frozenset(
    {
        "stream_cut",
        "unreachable",
        "replica_lost",
        "store_unavailable",
        "store_recovering",
        "not_ready",
    }
    | {"unknown"}
)


class ApiError(Exception):
    """The service refused. `code` is a key of `deployments.errors.TABLE`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Unreachable(ApiError):
    """Nothing answers at this URL."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(0, "unreachable", f"nothing answers at {url} ({reason})")


@dataclass(slots=True)
class Reply:
    """What one streamed turn has said so far; complete once its iterator has ended. Times in seconds.

    `text_times_s` are the arrival times of the text chunks, since the request was sent.
    """

    text: str = ""
    finish_reason: str | None = None
    conversation_id: str | None = None
    turn: int | None = None
    head: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    text_times_s: list[float] = field(default_factory=list)
    event_id: str = ""
    """Of the last event taken in: where the stream can be rejoined."""

    @property
    def ttft_s(self) -> float | None:
        return self.text_times_s[0] if self.text_times_s else None

    @property
    def sink_usage(self) -> dict[str, Any]:
        """Our own counts: evicted, prefill and context tokens, recovery."""
        extra = self.usage.get("sinkserve")
        return extra if isinstance(extra, dict) else {}

    @property
    def cached_tokens(self) -> int:
        details = self.usage.get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    def apply(self, event: dict[str, Any], elapsed_s: float) -> str:
        """Take in one SSE event and return its text. Raises ApiError."""
        if "error" in event:
            raise _error_of(500, event)
        conversation = event.get("conversation")
        if isinstance(conversation, dict):
            self.conversation_id = conversation.get("id", self.conversation_id)
            self.turn = conversation.get("turn", self.turn)
            self.head = conversation.get("etag", self.head)
        if isinstance(event.get("usage"), dict):
            self.usage = event["usage"]
        text = ""
        for choice in event.get("choices", ()):
            text += choice.get("delta", {}).get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if text:
            self.text += text
            self.text_times_s.append(elapsed_s)
        return text


class ApiClient:
    """Talks to one service. Every method raises ApiError."""

    def __init__(self, url: str, api_key: str = "", timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        # The service is named by its URL: proxies of the environment are not meant for it.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        """JSON of `GET path`."""
        return self._checked("GET", path, params=params).json()

    def text(self, path: str) -> str:
        return self._checked("GET", path).text

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of `POST path`."""
        return self._checked("POST", path, json=body).json()

    def delete(self, path: str) -> None:
        self._checked("DELETE", path)

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the service takes turns, and its `/healthz`."""
        try:
            response = self._http.get("/healthz")
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        return response.status_code == 200, _json_of(response)

    def model(self) -> str:
        """The one model that is served."""
        return str(self.get("/v1/models")["data"][0]["id"])

    def stream(self, body: dict[str, Any], reply: Reply) -> Generator[str]:
        """Run one turn, yielding its text as it comes and filling in `reply`.

        Closing the iterator closes the connection, which cancels the turn.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        started = time.perf_counter()
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code >= 400:
                    response.read()
                    raise _error_of(response.status_code, _json_of(response))
                event_id = reply.event_id
                for line in response.iter_lines():
                    name, _, value = line.partition(":")
                    if name == "id":
                        event_id = value.strip()
                    if name != "data":
                        continue
                    if value.strip() == "[DONE]":
                        return
                    text = reply.apply(json.loads(value), time.perf_counter() - started)
                    reply.event_id = event_id
                    if text:
                        yield text
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        raise ApiError(0, "stream_cut", "the reply broke off before its end")

    def patient_stream(self, body: dict[str, Any], reply: Reply) -> Generator[str]:
        """As `stream`; a turn that breaks off is asked for again under its key, from where it broke,
        for `PATIENCE_S` after the last text. The first answer must come at once."""
        body = {**body, "idempotency_key": secrets.token_hex(16), "on_disconnect": "cancel"}
        last_s, pause_s = time.monotonic(), _PAUSE_S
        while True:
            try:
                for text in self.stream(body, reply):
                    last_s, pause_s = time.monotonic(), _PAUSE_S
                    yield text
                return
            except ApiError as error:
                waited_s = time.monotonic() - last_s
                unanswered = error.code == "unreachable" and not reply.event_id
                if error.code not in _PASSING or unanswered or waited_s > PATIENCE_S:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            if reply.event_id:
                body["last_event_id"] = reply.event_id

    def _checked(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        if response.status_code >= 400:
            raise _error_of(response.status_code, _json_of(response))
        return response

    def _lost(self, error: httpx.HTTPError) -> ApiError:
        if isinstance(error, httpx.ReadTimeout):
            return ApiError(0, "timeout", f"{self.url} gave no answer in time")
        return Unreachable(self.url, str(error) or type(error).__name__)


def _json_of(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _error_of(status: int, body: dict[str, Any]) -> ApiError:
    error = body.get("error")
    if not isinstance(error, dict):
        return ApiError(status, "unknown", f"the service answered with status {status}")
    return ApiError(status, str(error.get("code")), str(error.get("message")))
