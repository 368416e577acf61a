"""A turn that a replica has accepted: its items become the objects that a client reads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deployments import openai_reply as reply
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import replica_lost_info
from deployments.metrics import ServiceMetrics
from deployments.turn_call import TurnAccepted, TurnDone, TurnItem, TurnRefused, TurnTokens
from deployments.turn_identity import EventId
from deployments.turn_log import CONTRADICTED

log = logging.getLogger(__name__)

Json = dict[str, Any]


class TextStream(Protocol):
    """Token ids of one reply in, text out: never half a character, never a stop string."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str:
        """What was held back and is now known to belong to the reply."""
        ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the ids of one reply become text: a fresh stream, the text of all its ids, the bytes of one.
    The client has seen the first `seen_chars` characters of the text already; `may_cut`: a stop string
    may end the reply."""

    text: TextStream
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[int], bytes]
    may_cut: bool = False
    seen_chars: int = 0


class TurnItems:
    """The items of one turn under one deadline. Use `start`, then `next` until TurnDone, then `close`.

    `is_first` is False for a turn that another request has started: metrics count it once.
    """

    def __init__(
        self, items: AsyncGenerator[TurnItem, None], timeout_s: float, is_first: bool = True
    ) -> None:
        self.is_first = is_first
        self._items = items
        self._peeked: TurnAccepted | TurnTokens | TurnDone | None = None
        self.called_s = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + timeout_s

    async def start(self) -> TurnAccepted:
        """Raises ServiceError when the turn is refused, late or cut short."""
        item = await self.next()
        if not isinstance(item, TurnAccepted):
            raise ServiceError(ErrorInfo("internal_error", "The replica skipped its acceptance."))
        return item

    async def peek(self) -> TurnAccepted | TurnTokens | TurnDone:
        """What `next` will return."""
        self._peeked = await self.next()
        return self._peeked

    async def next(self) -> TurnAccepted | TurnTokens | TurnDone:
        """Raises ServiceError when the turn is refused, late or cut short."""
        if self._peeked is not None:
            peeked, self._peeked = self._peeked, None
            return peeked
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
        """Leaves the turn, which is cancelled unless others read it or it is to finish; idempotent."""
        await self._items.aclose()


_UNKNOWN_EVENT = ErrorInfo(
    "invalid_value", "The reply has fewer characters than Last-Event-ID says.", "last_event_id"
)


class OpenTurn:
    """Read it once, by `chunks` or by `completion`. Whatever happens, `close` leaves it.

    Raises ServiceError from either for a turn that fails after it was accepted.
    """

    def __init__(
        self,
        items: TurnItems,
        head: reply.ReplyHead,
        decoding: Decoding,
        metrics: ServiceMetrics,
        on_close: Callable[[TurnDone | None], None],
    ) -> None:
        self.head = head
        self._items = items
        self._decoding = decoding
        self.metrics = metrics
        self._on_close = on_close
        self._token_ids: list[int] = []
        # One for each token; None where it was not asked for, or was lost with a replica.
        self._logprobs: list[reply.Logprob | None] = []
        self._shown_logprobs = 0
        self._logprob_bytes = 0
        self._shown_bytes = 0
        self._text: list[str] = []
        self._num_chars = 0
        self._done: TurnDone | None = None
        self._closed = False
        metrics.turn_started()

    async def chunks(self, usage: reply.StreamUsage = "none") -> AsyncGenerator[Json, None]:
        """`chat.completion.chunk` objects, each with the `event_id` to go on after. The last one before
        the usage has the finish_reason."""
        try:
            self._num_chars = self._decoding.seen_chars
            yield self._chunk(reply.first_chunk(self.head), usage)
            self._num_chars = 0
            async for text in self._texts():
                logprobs = self._logprobs_of(text)
                yield self._chunk(reply.chunk(self.head, {"content": text}, logprobs), usage)
            done = self._committed()
            if self._num_chars < self._decoding.seen_chars:
                raise ServiceError(_UNKNOWN_EVENT)
            last = reply.last_chunk(self.head, done, self._last_logprobs(done))
            yield self._chunk(last, usage)
            if usage != "none":
                yield {**reply.usage_chunk(self.head, done), "event_id": self._event_id()}
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
        """Leaves the turn unless it is committed; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._items.close()
        finally:
            self.metrics.turn_ended()
            if self._done is None:
                self.metrics.turn_abandoned()
            self._on_close(self._done)

    async def _texts(self) -> AsyncGenerator[str, None]:
        """Pieces of text that the client has not seen, none empty. Sets `_done`."""
        while self._done is None:
            item = await self._items.next()
            if isinstance(item, TurnTokens):
                text = self._take(item)
            elif isinstance(item, TurnDone):
                text = self._rest(item)
                self._done = item
                if self._items.is_first:
                    self.metrics.turn_done(item, time.monotonic() - self._items.called_s)
            else:
                raise ServiceError(ErrorInfo("internal_error", "The replica accepted twice."))
            self._text.append(text)
            seen = min(len(text), max(0, self._decoding.seen_chars - self._num_chars))
            self._num_chars += len(text)
            if seen:
                self._logprobs_of(text[:seen])
            if text[seen:]:
                yield text[seen:]

    def _rest(self, done: TurnDone) -> str:
        """What of the committed reply has not been shown: mostly what the stream held back, more if
        the turn was committed by a replica that could not say so."""
        held = self._decoding.text.finish()
        shown = "".join(self._text)
        whole = self._decoding.decode(done.output_ids.tolist())
        if whole.startswith(shown):
            return whole[len(shown) :]
        if self._decoding.may_cut and len(self._token_ids) >= len(done.output_ids):
            # A tokenizer that normalises text can have no ids for exactly the text before the cut.
            return held
        # A store that went back while its owner was gone has let another one say something else.
        log.error("turn %d: the text shown is not what was committed", done.turn)
        raise ServiceError(CONTRADICTED)

    def _take(self, tokens: TurnTokens) -> str:
        if tokens.k != len(self._token_ids):
            raise ServiceError(ErrorInfo("internal_error", "The replica lost or repeated tokens."))
        if tokens.k == 0 and tokens.token_ids and self._items.is_first:
            self.metrics.first_token(time.monotonic() - self._items.called_s)
        self._token_ids.extend(tokens.token_ids)
        self._logprobs.extend(tokens.logprobs or [None] * len(tokens.token_ids))
        return "".join([self._decoding.text.push(token) for token in tokens.token_ids])

    def _committed(self) -> TurnDone:
        if self._done is None or self._done.finish_reason == "cancelled":
            raise ServiceError(ErrorInfo("turn_failed", "The turn was cancelled by the service."))
        return self._done

    def _logprobs_of(self, text: str) -> Json | None:
        """Those of the tokens that are shown in full once `text` is."""
        self._shown_bytes += len(text.encode())
        end = self._shown_logprobs
        while end < len(self._token_ids):
            token_bytes = len(self._decoding.token_bytes(self._token_ids[end]))
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
        fresh = [one for one in self._logprobs[self._shown_logprobs : end] if one is not None]
        self._shown_logprobs = max(self._shown_logprobs, end)
        return reply.logprobs_block(fresh, self._decoding.token_bytes) if fresh else None

    def _event_id(self) -> str:
        return str(EventId(self.head.turn, self._num_chars))

    def _chunk(self, piece: Json, usage: reply.StreamUsage) -> Json:
        piece["event_id"] = self._event_id()
        if usage == "none":
            return piece
        counts = reply.running_usage(self.head.prompt_tokens, len(self._token_ids))
        return {**piece, "usage": counts if usage == "each" else None}
