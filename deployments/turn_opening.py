"""How a request finds its conversation and gets a replica to accept its turn.

named conversation ------------------------------> continue it
whole history, matched and idle -----------------> continue it with what is new
whole history, no match, or the match moved on --> new conversation, first turn = all of it
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.conversation import (
    GENESIS,
    Conversation,
    Message,
    NewConversation,
    TokenIds,
    history_hash,
    new_conversation_id,
)
from cluster.store import ConversationStore, NotFound, StoreError
from deployments import openai_reply as reply
from deployments.errors import ErrorInfo, ServiceError
from deployments.metrics import ServiceMetrics
from deployments.open_turn import Decoding, EngineClient, OpenTurn, TextStream, TurnItems
from deployments.openai_schema import MAX_OPENING_MESSAGES, ChatRequest, RequestLimits
from deployments.store_errors import (
    MODEL_CHANGED,
    input_too_long_info,
    store_errors,
    turn_conflict_info,
)
from deployments.turn_call import TurnCall

log = logging.getLogger(__name__)

MIN_SINK_TOKENS = 4
_FORK_ON = frozenset(
    {"conversation_busy", "turn_conflict", "model_changed", "conversation_not_found"}
)
_MAX_REREADS = 3
_THREAD_ABOVE_CHARS = 16_384
_MAX_OPENING_BYTES = 512 * 1024


class ChatCodec(Protocol):
    """Messages to token ids and back, by the model's chat template (see deployments.text)."""

    def encode_opening(self, messages: Sequence[Message]) -> TokenIds:
        """A first turn: prefix, messages, up to where the reply starts. int32."""
        ...

    def encode_turn(self, messages: Sequence[Message]) -> TokenIds:
        """A later turn: the messages after a closed reply, up to where the next one starts. int32."""
        ...

    def pinned_tokens(self, messages: Sequence[Message]) -> int:
        """Length of the prefix to pin: what comes before the first message that is not the system's."""
        ...

    def text_stream(self, stop: Sequence[str]) -> TextStream: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FrontConfig:
    """Fixed facts and limits of the front. Sizes in tokens unless named otherwise.

    `models` are the names requests may use, the canonical one first; `capacity` is S + R. A client
    that reads nothing of its stream for `stall_timeout_s` is given up.
    """

    models: tuple[str, ...]
    fingerprint: str
    capacity: int
    limits: RequestLimits
    replay_windows: int = 4
    max_input_tokens: int = 32_768
    max_body_bytes: int = 4 << 20
    turn_timeout_s: float = 600.0
    stall_timeout_s: float = 60.0
    created_s: int = field(default_factory=lambda: int(time.time()))


