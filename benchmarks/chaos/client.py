"""A client over HTTP that logs every byte and never gives a turn up easily.

It sends each turn under an Idempotency-Key. When the connection or the stream breaks, or an error
comes that is worth repeating, it sends the same again, with the id of the last event it has seen.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import httpx

from benchmarks.chaos.oracle import Asked

Json = dict[str, Any]
Ending = Literal["done", "error", "cut", "refused", "unreachable"]

PATH = "/v1/chat/completions"
FINAL_ERRORS = frozenset(
    {"turn_quarantined", "idempotency_key_reused", "turn_conflict", "model_changed", "not_found"}
    | {"conversation_not_found", "invalid_value", "unknown_field", "invalid_type"}
)
PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
CONNECT_S = 5.0


@dataclass(slots=True)
class Attempt:
    """One HTTP request of a turn: every piece of its body as it came, with the time."""

    started_s: float
    last_event_id: str | None = None
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ending: Ending = "cut"
    error: str = ""
    detail: str = ""


@dataclass(slots=True)
class TurnLog:
    """All that one turn showed its client. `texts` are the times and pieces of content."""

    asked: Asked
    key: str
    started_s: float
    ended_s: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    texts: list[tuple[float, str]] = field(default_factory=list)
    event_ids: list[tuple[str, int]] = field(default_factory=list)
    """The ids of events as they came, each with the number of characters shown by then."""
    finish_reason: str | None = None
    turn: int = 0
    etag: str = ""
    usage: Json = field(default_factory=dict)
    error: str = ""

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.texts)

    @property
    def num_chars(self) -> int:
        return sum(len(text) for _, text in self.texts)

    @property
    def is_done(self) -> bool:
        """Whether the client saw the turn to its end."""
        return self.finish_reason is not None and self.attempts[-1].ending == "done"

    def silences(self) -> list[tuple[float, float]]:
        """Every interval without content, as (start, length), from sending to the end, seconds."""
        times = [self.started_s, *(at for at, _ in self.texts), self.ended_s]
        return [(a, b - a) for a, b in pairwise(times)]


class SseReader:
    """Bytes in, (id, data) of whole server-sent events out; half an event stays inside."""

    def __init__(self) -> None:
        self._rest = b""
        self._id = ""

    def push(self, data: bytes) -> list[tuple[str, str]]:
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        events = []
        for block in blocks:
            lines = [line.partition(b":") for line in block.split(b"\n")]
            values = {name: value.removeprefix(b" ").decode() for name, _, value in lines}
            self._id = values.get(b"id", self._id)
            if b"data" in values:
                events.append((self._id, values[b"data"]))
        return events


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """`resumes` off is a client that sends each turn once. A turn is given up after `patience_s`;
    a stream that is silent for `silence_s` is taken for broken."""

    base_url: str
    patience_s: float = 90.0
    silence_s: float = 20.0
    resumes: bool = True
    sends_key: bool = True
    model: str = "toy"


class ChaosClient:
    """One conversation. `on_text` is called when a turn starts and after every piece of its content."""

    def __init__(self, options: ClientOptions, on_text: Callable[[ChaosClient], None]) -> None:
        self.options = options
        self._on_text = on_text
        self.conversation_id = ""
        self.turns: list[TurnLog] = []

    @property
    def live(self) -> TurnLog | None:
        """The turn that is running."""
        return self.turns[-1] if self.turns and not self.turns[-1].ended_s else None

    async def create(self) -> None:
        """Make the conversation. Raises httpx.HTTPError."""
        async with self._http() as http:
            response = await http.post("/v1/conversations", json={})
            response.raise_for_status()
            self.conversation_id = response.json()["id"]

    async def say(self, asked: Asked) -> TurnLog:
        """One turn, through whatever happens; its log says how it ended."""
        log = TurnLog(asked, secrets.token_hex(8), time.monotonic())
        self.turns.append(log)
        self._on_text(self)
        deadline_s = log.started_s + self.options.patience_s
        pause_s = PAUSE_S
        while True:
            attempt = Attempt(time.monotonic(), log.event_ids[-1][0] if log.event_ids else None)
            log.attempts.append(attempt)
            shown = log.num_chars
            await self._attempt(log, attempt)
            if attempt.ending == "done" or self._is_over(attempt, deadline_s):
                break
            pause_s = PAUSE_S if log.num_chars > shown else min(2 * pause_s, MAX_PAUSE_S)
            await asyncio.sleep(pause_s)
        log.error = "" if attempt.ending == "done" else attempt.error or attempt.ending
        log.ended_s = time.monotonic()
        return log

    def _is_over(self, attempt: Attempt, deadline_s: float) -> bool:
        if attempt.error in FINAL_ERRORS or not self.options.resumes:
            return True
        return time.monotonic() > deadline_s

    async def _attempt(self, log: TurnLog, attempt: Attempt) -> None:
        headers = {"Idempotency-Key": log.key} if self.options.sends_key else {}
        if attempt.last_event_id is not None:
            headers["Last-Event-ID"] = attempt.last_event_id
        try:
            async with (
                self._http() as http,
                http.stream("POST", PATH, json=self._body(log.asked), headers=headers) as response,
            ):
                attempt.status = response.status_code
                if response.status_code != 200:
                    body = await response.aread()
                    attempt.pieces.append((time.monotonic(), body))
                    attempt.ending = "refused"
                    attempt.error, attempt.detail = _error_of(body)
                    return
                await self._read(response, log, attempt)
        except httpx.ConnectError as error:
            attempt.ending, attempt.detail = "unreachable", repr(error)
        except httpx.HTTPError as error:
            # The end of the stream came before its [DONE].
            attempt.detail = repr(error)

    async def _read(self, response: httpx.Response, log: TurnLog, attempt: Attempt) -> None:
        reader = SseReader()
        async for piece in response.aiter_raw():
            now_s = time.monotonic()
            attempt.pieces.append((now_s, piece))
            for event_id, data in reader.push(piece):
                if data == "[DONE]":
                    attempt.ending = "done"
                    return
                self._take(json.loads(data), event_id, (log, attempt), now_s)
                if attempt.ending == "error":
                    return

    def _take(
        self, event: Json, event_id: str, logs: tuple[TurnLog, Attempt], now_s: float
    ) -> None:
        log, attempt = logs
        if "error" in event:
            attempt.ending = "error"
            attempt.error, attempt.detail = _error_of(json.dumps(event).encode())
            return
        conversation = event.get("conversation") or {}
        log.turn = conversation.get("turn", log.turn)
        log.etag = conversation.get("etag", log.etag)
        log.usage = event.get("usage") or log.usage
        text = ""
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            log.finish_reason = choice["finish_reason"] or log.finish_reason
        if text:
            log.texts.append((now_s, text))
        if event_id:
            log.event_ids.append((event_id, log.num_chars))
        if text:
            self._on_text(self)

    def _body(self, asked: Asked) -> Json:
        return {
            "model": self.options.model,
            "conversation": self.conversation_id,
            "messages": [{"role": "user", "content": asked.text}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "seed": asked.seed,
            **({"stop": list(asked.stop)} if asked.stop else {}),
        }

    def _http(self) -> httpx.AsyncClient:
        # A connection of its own for every request: none outlives a proxy.
        timeout = httpx.Timeout(self.options.silence_s, connect=CONNECT_S)
        return httpx.AsyncClient(base_url=self.options.base_url, timeout=timeout)


def _error_of(body: bytes) -> tuple[str, str]:
    try:
        error = json.loads(body)["error"]
        return str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return "no_openai_error", body[:200].decode("utf-8", "replace")
