"""The conversation store on Redis >= 7 or Valkey: one Lua library, one FCALL for each operation.

Every function may safely run twice (see `cluster.store`), so a call whose reply is lost is repeated a
bounded number of times. Keys of one conversation share a hash tag and so a hash slot; the two indexes
live under keys of their own, are written after the record and are checked against it when read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any, Self

import numpy as np

from cluster.conversation import (
    BeginTurn,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    ReplayLog,
    TokenIds,
    TurnCommit,
)
from cluster.redis_functions import Answer, Argument, FunctionClient, RedisOptions
from cluster.store import (
    AlreadyExists,
    Conflict,
    Fenced,
    HistoryMatch,
    ModelChanged,
    NotFound,
    StoreError,
    StoreLimits,
    TurnConflict,
)

ORPHAN_AGE_S = 60.0
"""An id that has been listed for longer than this without a record never gets one."""

log = logging.getLogger(__name__)


class RedisStore:
    """A `ConversationStore`. Use it from one event loop; `connect` makes one."""

    def __init__(self, functions: FunctionClient, limits: StoreLimits | None = None) -> None:
        self._functions = functions
        self._limits = limits or StoreLimits()

    @classmethod
    async def connect(
        cls, url: str, limits: StoreLimits | None = None, options: RedisOptions | None = None
    ) -> Self:
        """Connect to redis://, rediss:// or unix:// and load the function library if it is missing
        or older. Raises ValueError for another URL, StoreUnavailable, StoreVersionError."""
        return cls(await FunctionClient.connect(url, options or RedisOptions()), limits)

    async def create(self, new: NewConversation) -> Conversation:
        metadata = self._limits.check_metadata(new.metadata)
        messages = [message.encode() for message in new.messages]
        index = _tenant_key(new.tenant)
        sample = await self._call(
            "enlist", [index], [new.conversation_id, _micros(2 * self._limits.ttl_s)]
        )
        answer = await self._call(
            "create",
            _keys(new.conversation_id),
            [
                *(new.tenant, new.fingerprint, new.sink_tokens, new.window_tokens),
                *(new.recent_tokens, metadata, new.history, _identity(new)),
                *(_micros(self._limits.ttl_s), *self._transcript_limits()),
                *messages,
            ],
            new.conversation_id,
        )
        suspects = [identifier.decode() for identifier in sample[0]]
        records = await self._get_all(new.tenant, suspects)
        await self._delist(new.tenant, [key for key in suspects if key not in records])
        return _conversation(new.conversation_id, answer[0])

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        answer = await self._call("get", _keys(conversation_id)[:1], [tenant], conversation_id)
        return _conversation(conversation_id, answer[0])

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> Sequence[Conversation]:
        index = _tenant_key(tenant)
        found: dict[str, Conversation] = {}
        orphans: set[str] = set()
        while len(found) < limit:
            answer = await self._call("page", [index], [limit - len(found), after], after)
            ids = [identifier.decode() for identifier in answer[0]]
            if not ids:
                break
            records = await self._get_all(tenant, ids)
            found |= records
            orphans.update(key for key in ids if key not in records)
            after = ids[-1]
        await self._delist(tenant, orphans)
        return tuple(found.values())

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, Sequence[Message]]:
        first, messages = await self._call(
            "transcript",
            _keys(conversation_id),
            [tenant, limit, "" if before is None else before],
            conversation_id,
        )
        return first, [Message.decode(message) for message in messages]

    async def begin(self, turn: BeginTurn) -> Ownership:
        self._limits.check_claim(turn)
        view, sinks, recent = await self._call(
            "begin",
            _keys(turn.conversation_id),
            [
                *(turn.tenant, turn.replica, turn.fingerprint, turn.nonce),
                *(_micros(turn.lease_s), _micros(self._limits.ttl_s)),
                "" if turn.expect_turn is None else turn.expect_turn,
                turn.expect_head or "",
                _pack(turn.input_ids),
            ],
            turn.conversation_id,
        )
        conversation = _conversation(turn.conversation_id, view)
        replay = ReplayLog(_unpack(sinks), _unpack(recent), conversation.token_count)
        return Ownership(Fence(conversation.epoch, turn.nonce), conversation, replay)

    async def renew(self, tenant: str, conversation_id: str, fence: Fence, lease_s: float) -> None:
        await self._call(
            "renew",
            _keys(conversation_id),
            [
                *(tenant, fence.epoch, fence.nonce),
                *(_micros(lease_s), _micros(self._limits.ttl_s)),
            ],
            conversation_id,
        )

    async def commit(self, commit: TurnCommit) -> Conversation:
        result = self._limits.check_result(commit.result)
        ttl = _micros(self._limits.ttl_s)
        answer = await self._call(
            "commit",
            _keys(commit.conversation_id),
            [
                *(commit.tenant, commit.fence.epoch, commit.fence.nonce, ttl),
                *(_pack(commit.output_ids), commit.head, commit.history, result),
                *self._transcript_limits(),
                *(message.encode() for message in commit.messages),
            ],
            commit.conversation_id,
        )
        conversation = _conversation(commit.conversation_id, answer[0])
        await self._index(conversation)
        return conversation

    async def _index(self, conversation: Conversation) -> None:
        """Remember where the transcript ended. Not knowing it costs a replay, losing a turn is worse."""
        key = _history_key(conversation.tenant, conversation.history)
        entry = json.dumps(_index_entry(conversation, conversation.turn))
        ttl = _micros(self._limits.ttl_s)
        try:
            await asyncio.gather(
                self._call("remember", [key], [entry, ttl]),
                self._call("keep", [_tenant_key(conversation.tenant)], [2 * ttl]),
            )
        except StoreError as error:
            log.warning("turn committed, but its history cannot be matched: %s", error)

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        await self._call(
            "abort",
            _keys(conversation_id),
            [tenant, fence.epoch, fence.nonce, _micros(self._limits.ttl_s)],
            conversation_id,
        )

    async def delete(self, tenant: str, conversation_id: str) -> None:
        tries = 0

        async def attempt() -> Answer:
            nonlocal tries
            tries += 1
            return await self._functions.call_once("delete", _keys(conversation_id), [tenant])

        answer = await self._functions.repeat(attempt)
        if answer[0] == b"NOT_FOUND" and tries == 1:
            raise NotFound(conversation_id)
        await self._delist(tenant, [conversation_id], min_age_s=0.0)

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        entry = await self._functions.get(_history_key(tenant, history))
        if entry is None:
            return None
        conversation_id, turn, created = json.loads(entry)
        try:
            now = await self.get(tenant, conversation_id)
        except NotFound:
            return None
        # The index is not written in one step with the record, so the record has the last word.
        if [conversation_id, turn, created] != _index_entry(now, turn) or now.turn < turn:
            return None
        if now.turn == turn and now.history != history:
            return None
        return HistoryMatch(conversation_id, turn)

    async def ping(self) -> float:
        start_s = time.perf_counter()
        await self._functions.ping()
        return time.perf_counter() - start_s

    async def close(self) -> None:
        await self._functions.close()

    async def _call(
        self, name: str, keys: Sequence[str], args: Sequence[Argument], subject: str = ""
    ) -> Answer:
        """The function's answer without its status word; another status than OK is raised."""
        status, *answer = await self._functions.call(name, keys, args)
        if status != b"OK":
            raise _error(status.decode(), answer, subject)
        return answer

    async def _get_all(self, tenant: str, ids: Sequence[str]) -> dict[str, Conversation]:
        """Those that exist, in the order of `ids`."""
        answers = await asyncio.gather(
            *(self._functions.call("get", _keys(key)[:1], [tenant]) for key in ids)
        )
        return {
            key: _conversation(key, answer[1])
            for key, answer in zip(ids, answers, strict=True)
            if answer[0] == b"OK"
        }

    async def _delist(
        self, tenant: str, ids: Collection[str], min_age_s: float = ORPHAN_AGE_S
    ) -> None:
        if ids:
            await self._call("delist", [_tenant_key(tenant)], [_micros(min_age_s), *ids])

    def _transcript_limits(self) -> tuple[int, int]:
        return self._limits.transcript_messages, self._limits.transcript_bytes


