"""How a request finds its conversation and gets a replica to accept its turn.

named conversation ------------------------------> continue it
made earlier under the same idempotency key -----> find its turn there
whole history, matched and idle -----------------> continue it with what is new
... that moved on, perhaps for the same key -----> ask there first
whole history, no match, or the match moved on --> new conversation, first turn = all of it
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from cluster.conversation import GENESIS, Conversation, Message, TokenIds, new_conversation_id
from cluster.store import AlreadyExists, HistoryMatch, NotFound
from deployments import openai_reply as reply
from deployments.conversation_records import (
    MAX_OPENING_BYTES,
    ChatCodec,
    ConversationRecords,
    FrontConfig,
    hash_all,
    leading_system,
)
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import FailoverTurns
from deployments.metrics import ServiceMetrics
from deployments.open_turn import Decoding, OpenTurn, TurnItems
from deployments.openai_schema import ChatRequest
from deployments.patient_store import OpeningStore
from deployments.recent_records import RecentRecords
from deployments.store_errors import KEY_REUSED, store_errors, turn_conflict_info
from deployments.turn_call import TurnAccepted, TurnCall, TurnDone
from deployments.turn_identity import (
    completion_id_of,
    conversation_id_of,
    new_key,
    request_hash,
    seed_of,
)

_FORK_ON = frozenset(
    {"conversation_busy", "turn_conflict", "model_changed", "conversation_not_found"}
)
_MAX_REREADS = 3
# In the middle of a redeployment: the record is of our model, and the replica is not.
_OTHER_VERSION = ErrorInfo("not_ready", "The service is being updated; try again later.")
_UNKNOWN_HEAD = ""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request as it is opened: `key` is the client's or a new one."""

    request: ChatRequest
    tenant: str
    key: str

    @property
    def retriable(self) -> bool:
        """Whether the client can ask for the same turn again."""
        return bool(self.request.key)


@dataclass(frozen=True, slots=True)
class _Step:
    """A turn to be asked for: on top of `record`, with the messages that are new to it."""

    record: Conversation
    fresh: tuple[Message, ...]
    input_ids: TokenIds
    is_new: bool = False


