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
    Begun,
    BusyTurn,
    Checkpoint,
    CommittedTurn,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    Rebase,
    RememberedTurn,
    ReplayLog,
    RunningSnapshot,
    Snapshot,
    TokenIds,
    TurnCommit,
)
from cluster.redis_functions import Answer, Call, FunctionClient, RedisOptions
from cluster.redis_servers import Argument
from cluster.store import (
    AlreadyExists,
    Conflict,
    Fenced,
    HistoryMatch,
    KeyReused,
    ModelChanged,
    NotFound,
    Quarantined,
    Recovering,
    RolledBack,
    StoreError,
    StoreLimits,
    TurnConflict,
    encode_json,
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
        """Connect to a URL (see `cluster.redis_servers`) and load the function library if it is missing
        or older. Raises ValueError for another URL, StoreUnavailable, StoreVersionError."""
        limits = limits or StoreLimits()
        options = dataclasses.replace(options or RedisOptions(), recovery_s=limits.recovery_s)
        return cls(await FunctionClient.connect(url, options), limits)

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
        _, orphans = await self._get_all(new.tenant, suspects)
        await self._delist(new.tenant, orphans)
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
            records, gone = await self._get_all(tenant, ids)
            if len(records) + len(gone) < len(ids):
                raise Recovering(self._limits.recovery_s)
            found |= records
            orphans.update(gone)
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

    async def begin(self, turn: BeginTurn) -> Begun:
        self._limits.check_claim(turn)
        answer = await self._functions.call(
            "begin",
            _keys(turn.conversation_id),
            [
                *(turn.tenant, turn.replica, turn.fingerprint, turn.nonce),
                *(turn.key or turn.nonce, turn.request_hash, int(turn.steal)),
                *(_micros(turn.lease_s), _micros(self._limits.ttl_s)),
                "" if turn.expect_turn is None else turn.expect_turn,
                turn.expect_head or "",
                *(self._limits.max_attempts, self._limits.results_bytes),
                _pack(turn.input_ids),
            ],
        )
        match answer:
            case [b"OK", *claimed]:
                return _ownership(turn, claimed)
            case [b"DONE", number, head, reply, result]:
                return CommittedTurn(number, head.decode(), _unpack(reply), json.loads(result))
            case [b"BUSY", owner, number, output, remaining]:
                return BusyTurn(owner.decode(), number, _unpack(output), remaining / 1e6)
        raise _error(answer, turn.conversation_id)

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        ttl = _micros(self._limits.ttl_s)
        calls: Sequence[Call] = [
            (
                _keys(one.conversation_id),
                [
                    *(one.tenant, one.fence.epoch, one.fence.nonce, _micros(one.lease_s), ttl),
                    *(one.k, _pack(one.token_ids)),
                ],
            )
            for one in batch
        ]
        answers = await self._functions.call_batch("checkpoint", calls) if calls else []
        return [
            _refusal(answer, one.conversation_id)
            for one, answer in zip(batch, answers, strict=True)
        ]

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
                *(_pack(commit.output_ids), 4 * len(commit.output_ids[: commit.reply_tokens])),
                *(commit.head, commit.history, result, self._limits.results_bytes),
                *self._transcript_limits(),
                *(message.encode() for message in commit.messages),
            ],
            commit.conversation_id,
        )
        conversation = _conversation(commit.conversation_id, answer[0])
        await self._index(conversation, answer[1].decode())
        return conversation

    async def _index(
        self, conversation: Conversation, previous: str, is_listed: bool = True
    ) -> None:
        """Remember where the transcript ended, instead of its entry at the history `previous`.
        Not knowing it costs a replay, losing a turn is worse."""
        tenant, ttl = conversation.tenant, _micros(self._limits.ttl_s)
        name = conversation.conversation_id
        index = _tenant_key(tenant)
        calls: Any = [("keep", index, [2 * ttl])]
        if not is_listed:
            calls = [("enlist", index, [name, 2 * ttl])]
        if conversation.turn:
            entry = json.dumps(_index_entry(conversation, conversation.turn))
            calls.append(("remember", _history_key(tenant, conversation.history), [entry, ttl]))
        if previous not in ("", conversation.history):
            calls.append(("forget", _history_key(tenant, previous), [json.dumps([name])[:-1]]))
        try:
            await asyncio.gather(*(self._call(name, [key], args) for name, key, args in calls))
        except StoreError as error:
            log.warning("the record is stored, but its indexes are not: %s", error)

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        await self._call(
            "abort",
            _keys(conversation_id),
            [tenant, fence.epoch, fence.nonce, _micros(self._limits.ttl_s)],
            conversation_id,
        )

    async def repair(self, snapshot: Snapshot) -> None:
        last = snapshot.conversation
        [previous] = await self._call(
            "repair",
            _keys(last.conversation_id),
            [
                *_record_fields(snapshot),
                *(_micros(self._limits.ttl_s), self._limits.results_bytes),
                *self._transcript_limits(),
                *_running_fields(snapshot.running),
                *(snapshot.first_message, len(snapshot.results)),
                *(part for result in snapshot.results for part in _result_fields(result)),
                *(message.encode() for message in snapshot.messages),
            ],
            last.conversation_id,
        )
        await self._index(last, previous.decode(), is_listed=False)

    async def rebase(self, rebase: Rebase) -> Conversation:
        [view] = await self._call(
            "rebase",
            _keys(rebase.conversation_id),
            [
                *(rebase.tenant, rebase.expect_head, rebase.fingerprint),
                *(rebase.sink_tokens, rebase.window_tokens),
                *(rebase.replay_windows * rebase.window_tokens, _micros(self._limits.ttl_s)),
            ],
            rebase.conversation_id,
        )
        return _conversation(rebase.conversation_id, view)

    async def pulse(self) -> str:
        return await self._functions.pulse()

    async def delete(self, tenant: str, conversation_id: str) -> None:
        tries = 0

        async def attempt() -> Answer:
            nonlocal tries
            tries += 1
            args: Sequence[Argument] = [tenant, _micros(self._limits.ttl_s)]
            return await self._functions.call_once("delete", _keys(conversation_id), args)

        answer = await self._functions.repeat(attempt)
        if answer[0] != b"OK" and (answer[0] != b"NOT_FOUND" or tries == 1):
            raise _error(answer, conversation_id)
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
        answer = await self._functions.call(name, keys, args)
        if answer[0] != b"OK":
            raise _error(answer, subject)
        return answer[1:]

    async def _get_all(
        self, tenant: str, ids: Sequence[str]
    ) -> tuple[dict[str, Conversation], Sequence[str]]:
        """Those that exist, in the order of `ids`; the ids of those that do not."""
        answers = await asyncio.gather(
            *(self._functions.call("get", _keys(key)[:1], [tenant]) for key in ids)
        )
        both = list(zip(ids, answers, strict=True))
        found = {key: _conversation(key, answer[1]) for key, answer in both if answer[0] == b"OK"}
        return found, [key for key, answer in both if answer[0] == b"NOT_FOUND"]

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