def _keys(conversation_id: str) -> list[str]:
    return [f"sinkserve:{{{conversation_id}}}:rec", f"sinkserve:{{{conversation_id}}}:log"]


def _tenant_key(tenant: str) -> str:
    return f"sinkserve:tenant:{tenant}"


def _history_key(tenant: str, history: str) -> str:
    return f"sinkserve:history:{history}:{tenant}"


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)


def _identity(new: NewConversation) -> str:
    """Tells a repeated `create` from another conversation under the same id."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(new), sort_keys=True).encode()).hexdigest()


def _index_entry(conversation: Conversation, turn: int) -> list[Any]:
    """Names a turn of this life of the conversation: its id may be created again."""
    return [conversation.conversation_id, turn, conversation.created_s]


def _pack(ids: TokenIds) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def _unpack(data: bytes) -> TokenIds:
    return np.frombuffer(data, dtype="<i4").astype(np.int32)


def _error(status: str, answer: Answer, subject: str) -> StoreError:
    if status == "CONFLICT":
        return Conflict(answer[0] / 1e6)
    if status == "TURN_CONFLICT":
        return TurnConflict(answer[0], answer[1].decode())
    kinds: dict[str, type[StoreError]] = {
        "NOT_FOUND": NotFound,
        "MODEL_CHANGED": ModelChanged,
        "FENCED": Fenced,
        "EXISTS": AlreadyExists,
    }
    return kinds[status](subject)


def _conversation(conversation_id: str, view: Answer) -> Conversation:
    """Reads what `view` in conversation.lua writes."""
    text = [field.decode() for field in view[:14]]
    return Conversation(
        conversation_id=conversation_id,
        tenant=text[0],
        fingerprint=text[1],
        sink_tokens=int(text[2]),
        window_tokens=int(text[3]),
        turn=int(text[4]),
        token_count=int(text[5]),
        head=text[6],
        history=text[7],
        owner=text[8],
        epoch=int(text[9]),
        created_s=int(text[10]) / 1e6,
        updated_s=int(text[11]) / 1e6,
        metadata=json.loads(text[12]),
        result=json.loads(text[13]),
        running=bool(view[14]),
    )