class TurnOpener:
    """Opens turns and creates conversations. Every failure is a ServiceError."""

    def __init__(
        self,
        config: FrontConfig,
        store: OpeningStore,
        codec: ChatCodec,
        turns: FailoverTurns,
        metrics: ServiceMetrics,
    ) -> None:
        self._config = config
        self._store = store
        self._codec = codec
        self._turns = turns
        self._metrics = metrics
        self._records = ConversationRecords(config, store, codec)
        self._recent = RecentRecords()

    async def open(self, request: ChatRequest, tenant: str) -> OpenTurn:
        """Returns once a replica has accepted the turn."""
        asked = _Asked(request, tenant, request.key or new_key())
        if request.conversation_id is not None:
            return await self._open_named(asked, request.conversation_id)
        made = await self._made_before(asked) if asked.retriable else None
        turn = await (self._open_matched(asked) if made is None else self._open_made(asked, made))
        return turn or await self._start_new(asked)

    async def create(
        self, messages: tuple[Message, ...], metadata: dict[str, str], tenant: str
    ) -> Conversation:
        """A conversation whose first turn will begin with `messages`."""
        # The store's transcript, from which the first turn is encoded, is bounded.
        if sum(len(message.encode()) for message in messages) > MAX_OPENING_BYTES:
            message = f"The messages take more than {MAX_OPENING_BYTES} bytes."
            raise ServiceError(ErrorInfo("input_too_long", message, "messages"))
        # What the template or the limits refuse is refused now, not at the first turn.
        opening = (*messages, Message("user", "?"))
        await self._records.encode(self._codec.encode_opening, opening)
        conversation_id = new_conversation_id()
        return await self._records.create(conversation_id, messages, messages, metadata, tenant)

    async def close(self) -> None:
        """Wait for the clean-up of abandoned turns."""
        await self._records.close()

    # Which conversation.

    async def _open_named(self, asked: _Asked, conversation_id: str) -> OpenTurn:
        request, rereads = asked.request, 0
        expects = request.expect_turn is not None or request.expect_head is not None
        recent = None if expects else self._recent.take(asked.tenant, conversation_id)
        while True:
            record = recent
            if record is None:
                async with store_errors(conversation_id):
                    record = await self._store.get(asked.tenant, conversation_id)
            if not asked.retriable:
                _check_expectations(request, record)
            try:
                return await self._continue(asked, record, request.messages)
            except ServiceError as error:
                # The record moved between our read and the claim: encode again on what it is now.
                moved = error.info.code == "turn_conflict" and not expects
                if not moved or rereads == _MAX_REREADS:
                    raise
                rereads += recent is None
                recent = None

    async def _open_matched(self, asked: _Asked) -> OpenTurn | None:
        """A turn of the conversation that this history continues; None to start another."""
        messages = asked.request.messages
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not replies:
            return None
        known, fresh = messages[: replies[-1] + 1], messages[replies[-1] + 1 :]
        history = hash_all(GENESIS, known)
        recent = self._recent.take_history(asked.tenant, history)
        if recent is not None:
            turn = await self._unless_forked(self._continue(asked, recent, fresh))
            if turn is not None:
                return turn
        async with store_errors():
            match = await self._store.match_history(asked.tenant, history)
            if match is None:
                return None
            try:
                record = await self._store.get(asked.tenant, match.conversation_id)
            except NotFound:
                return None
        moved_on = record.turn != match.turn or record.running
        refused = self._is_old(record) and self._config.on_model_change == "refuse"
        if (moved_on or refused) and not asked.retriable:
            return None
        if moved_on:
            step = await self._as_it_was(record, match, fresh)
            return await self._unless_forked(self._run(asked, step))
        return await self._unless_forked(self._continue(asked, record, fresh))

    async def _unless_forked(self, opening: Awaitable[OpenTurn]) -> OpenTurn | None:
        """None when it turns out that the conversation cannot be continued like this."""
        try:
            return await opening
        except ServiceError as error:
            if error.info.code not in _FORK_ON:
                raise
            return None

    async def _as_it_was(
        self, record: Conversation, match: HistoryMatch, fresh: tuple[Message, ...]
    ) -> _Step:
        """Perhaps the first try of this very request moved it on: its key then finds that turn."""
        then = record
        if record.turn != match.turn:
            then = dataclasses.replace(record, turn=match.turn, head=_UNKNOWN_HEAD)
        return _Step(then, fresh, await self._records.next_input(record, fresh))

    async def _made_before(self, asked: _Asked) -> Conversation | None:
        """The conversation that the first try of this request made."""
        conversation_id = conversation_id_of(asked.tenant, asked.key)
        async with store_errors(conversation_id):
            try:
                return await self._store.get(asked.tenant, conversation_id)
            except NotFound:
                return None

    async def _open_made(self, asked: _Asked, made: Conversation) -> OpenTurn | None:
        messages = asked.request.messages
        pinned = leading_system(messages)
        before = hash_all(GENESIS, pinned)
        if not made.turn and made.history != before:
            raise ServiceError(KEY_REUSED)
        input_ids = await self._records.encode(self._codec.encode_opening, messages)
        then = dataclasses.replace(made, turn=0, head=GENESIS, history=before, token_count=0)
        step = _Step(then, messages[len(pinned) :], input_ids, is_new=not made.turn)
        try:
            return await self._run(asked, step)
        except ServiceError as error:
            if error.info.code != "conversation_not_found":
                raise
            return None

    async def _start_new(self, asked: _Asked) -> OpenTurn:
        request = asked.request
        pinned = leading_system(request.messages)
        input_ids = await self._records.encode(self._codec.encode_opening, request.messages)
        conversation_id = new_conversation_id()
        if asked.retriable:
            conversation_id = conversation_id_of(asked.tenant, asked.key)
        try:
            record = await self._records.create(
                conversation_id, pinned, request.messages, request.metadata, asked.tenant
            )
        except ServiceError as error:
            # Made by the same request a moment ago.
            exists = isinstance(error.__cause__, AlreadyExists)
            made = await self._made_before(asked) if exists else None
            turn = await self._open_made(asked, made) if made else None
            if turn is None:
                raise
            return turn
        step = _Step(record, request.messages[len(pinned) :], input_ids, is_new=True)
        return await self._run(asked, step)

    # The turn.

    def _is_old(self, record: Conversation) -> bool:
        return record.fingerprint != self._config.fingerprint

    async def _continue(
        self, asked: _Asked, record: Conversation, fresh: tuple[Message, ...]
    ) -> OpenTurn:
        if self._is_old(record):
            turn = await self._old_turn(asked, record, fresh) if asked.retriable else None
            if turn is not None:
                return turn
            record = await self._records.restarted(record)
        return await self._run(
            asked, _Step(record, fresh, await self._records.next_input(record, fresh))
        )

    async def _old_turn(
        self, asked: _Asked, record: Conversation, fresh: tuple[Message, ...]
    ) -> OpenTurn | None:
        """The turn that was committed under this key before the model changed."""
        try:
            input_ids = await self._records.encode(self._codec.encode_turn, fresh)
            return await self._run(asked, _Step(record, fresh, input_ids))
        except ServiceError as error:
            if error.info.code != "model_changed":
                raise
            return None

    async def _run(self, asked: _Asked, step: _Step) -> OpenTurn:
        call = self._call(asked, step)
        items = TurnItems(self._turns.turn(call), call.timeout_s)
        try:
            accepted = await items.start()
            head = await self._head(asked.request, call, step, (items, accepted))
        except BaseException as error:
            await items.close()
            if step.is_new and _is_nobodys(asked, error):
                self._records.forget(step.record, running_too=not asked.retriable)
            if _code_of(error) == "model_changed" and not self._is_old(step.record):
                raise ServiceError(_OTHER_VERSION) from error
            raise
        decoding = Decoding(
            text=self._codec.text_stream(call.stop),
            decode=self._decode,
            token_bytes=self._codec.token_bytes,
            may_cut=bool(call.stop),
            seen_chars=asked.request.last_event.chars if asked.request.last_event else 0,
        )
        return OpenTurn(items, head, decoding, self._metrics, self._on_close(asked, step))

    def _call(self, asked: _Asked, step: _Step) -> TurnCall:
        request, record, key = asked.request, step.record, asked.key
        sampling = request.sampling
        if not request.has_seed:
            seed = seed_of(asked.tenant, record.conversation_id, key)
            sampling = dataclasses.replace(sampling, seed=seed)
        # The input was encoded for exactly this state. A client's own expectation may be stale: its
        # key is then looked up first, and a turn that is not found conflicts.
        expect_turn, expect_head = request.expect_turn, request.expect_head
        return TurnCall(
            tenant=asked.tenant,
            conversation_id=record.conversation_id,
            input_ids=step.input_ids,
            messages=step.fresh,
            history=hash_all(record.history, step.fresh),
            sampling=sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
            expect_turn=record.turn if expect_turn is None else expect_turn,
            expect_head=expect_head or record.head or None,
            owner_hint=record.owner,
            timeout_s=self._config.turn_timeout_s,
            key=key,
            request_hash=request_hash(request.body_hash, request.conversation_id),
            on_disconnect=request.when_left,
            completion_id=completion_id_of(asked.tenant, record.conversation_id, key),
            created_s=int(time.time()),
        )

    async def _head(
        self,
        request: ChatRequest,
        call: TurnCall,
        step: _Step,
        opened: tuple[TurnItems, TurnAccepted],
    ) -> reply.ReplyHead:
        items, accepted = opened
        if request.last_event is not None and request.last_event.turn != accepted.turn:
            message = f"The event is not one of this reply, which is turn {accepted.turn}."
            raise ServiceError(ErrorInfo("invalid_value", message, "last_event_id"))
        prompt_tokens = step.record.token_count + len(step.input_ids)
        if accepted.turn != step.record.turn + 1:
            # A reply of earlier: the record has moved on since.
            items.is_first = False
            done = await items.peek()
            if isinstance(done, TurnDone):
                prompt_tokens = done.usage.context_tokens + done.usage.input_tokens
        return reply.ReplyHead(
            completion_id=accepted.completion_id or call.completion_id,
            created_s=accepted.created_s or call.created_s,
            model=request.model,
            fingerprint=self._config.fingerprint,
            conversation_id=call.conversation_id,
            turn=accepted.turn,
            prompt_tokens=prompt_tokens,
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self._codec.text_stream(())
        return "".join([text.push(token_id) for token_id in token_ids]) + text.finish()

    def _on_close(self, asked: _Asked, step: _Step) -> Callable[[TurnDone | None], None]:
        def closed(done: TurnDone | None) -> None:
            if done is not None and done.record is not None:
                self._recent.keep(done.record)
            if step.is_new and done is None and asked.request.when_left == "cancel":
                self._records.forget(step.record, running_too=not asked.retriable)

        return closed


def _code_of(error: BaseException) -> str:
    return error.info.code if isinstance(error, ServiceError) else ""


def _is_nobodys(asked: _Asked, error: BaseException) -> bool:
    """Whether a new conversation whose turn was not accepted is of use to nobody."""
    if not isinstance(error, ServiceError):
        return asked.request.when_left == "cancel"
    # Else its turn may be running, and the client may ask for it again.
    return not asked.retriable or error.info.code in ("overloaded", "not_ready", "model_changed")


def _check_expectations(request: ChatRequest, record: Conversation) -> None:
    stale_turn = request.expect_turn not in (None, record.turn)
    stale_head = request.expect_head not in (None, record.head)
    if stale_turn or stale_head:
        raise ServiceError(turn_conflict_info(record.turn, record.head))