class TurnOpener:
    """Opens turns and creates conversations. Every failure is a ServiceError."""

    def __init__(
        self,
        config: FrontConfig,
        store: ConversationStore,
        codec: ChatCodec,
        engine: EngineClient,
        metrics: ServiceMetrics,
    ) -> None:
        self._config = config
        self._store = store
        self._codec = codec
        self._engine = engine
        self._metrics = metrics
        self._chores: set[asyncio.Task[None]] = set()

    async def open(self, request: ChatRequest, tenant: str) -> OpenTurn:
        """Returns once a replica has accepted the turn."""
        if request.conversation_id is not None:
            return await self._open_named(request, request.conversation_id, tenant)
        record, fresh = await self._match(request.messages, tenant)
        if record is not None:
            try:
                return await self._continue(request, record, fresh)
            except ServiceError as error:
                if error.info.code not in _FORK_ON:
                    raise
        return await self._start_new(request, tenant)

    async def create(
        self, messages: tuple[Message, ...], metadata: dict[str, str], tenant: str
    ) -> Conversation:
        """A conversation whose first turn will begin with `messages`."""
        # The store's transcript, from which the first turn is encoded, is bounded.
        if sum(len(message.encode()) for message in messages) > _MAX_OPENING_BYTES:
            message = f"The messages take more than {_MAX_OPENING_BYTES} bytes."
            raise ServiceError(ErrorInfo("input_too_long", message, "messages"))
        # What the template or the limits refuse is refused now, not at the first turn.
        await self._encode(self._codec.encode_opening, (*messages, Message("user", "?")))
        return await self._create(messages, messages, metadata, tenant)

    async def close(self) -> None:
        """Wait for the clean-up of abandoned turns."""
        while self._chores:
            await asyncio.gather(*self._chores, return_exceptions=True)

    async def _open_named(
        self, request: ChatRequest, conversation_id: str, tenant: str
    ) -> OpenTurn:
        expects = request.expect_turn is not None or request.expect_head is not None
        rereads = 0
        while True:
            async with store_errors(conversation_id):
                record = await self._store.get(tenant, conversation_id)
            _check_expectations(request, record)
            try:
                return await self._continue(request, record, request.messages)
            except ServiceError as error:
                # The record moved between our read and the claim: encode again on what it is now.
                moved = error.info.code == "turn_conflict" and not expects
                if not moved or rereads == _MAX_REREADS:
                    raise
                rereads += 1

    async def _match(
        self, messages: tuple[Message, ...], tenant: str
    ) -> tuple[Conversation | None, tuple[Message, ...]]:
        """The idle conversation that this history continues, and what is new."""
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not replies:
            return None, messages
        known, fresh = messages[: replies[-1] + 1], messages[replies[-1] + 1 :]
        async with store_errors():
            match = await self._store.match_history(tenant, _hash_all(GENESIS, known))
            if match is None:
                return None, messages
            try:
                record = await self._store.get(tenant, match.conversation_id)
            except NotFound:
                return None, messages
        moved_on = record.turn != match.turn or record.running
        if moved_on or record.fingerprint != self._config.fingerprint:
            return None, messages
        return record, fresh

    async def _continue(
        self, request: ChatRequest, record: Conversation, fresh: tuple[Message, ...]
    ) -> OpenTurn:
        if record.fingerprint != self._config.fingerprint:
            raise ServiceError(ErrorInfo("model_changed", MODEL_CHANGED, "conversation"))
        if record.turn == 0:
            opening = await self._opening(record)
            input_ids = await self._encode(self._codec.encode_opening, (*opening, *fresh))
        else:
            input_ids = await self._encode(self._codec.encode_turn, fresh)
        return await self._run(request, record, fresh, input_ids)

    async def _opening(self, record: Conversation) -> tuple[Message, ...]:
        async with store_errors(record.conversation_id):
            _, messages = await self._store.transcript(
                record.tenant, record.conversation_id, MAX_OPENING_MESSAGES
            )
        return tuple(messages)

    async def _start_new(self, request: ChatRequest, tenant: str) -> OpenTurn:
        pinned = _leading_system(request.messages)
        rest = request.messages[len(pinned) :]
        input_ids = await self._encode(self._codec.encode_opening, request.messages)
        record = await self._create(pinned, request.messages, request.metadata, tenant)
        try:
            return await self._run(request, record, rest, input_ids, is_new=True)
        except BaseException:
            self._forget(record)
            raise

    async def _create(
        self,
        stored: tuple[Message, ...],
        opening: tuple[Message, ...],
        metadata: dict[str, str],
        tenant: str,
    ) -> Conversation:
        """A new record that begins with `stored`; S is the pinned prefix of `opening`."""
        sink_tokens = max(MIN_SINK_TOKENS, self._codec.pinned_tokens(opening))
        limit = self._config.capacity // 2
        if sink_tokens > limit:
            message = (
                f"The system prompt takes {sink_tokens} tokens; at most {limit} can be pinned."
            )
            raise ServiceError(ErrorInfo("system_prompt_too_long", message, "messages"))
        new = NewConversation(
            conversation_id=new_conversation_id(),
            tenant=tenant,
            fingerprint=self._config.fingerprint,
            sink_tokens=sink_tokens,
            window_tokens=self._config.capacity - sink_tokens,
            replay_windows=self._config.replay_windows,
            metadata=metadata,
            history=_hash_all(GENESIS, stored),
            messages=stored,
        )
        async with store_errors(new.conversation_id):
            return await self._store.create(new)

    async def _run(
        self,
        request: ChatRequest,
        record: Conversation,
        fresh: tuple[Message, ...],
        input_ids: TokenIds,
        is_new: bool = False,
    ) -> OpenTurn:
        call = TurnCall(
            tenant=record.tenant,
            conversation_id=record.conversation_id,
            input_ids=input_ids,
            messages=fresh,
            history=_hash_all(record.history, fresh),
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
            # The input was encoded for exactly this state.
            expect_turn=record.turn,
            expect_head=record.head,
            owner_hint=record.owner,
            timeout_s=self._config.turn_timeout_s,
        )
        items = TurnItems(self._engine.turn(call), call.timeout_s)
        try:
            accepted = await items.start()
        except BaseException:
            await items.close()
            raise
        head = reply.ReplyHead(
            completion_id=f"chatcmpl-{secrets.token_hex(12)}",
            created_s=int(time.time()),
            model=request.model,
            fingerprint=self._config.fingerprint,
            conversation_id=record.conversation_id,
            turn=accepted.turn,
            prompt_tokens=record.token_count + len(input_ids),
        )
        decoding = Decoding(self._codec.text_stream(request.stop), self._codec.token_bytes)
        return OpenTurn(items, head, decoding, self._metrics, self._on_close(record, is_new))

    def _on_close(self, record: Conversation, is_new: bool) -> Callable[[bool], None]:
        def closed(committed: bool) -> None:
            if is_new and not committed:
                self._forget(record)

        return closed

    def _forget(self, record: Conversation) -> None:
        """Delete a conversation made for a turn that never was, unless the turn was committed."""

        async def forget() -> None:
            try:
                now = await self._store.get(record.tenant, record.conversation_id)
                if now.turn == 0:
                    await self._store.delete(record.tenant, record.conversation_id)
            except NotFound:
                pass
            except StoreError as error:
                log.warning("an empty conversation stays in the store: %s", error)

        chore = asyncio.get_running_loop().create_task(forget())
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _encode(
        self, encode: Callable[[Sequence[Message]], TokenIds], messages: Sequence[Message]
    ) -> TokenIds:
        size = sum(len(message.content) for message in messages)
        # The tokenizer releases the GIL; a long text must not hold up the streams of others.
        in_thread = size > _THREAD_ABOVE_CHARS
        ids = await asyncio.to_thread(encode, messages) if in_thread else encode(messages)
        if len(ids) > self._config.max_input_tokens:
            raise ServiceError(input_too_long_info(len(ids), self._config.max_input_tokens))
        return ids


def _leading_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    count = next(i for i, message in enumerate(messages) if message.role != "system")
    return messages[:count]


def _hash_all(previous: str, messages: Sequence[Message]) -> str:
    for message in messages:
        previous = history_hash(previous, message.role, message.content)
    return previous


def _check_expectations(request: ChatRequest, record: Conversation) -> None:
    stale_turn = request.expect_turn not in (None, record.turn)
    stale_head = request.expect_head not in (None, record.head)
    if stale_turn or stale_head:
        raise ServiceError(turn_conflict_info(record.turn, record.head))
