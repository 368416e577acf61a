"""The conversation store on Redis >= 7 or Valkey: one Lua library, one FCALL for each operation.

Every function may safely run twice (see `cluster.store`), so a call whose reply is lost is repeated a
bounded number of times. Keys of one conversation share a hash tag and so a hash slot; the two indexes
live under keys of their own, are written after the record and are checked against it when read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any, Self

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
    Rebase,
    Snapshot,
    TurnCommit,
)
from cluster.redis_codec import (
    conversation_of,
    error_of,
    history_key,
    identity,
    index_entry,
    keys_of,
    micros,
    ownership_of,
    pack,
    record_fields,
    refusal_of,
    result_fields,
    running_fields,
    tenant_key,
    unpack,
)
from cluster.redis_functions import Answer, Call, FunctionClient, RedisOptions
from cluster.redis_servers import Argument
from cluster.store import (
    HistoryMatch,
    NotFound,
    Recovering,
    StoreError,
    StoreLimits,
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
        index = tenant_key(new.tenant)
        sample = await self._call(
            "enlist", [index], [new.conversation_id, micros(2 * self._limits.ttl_s)]
        )
        answer = await self._call(
            "create",
            keys_of(new.conversation_id),
            [
                *(new.tenant, new.fingerprint, new.sink_tokens, new.window_tokens),
                *(new.recent_tokens, metadata, new.history, identity(new)),
                *(micros(self._limits.ttl_s), *self._transcript_limits()),
                *messages,
            ],
            new.conversation_id,
        )
        suspects = [identifier.decode() for identifier in sample[0]]
        _, orphans = await self._get_all(new.tenant, suspects)
        await self._delist(new.tenant, orphans)
        return conversation_of(new.conversation_id, answer[0])

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        answer = await self._call("get", keys_of(conversation_id)[:1], [tenant], conversation_id)
        return conversation_of(conversation_id, answer[0])

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> Sequence[Conversation]:
        index = tenant_key(tenant)
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
            keys_of(conversation_id),
            [tenant, limit, "" if before is None else before],
            conversation_id,
        )
        return first, [Message.decode(message) for message in messages]

    async def system_messages(self, tenant: str, conversation_id: str) -> Sequence[Message]:
        [messages] = await self._call(
            "system_messages", keys_of(conversation_id), [tenant], conversation_id
        )
        return [Message.decode(message) for message in messages]

    async def begin(self, turn: BeginTurn) -> Begun:
        self._limits.check_claim(turn)
        answer = await self._functions.call(
            "begin",
            keys_of(turn.conversation_id),
            [
                *(turn.tenant, turn.replica, turn.fingerprint, turn.nonce),
                *(turn.key or turn.nonce, turn.request_hash, int(turn.steal)),
                *(micros(turn.lease_s), micros(self._limits.ttl_s)),
                "" if turn.expect_turn is None else turn.expect_turn,
                turn.expect_head or "",
                *(self._limits.max_attempts, self._limits.results_bytes),
                *(pack(turn.input_ids), int(turn.blameless), self._limits.max_lapses),
            ],
        )
        match answer:
            case [b"OK", *claimed]:
                return ownership_of(turn, claimed)
            case [b"DONE", number, head, reply, result]:
                return CommittedTurn(number, head.decode(), unpack(reply), json.loads(result))
            case [b"BUSY", owner, number, output, remaining]:
                return BusyTurn(owner.decode(), number, unpack(output), remaining / 1e6)
        raise error_of(answer, turn.conversation_id)

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        ttl = micros(self._limits.ttl_s)
        calls: Sequence[Call] = [
            (
                keys_of(one.conversation_id),
                [
                    *(one.tenant, one.fence.epoch, one.fence.nonce, micros(one.lease_s), ttl),
                    *(one.k, pack(one.token_ids)),
                ],
            )
            for one in batch
        ]
        answers = await self._functions.call_batch("checkpoint", calls) if calls else []
        return [
            refusal_of(answer, one.conversation_id)
            for one, answer in zip(batch, answers, strict=True)
        ]

    async def renew(self, tenant: str, conversation_id: str, fence: Fence, lease_s: float) -> None:
        await self._call(
            "renew",
            keys_of(conversation_id),
            [
                *(tenant, fence.epoch, fence.nonce),
                *(micros(lease_s), micros(self._limits.ttl_s)),
            ],
            conversation_id,
        )

    async def commit(self, commit: TurnCommit) -> Conversation:
        result = self._limits.check_result(commit.result)
        ttl = micros(self._limits.ttl_s)
        answer = await self._call(
            "commit",
            keys_of(commit.conversation_id),
            [
                *(commit.tenant, commit.fence.epoch, commit.fence.nonce, ttl),
                *(pack(commit.output_ids), 4 * len(commit.output_ids[: commit.reply_tokens])),
                *(commit.head, commit.history, result, self._limits.results_bytes),
                *self._transcript_limits(),
                *(message.encode() for message in commit.messages),
            ],
            commit.conversation_id,
        )
        conversation = conversation_of(commit.conversation_id, answer[0])
        await self._index(conversation, answer[1].decode())
        return conversation

    async def _index(
        self, conversation: Conversation, previous: str, is_listed: bool = True
    ) -> None:
        """Remember where the transcript ended, instead of its entry at the history `previous`.
        Not knowing it costs a replay, losing a turn is worse."""
        tenant, ttl = conversation.tenant, micros(self._limits.ttl_s)
        name = conversation.conversation_id
        index = tenant_key(tenant)
        calls: Any = [("keep", index, [2 * ttl])]
        if not is_listed:
            calls = [("enlist", index, [name, 2 * ttl])]
        if conversation.turn:
            entry = json.dumps(index_entry(conversation, conversation.turn))
            calls.append(("remember", history_key(tenant, conversation.history), [entry, ttl]))
        if previous not in ("", conversation.history):
            calls.append(("forget", history_key(tenant, previous), [json.dumps([name])[:-1]]))
        try:
            await asyncio.gather(*(self._call(name, [key], args) for name, key, args in calls))
        except StoreError as error:
            log.warning("the record is stored, but its indexes are not: %s", error)

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        await self._call(
            "abort",
            keys_of(conversation_id),
            [tenant, fence.epoch, fence.nonce, micros(self._limits.ttl_s)],
            conversation_id,
        )

    async def repair(self, snapshot: Snapshot) -> None:
        last = snapshot.conversation
        [previous] = await self._call(
            "repair",
            keys_of(last.conversation_id),
            [
                *record_fields(snapshot),
                *(micros(self._limits.ttl_s), self._limits.results_bytes),
                *self._transcript_limits(),
                *running_fields(snapshot.running),
                *(snapshot.first_message, len(snapshot.results)),
                *(part for result in snapshot.results for part in result_fields(result)),
                *(message.encode() for message in snapshot.messages),
            ],
            last.conversation_id,
        )
        await self._index(last, previous.decode(), is_listed=False)

    async def rebase(self, rebase: Rebase) -> Conversation:
        [view] = await self._call(
            "rebase",
            keys_of(rebase.conversation_id),
            [
                *(rebase.tenant, rebase.expect_head, rebase.fingerprint),
                *(rebase.sink_tokens, rebase.window_tokens),
                *(rebase.replay_windows * rebase.window_tokens, micros(self._limits.ttl_s)),
            ],
            rebase.conversation_id,
        )
        return conversation_of(rebase.conversation_id, view)

    async def pulse(self) -> str:
        return await self._functions.pulse()

    async def delete(self, tenant: str, conversation_id: str) -> None:
        tries = 0

        async def attempt() -> Answer:
            nonlocal tries
            tries += 1
            args: Sequence[Argument] = [tenant, micros(self._limits.ttl_s)]
            return await self._functions.call_once("delete", keys_of(conversation_id), args)

        answer = await self._functions.repeat(attempt)
        if answer[0] != b"OK" and (answer[0] != b"NOT_FOUND" or tries == 1):
            raise error_of(answer, conversation_id)
        await self._delist(tenant, [conversation_id], min_age_s=0.0)

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        entry = await self._functions.get(history_key(tenant, history))
        if entry is None:
            return None
        conversation_id, turn, created = json.loads(entry)
        try:
            now = await self.get(tenant, conversation_id)
        except NotFound:
            return None
        # The index is not written in one step with the record, so the record has the last word.
        if [conversation_id, turn, created] != index_entry(now, turn) or now.turn < turn:
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
            raise error_of(answer, subject)
        return answer[1:]

    async def _get_all(
        self, tenant: str, ids: Sequence[str]
    ) -> tuple[dict[str, Conversation], Sequence[str]]:
        """Those that exist, in the order of `ids`; the ids of those that do not."""
        answers = await asyncio.gather(
            *(self._functions.call("get", keys_of(key)[:1], [tenant]) for key in ids)
        )
        both = list(zip(ids, answers, strict=True))
        found = {key: conversation_of(key, answer[1]) for key, answer in both if answer[0] == b"OK"}
        return found, [key for key, answer in both if answer[0] == b"NOT_FOUND"]

    async def _delist(
        self, tenant: str, ids: Collection[str], min_age_s: float = ORPHAN_AGE_S
    ) -> None:
        if ids:
            await self._call("delist", [tenant_key(tenant)], [micros(min_age_s), *ids])

    def _transcript_limits(self) -> tuple[int, int]:
        return self._limits.transcript_messages, self._limits.transcript_bytes
