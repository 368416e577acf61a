"""A conversation's latest reply as a stream, for whoever lost it: running or committed, no request needed.

running   -> follow it at its owner, from its first token; what the client has seen is left out
committed -> the text of the transcript
neither   -> said so: only its request, sent again under its key, can bring it back
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from cluster.conversation import Conversation
from cluster.store import ConversationStore
from deployments import openai_reply as reply
from deployments.conversation_records import ChatCodec, FrontConfig
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import EngineClient, replica_lost_info
from deployments.metrics import ServiceMetrics
from deployments.open_turn import Decoding, OpenTurn, TurnItems
from deployments.store_errors import store_errors
from deployments.turn_call import FollowCall
from deployments.turn_identity import EventId

Json = dict[str, Any]

_RETRY_PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0)


class ReplyStream(Protocol):
    """What a response needs of a turn."""

    head: reply.ReplyHead
    metrics: ServiceMetrics

    def chunks(self, usage: reply.StreamUsage = "none") -> AsyncGenerator[Json, None]: ...

    async def close(self) -> None: ...


class CommittedReply:
    """The reply of the last committed turn, as text. The client has seen `seen_chars` of it."""

    def __init__(
        self, head: reply.ReplyHead, record: Conversation, text: str, seen_chars: int
    ) -> None:
        self.head = head
        self._record = record
        self._text = text
        self._seen_chars = seen_chars

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """As `OpenTurn.chunks`."""
        record, head = self._record, self.head
        if self._seen_chars > len(self._text):
            message = "The reply has fewer characters than the event id says."
            raise ServiceError(ErrorInfo("invalid_value", message, "last_event_id"))
        yield self._numbered(reply.first_chunk(head), self._seen_chars)
        rest = self._text[self._seen_chars :]
        if rest:
            yield self._numbered(reply.chunk(head, {"content": rest}), len(self._text))
        block = {"id": record.conversation_id, "turn": record.turn, "etag": record.head}
        reason = str(record.result.get("finish_reason", "stop"))
        yield self._numbered(reply.end_chunk(head, reason, block), len(self._text))

    async def close(self) -> None:
        """Nothing to leave."""

    def _numbered(self, chunk: Json, chars: int) -> Json:
        return {**chunk, "event_id": str(EventId(self.head.turn, chars))}


class FollowedReply:
    """A running turn, wherever it goes: when its owner is lost, it is looked for again for a while."""

    def __init__(
        self, rejoiner: Rejoiner, turn: OpenTurn | CommittedReply, key: tuple[str, str]
    ) -> None:
        self.head = turn.head
        self.metrics = rejoiner.metrics
        self._rejoiner = rejoiner
        self._turn = turn
        self._key = key

    async def chunks(self, usage: reply.StreamUsage = "none") -> AsyncGenerator[Json, None]:
        """As `OpenTurn.chunks`, without usage. Raises ServiceError."""
        opened, pauses = False, iter(_RETRY_PAUSES_S)
        after = EventId(self.head.turn, 0)
        while True:
            try:
                async for chunk in self._turn.chunks():
                    is_opening = "role" in _delta(chunk)
                    if opened and is_opening:
                        continue
                    opened = True
                    after = EventId(after.turn, int(chunk["event_id"].split(".")[1]))
                    yield chunk
                return
            except ServiceError as error:
                pause_s = next(pauses, None)
                if error.info.code != "replica_lost" or pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
            try:
                self._turn = await self._rejoiner.find(*self._key, after)
            except ServiceError as error:
                if error.info.code != "replica_lost":
                    raise

    async def close(self) -> None:
        """Stops reading; the turn goes on."""
        await self._turn.close()


class Rejoiner:
    """Finds the latest reply of a conversation. Every failure is a ServiceError."""

    def __init__(
        self,
        config: FrontConfig,
        store: ConversationStore,
        codec: ChatCodec,
        engine: EngineClient,
        metrics: ServiceMetrics,
    ) -> None:
        self.metrics = metrics
        self._config = config
        self._store = store
        self._codec = codec
        self._engine = engine

    async def open(self, tenant: str, conversation_id: str, after: EventId | None) -> FollowedReply:
        """The turn that is running, or else the last committed one; from `after` on, if given.

        Raises ServiceError: `turn_conflict` when there is no such turn (any more, or yet),
        `replica_lost` when its owner is gone and nobody has sent its request again.
        """
        turn = await self.find(tenant, conversation_id, after)
        return FollowedReply(self, turn, (tenant, conversation_id))

    async def find(
        self, tenant: str, conversation_id: str, after: EventId | None
    ) -> OpenTurn | CommittedReply:
        """One look. Raises as `open`."""
        wanted = None if after is None else after.turn
        seen_chars = 0 if after is None else after.chars
        for pause_s in _RETRY_PAUSES_S:
            async with store_errors(conversation_id):
                record = await self._store.get(tenant, conversation_id)
            latest = record.turn + 1 if record.running else record.turn
            if wanted in (None, latest) and record.running:
                followed = await self._follow(record, seen_chars)
                if followed is not None:
                    return followed
                # Its owner has come to the next turn since the record was read.
                wanted = wanted or latest
                await asyncio.sleep(pause_s)
            elif wanted in (None, record.turn) and record.turn:
                return await self._committed(record, seen_chars)
            else:
                raise ServiceError(_no_turn(record, wanted or 0))
        raise ServiceError(replica_lost_info())

    async def _follow(self, record: Conversation, seen_chars: int) -> OpenTurn | None:
        """The turn after `record`; None when another one runs by now."""
        call = FollowCall(
            record.tenant, record.conversation_id, record.owner, self._config.turn_timeout_s
        )
        items = TurnItems(self._engine.follow(call), call.timeout_s, is_first=False)
        try:
            accepted = await items.start()
        except BaseException:
            await items.close()
            raise
        if accepted.turn != record.turn + 1:
            await items.close()
            return None
        head = self._head(record, accepted.turn, accepted.completion_id, accepted.created_s)
        codec = self._codec

        def decode(token_ids: Any) -> str:
            text = codec.text_stream(())
            return "".join([text.push(token_id) for token_id in token_ids]) + text.finish()

        decoding = Decoding(
            text=codec.text_stream(accepted.stop),
            decode=decode,
            token_bytes=codec.token_bytes,
            may_cut=bool(accepted.stop),
            seen_chars=seen_chars,
        )
        return OpenTurn(items, head, decoding, self.metrics, lambda committed: None)

    async def _committed(self, record: Conversation, seen_chars: int) -> CommittedReply:
        async with store_errors(record.conversation_id):
            # Not the last one of now: another turn may have been committed since.
            _, messages = await self._store.transcript(
                record.tenant, record.conversation_id, 1, before=record.num_messages
            )
        text = messages[-1].content if messages else ""
        result = record.result
        completion_id = str(result.get("completion_id", ""))
        created_s = int(result.get("created_s", 0))
        head = self._head(record, record.turn, completion_id, created_s)
        return CommittedReply(head, record, text, seen_chars)

    def _head(
        self, record: Conversation, turn: int, completion_id: str, created_s: int
    ) -> reply.ReplyHead:
        named = json.dumps([record.conversation_id, turn]).encode()
        return reply.ReplyHead(
            completion_id=completion_id or f"chatcmpl-{hashlib.sha256(named).hexdigest()[:24]}",
            created_s=created_s or int(record.updated_s),
            model=self._config.models[0],
            fingerprint=self._config.fingerprint,
            conversation_id=record.conversation_id,
            turn=turn,
            prompt_tokens=record.token_count,
        )


def _delta(chunk: Json) -> Json:
    choices: list[Json] = chunk["choices"]
    delta: Json = choices[0]["delta"] if choices else {}
    return delta


def _no_turn(record: Conversation, wanted: int) -> ErrorInfo:
    if wanted == 0:
        message = "Nothing has been said in this conversation yet."
    elif wanted <= record.turn:
        message = f"The conversation has moved on to turn {record.turn}; read its transcript."
    else:
        message = (
            f"Turn {wanted} is neither running nor committed; send its request again under its "
            "Idempotency-Key, and it goes on."
        )
    return ErrorInfo("turn_conflict", message, "conversation")