def _refusal(answer: Answer | StoreError, subject: str) -> StoreError | None:
    """One answer to a checkpoint."""
    if isinstance(answer, StoreError):
        return answer
    return None if answer[0] == b"OK" else _error(answer, subject)


def _error(answer: Answer, subject: str) -> StoreError:
    match answer:
        case [b"CONFLICT", remaining]:
            return Conflict(remaining / 1e6)
        case [b"RECOVERING", remaining]:
            return Recovering(remaining / 1e6)
        case [b"TURN_CONFLICT", turn, head]:
            return TurnConflict(turn, head.decode())
    kinds: dict[bytes, type[StoreError]] = {
        b"NOT_FOUND": NotFound,
        b"MODEL_CHANGED": ModelChanged,
        b"FENCED": Fenced,
        b"ROLLED_BACK": RolledBack,
        b"KEY_REUSED": KeyReused,
        b"QUARANTINED": Quarantined,
        b"EXISTS": AlreadyExists,
    }
    return kinds[answer[0]](subject)


def _ownership(turn: BeginTurn, answer: Answer) -> Ownership:
    """Reads what `ownership` in conversation.lua writes."""
    view, sinks, recent, input_ids, output_ids, attempt, resumed = answer
    conversation = _conversation(turn.conversation_id, view)
    return Ownership(
        fence=Fence(conversation.epoch, turn.nonce),
        conversation=conversation,
        replay=ReplayLog(_unpack(sinks), _unpack(recent), conversation.token_count),
        input_ids=_unpack(input_ids),
        output_ids=_unpack(output_ids),
        attempt=attempt,
        resumed=bool(resumed),
    )


def _record_fields(snapshot: Snapshot) -> list[Argument]:
    """The first fields of REPAIR in conversation.lua."""
    last, replay = snapshot.conversation, snapshot.replay
    return [
        *(last.tenant, last.epoch, last.turn, last.fingerprint),
        *(last.sink_tokens, last.window_tokens, snapshot.replay_windows * last.window_tokens),
        *(encode_json(last.metadata), replay.token_count, last.head, last.history, last.owner),
        *(_micros(last.created_s), _micros(last.updated_s), encode_json(last.result)),
        *(_pack(replay.sink_ids), _pack(replay.recent_ids)),
    ]


def _running_fields(running: RunningSnapshot | None) -> list[Argument]:
    if running is None:
        return ["", "", "", b"", b"", 0]
    return [
        *(running.nonce, running.key, running.request_hash),
        *(_pack(running.input_ids), _pack(running.output_ids), _micros(running.lease_s)),
    ]


def _result_fields(result: RememberedTurn) -> list[Argument]:
    return [
        *(result.key, result.request_hash, result.turn, result.head, result.reply_start),
        *(_pack(result.reply_ids), encode_json(result.result), int(result.quarantined)),
    ]


def _conversation(conversation_id: str, view: Answer) -> Conversation:
    """Reads what `view` in conversation.lua writes."""
    text = [field.decode() for field in view[:16]]
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
        replay_windows=int(text[14]) // int(text[3]),
        num_messages=int(text[15]),
        running=bool(view[16]),
    )
