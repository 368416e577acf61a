"""A conversation's record as the front makes it: created, restarted for another model, forgotten; and
the messages of a first turn as token ids."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cluster.conversation import (
    GENESIS,
    Conversation,
    Message,
    NewConversation,
    Rebase,
    TokenIds,
    history_hash,
)
from cluster.store import NotFound, StoreError
from deployments.errors import ErrorInfo, ServiceError
from deployments.open_turn import TextStream
from deployments.openai_sampling import RequestLimits
from deployments.patient_store import OpeningStore
from deployments.store_errors import MODEL_CHANGED, input_too_long_info, store_errors

log = logging.getLogger(__name__)

MIN_SINK_TOKENS = 4
MAX_OPENING_BYTES = 512 * 1024
MAX_TRANSCRIPT_MESSAGES = 1000

_ANY_QUESTION = Message("user", "?")
_THREAD_ABOVE_CHARS = 16_384
_FORGET_PAUSES_S = (0.0, 0.2, 1.0, 3.0)

OnModelChange = Literal["restart", "refuse"]
Encode = Callable[[Sequence[Message]], TokenIds]


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
    that reads nothing of its stream for `stall_timeout_s` is given up. `on_model_change` says what
    becomes of a conversation held with another model, tokenizer or window.
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
    on_model_change: OnModelChange = "restart"
    created_s: int = field(default_factory=lambda: int(time.time()))


class ConversationRecords:
    """Every failure is a ServiceError."""

    def __init__(self, config: FrontConfig, store: OpeningStore, codec: ChatCodec) -> None:
        self._config = config
        self._store = store
        self._codec = codec
        self._chores: set[asyncio.Task[None]] = set()

    async def create(
        self,
        conversation_id: str,
        stored: tuple[Message, ...],
        opening: tuple[Message, ...],
        metadata: dict[str, str],
        tenant: str,
    ) -> Conversation:
        """A new record that begins with `stored`; S is the pinned prefix of `opening`."""
        sink_tokens = self._sink_tokens(opening)
        new = NewConversation(
            conversation_id=conversation_id,
            tenant=tenant,
            fingerprint=self._config.fingerprint,
            sink_tokens=sink_tokens,
            window_tokens=self._config.capacity - sink_tokens,
            replay_windows=self._config.replay_windows,
            metadata=metadata,
            history=hash_all(GENESIS, stored),
            messages=stored,
        )
        async with store_errors(conversation_id):
            return await self._store.create(new)

    async def restarted(self, record: Conversation) -> Conversation:
        """The same conversation for the model of today. Raises ServiceError `model_changed` where the
        configuration refuses that, `conversation_busy` while a turn is running."""
        if self._config.on_model_change == "refuse":
            raise ServiceError(ErrorInfo("model_changed", MODEL_CHANGED, "conversation"))
        sink_tokens = self._sink_tokens(await self._system(record))
        rebase = Rebase(
            conversation_id=record.conversation_id,
            tenant=record.tenant,
            expect_head=record.head,
            fingerprint=self._config.fingerprint,
            sink_tokens=sink_tokens,
            window_tokens=self._config.capacity - sink_tokens,
            replay_windows=self._config.replay_windows,
        )
        async with store_errors(record.conversation_id):
            return await self._store.rebase(rebase)

    async def next_input(self, record: Conversation, fresh: tuple[Message, ...]) -> TokenIds:
        """`fresh` as the next turn's input. Where the record holds no tokens it comes after the
        transcript: all of it in a new conversation, in a restarted one its system messages and as many of
        the last ones as fit half the limit."""
        if record.token_count:
            return await self.encode(self._codec.encode_turn, fresh)
        first, messages = await self._transcript(record)
        if not record.turn:
            return await self.encode(self._codec.encode_opening, (*messages, *fresh))
        system = await self._system(record)
        recent = await self._recent(system, messages[max(0, len(system) - first) :])
        return await self.encode(self._codec.encode_opening, (*system, *recent, *fresh))

    async def encode(self, encode: Encode, messages: Sequence[Message]) -> TokenIds:
        """Raises ServiceError, also for more tokens than a turn may bring."""
        ids = await self._encoded(encode, messages)
        if len(ids) > self._config.max_input_tokens:
            raise ServiceError(input_too_long_info(len(ids), self._config.max_input_tokens))
        return ids

    def forget(self, record: Conversation, running_too: bool) -> None:
        """Soon delete a conversation made for a turn that never was, unless the turn was committed.
        Without `running_too` a turn that somebody still runs is waited for a while, then left."""

        async def forget() -> None:
            for pause_s in _FORGET_PAUSES_S:
                await asyncio.sleep(pause_s)
                now = await self._store.get(record.tenant, record.conversation_id)
                if now.turn:
                    return
                if running_too or not now.running:
                    await self._store.delete(record.tenant, record.conversation_id)
                    return

        async def try_to_forget() -> None:
            try:
                await forget()
            except NotFound:
                pass
            except StoreError as error:
                log.warning("an empty conversation stays in the store: %s", error)

        chore = asyncio.get_running_loop().create_task(try_to_forget())
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def close(self) -> None:
        """Wait for what is being forgotten."""
        while self._chores:
            await asyncio.gather(*self._chores, return_exceptions=True)

    def _sink_tokens(self, opening: tuple[Message, ...]) -> int:
        sink_tokens = max(MIN_SINK_TOKENS, self._codec.pinned_tokens(opening))
        limit = self._config.capacity // 2
        if sink_tokens > limit:
            message = (
                f"The system prompt takes {sink_tokens} tokens; at most {limit} can be pinned."
            )
            raise ServiceError(ErrorInfo("system_prompt_too_long", message, "messages"))
        return sink_tokens

    async def _transcript(self, record: Conversation) -> tuple[int, tuple[Message, ...]]:
        async with store_errors(record.conversation_id):
            first, messages = await self._store.transcript(
                record.tenant, record.conversation_id, MAX_TRANSCRIPT_MESSAGES
            )
        return first, tuple(messages)

    async def _system(self, record: Conversation) -> tuple[Message, ...]:
        """With which the conversation began, however long ago."""
        async with store_errors(record.conversation_id):
            return tuple(await self._store.system_messages(record.tenant, record.conversation_id))

    async def _recent(
        self, system: tuple[Message, ...], messages: tuple[Message, ...]
    ) -> tuple[Message, ...]:
        """The longest end of `messages` that begins with a user's and fits half the input limit."""
        starts = [n for n, message in enumerate(messages) if message.role == "user"]

        async def fits(count: int) -> bool:
            # Templates want a user's message where the reply starts.
            kept = (*system, *messages[starts[-count] :], _ANY_QUESTION)
            ids = await self._encoded(self._codec.encode_opening, kept)
            return 2 * len(ids) <= self._config.max_input_tokens

        # Doubled, then bisected: no text is encoded that is much too long.
        fitting, too_many = 0, 1
        while too_many <= len(starts) and await fits(too_many):
            fitting, too_many = too_many, 2 * too_many
        too_many = min(too_many, len(starts) + 1)
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if await fits(middle):
                fitting = middle
            else:
                too_many = middle
        return messages[starts[-fitting] :] if fitting else ()

    async def _encoded(self, encode: Encode, messages: Sequence[Message]) -> TokenIds:
        size = sum(len(message.content) for message in messages)
        # The tokenizer releases the GIL; a long text must not hold up the streams of others.
        in_thread = size > _THREAD_ABOVE_CHARS
        return await asyncio.to_thread(encode, messages) if in_thread else encode(messages)


def leading_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The system messages before any other."""
    others = (n for n, message in enumerate(messages) if message.role != "system")
    return messages[: next(others, len(messages))]


def hash_all(previous: str, messages: Sequence[Message]) -> str:
    """The transcript hash after these messages."""
    for message in messages:
        previous = history_hash(previous, message.role, message.content)
    return previous
