"""A turn that a replica has accepted: its items become the objects that a client reads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from deployments import openai_reply as reply
from deployments.errors import ErrorInfo, ServiceError
from deployments.metrics import ServiceMetrics
from deployments.turn_call import (
    TurnAccepted,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
    TurnTokens,
)

log = logging.getLogger(__name__)

Json = dict[str, Any]


class EngineClient(Protocol):
    """The replicas, as the ingress sees them."""

    def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """TurnAccepted, TurnTokens..., TurnDone; or TurnRefused at any point, which is then the last.

        Closing or cancelling the generator cancels the turn. Raises ServiceError (replica_lost,
        overloaded, not_ready) when no replica can be had or the one at work is gone.
        """
        ...


class TextStream(Protocol):
    """Token ids of one reply in, text out: never half a character, never a stop string."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str:
        """What was held back and is now known to belong to the reply."""
        ...


def replica_lost_info() -> ErrorInfo:
    """Whoever loses sight of a replica cannot know how its turn ended."""
    message = (
        "The replica went away during the turn; read the conversation to see what is committed."
    )
    return ErrorInfo("replica_lost", message)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the ids of one reply become text: a fresh stream, and the bytes of single tokens."""

    text: TextStream
    token_bytes: Callable[[int], bytes]


class TurnItems:
    """The items of one turn under one deadline. Use `start`, then `next` until TurnDone, then `close`."""

    def __init__(self, items: AsyncGenerator[TurnItem, None], timeout_s: float) -> None:
        self._items = items
        self.called_s = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + timeout_s

    async def start(self) -> TurnAccepted:
        """Raises ServiceError when the turn is refused, late or cut short."""
        item = await self.next()
        if not isinstance(item, TurnAccepted):
            raise ServiceError(ErrorInfo("internal_error", "The replica skipped its acceptance."))
        return item

    async def next(self) -> TurnAccepted | TurnTokens | TurnDone:
        """Raises ServiceError when the turn is refused, late or cut short."""
        try:
            async with asyncio.timeout_at(self._deadline):
                item = await anext(self._items)
        except StopAsyncIteration:
            raise ServiceError(replica_lost_info()) from None
        except TimeoutError:
            message = "The turn took too long and was cancelled."
            raise ServiceError(ErrorInfo("timeout", message)) from None
        except (ServiceError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("the engine client failed")
            message = "The turn failed inside the service."
            raise ServiceError(ErrorInfo("internal_error", message)) from None
        if isinstance(item, TurnRefused):
            raise ServiceError(item.error)
        return item

    async def close(self) -> None:
        """Cancels the turn unless it is over; idempotent."""
        await self._items.aclose()


class OpenTurn:
    """Read it once, by `chunks` or by `completion`. Whatever happens, `close` ends the turn.

    Raises ServiceError from either for a turn that fails after it was accepted.
    """

    def __init__(
        self,
        items: TurnItems,
        head: reply.ReplyHead,
        decoding: Decoding,
        metrics: ServiceMetrics,
        on_close: Callable[[bool], None],
    ) -> None:
        self.head = head
        self._items = items
        self._decoding = decoding
        self.metrics = metrics
        self._on_close = on_close
        self._token_ids: list[int] = []
        self._logprobs: list[reply.Logprob] = []
        self._shown_logprobs = 0
        self._logprob_bytes = 0
        self._shown_bytes = 0
        self._done: TurnDone | None = None
        self._closed = False
        metrics.turn_started()

    async def chunks(self, usage: reply.StreamUsage = "none") -> AsyncGenerator[Json, None]:
        """`chat.completion.chunk` objects. The last one before the usage has the finish_reason."""
        try:
            yield self._chunk(reply.first_chunk(self.head), usage)
            async for text in self._texts():
                piece = reply.chunk(self.head, {"content": text}, self._logprobs_of(text))
                yield self._chunk(piece, usage)
            done = self._committed()
            last = reply.last_chunk(self.head, done, self._last_logprobs(done))
            yield self._chunk(last, usage)
            if usage != "none":
                yield reply.usage_chunk(self.head, done)
        finally:
            await self.close()

    async def completion(self) -> Json:
        """The whole reply as a `chat.completion`."""
        try:
            text = "".join([piece async for piece in self._texts()])
            done = self._committed()
            logprobs = self._last_logprobs(done)
            return reply.completion(self.head, done, text, logprobs)
        finally:
            await self.close()

    async def close(self) -> None:
        """Cancels the turn unless it is committed; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._items.close()
        finally:
            self.metrics.turn_ended()
            if self._done is None:
                self.metrics.turn_abandoned()
            self._on_close(self._done is not None)

    async def _texts(self) -> AsyncGenerator[str, None]:
        """Pieces of text, none empty. Sets `_done`."""
        while self._done is None:
            item = await self._items.next()
            if isinstance(item, TurnTokens):
                text = self._take(item)
            elif isinstance(item, TurnDone):
                self._done = item
                self.metrics.turn_done(item, time.monotonic() - self._items.called_s)
                text = self._decoding.text.finish()
            else:
                raise ServiceError(ErrorInfo("internal_error", "The replica accepted twice."))
            if text:
                yield text

    def _take(self, tokens: TurnTokens) -> str:
        if tokens.k != len(self._token_ids):
            raise ServiceError(ErrorInfo("internal_error", "The replica lost or repeated tokens."))
        if tokens.k == 0 and tokens.token_ids:
            self.metrics.first_token(time.monotonic() - self._items.called_s)
        self._token_ids.extend(tokens.token_ids)
        self._logprobs.extend(tokens.logprobs)
        return "".join([self._decoding.text.push(token) for token in tokens.token_ids])

    def _committed(self) -> TurnDone:
        if self._done is None or self._done.finish_reason == "cancelled":
            raise ServiceError(ErrorInfo("turn_failed", "The turn was cancelled by the service."))
        return self._done

    def _logprobs_of(self, text: str) -> Json | None:
        """Those of the tokens that are shown in full once `text` is."""
        self._shown_bytes += len(text.encode())
        end = self._shown_logprobs
        while end < len(self._logprobs):
            token_bytes = len(self._decoding.token_bytes(self._logprobs[end][0].token_id))
            if self._logprob_bytes + token_bytes > self._shown_bytes:
                break
            self._logprob_bytes += token_bytes
            end += 1
        return self._logprobs_until(end)

    def _last_logprobs(self, done: TurnDone) -> Json | None:
        """The rest, as far as the tokens were committed as sampled (a stop string cuts some)."""
        pairs = zip(done.output_ids.tolist(), self._token_ids, strict=False)
        same = [committed == sampled for committed, sampled in pairs]
        num_same = same.index(False) if False in same else len(same)
        return self._logprobs_until(min(num_same, len(self._logprobs)))

    def _logprobs_until(self, end: int) -> Json | None:
        fresh = self._logprobs[self._shown_logprobs : end]
        self._shown_logprobs = max(self._shown_logprobs, end)
        return reply.logprobs_block(fresh, self._decoding.token_bytes) if fresh else None

    def _chunk(self, piece: Json, usage: reply.StreamUsage) -> Json:
        if usage == "none":
            return piece
        counts = reply.running_usage(self.head.prompt_tokens, len(self._token_ids))
        return {**piece, "usage": counts if usage == "each" else None}
