"""How the Redis store puts things into arguments and reads them out of answers: keys, ids, errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from cluster.conversation import (
    BeginTurn,
    Conversation,
    Fence,
    NewConversation,
    Ownership,
    RememberedTurn,
    ReplayLog,
    RunningSnapshot,
    Snapshot,
    TokenIds,
)
from cluster.redis_functions import Answer
from cluster.redis_servers import Argument
from cluster.store import (
    AlreadyExists,
    Conflict,
    Fenced,
    KeyReused,
    ModelChanged,
    NotFound,
    Quarantined,
    Recovering,
    RolledBack,
    StoreError,
    TurnConflict,
    encode_json,
)


def keys_of(conversation_id: str) -> list[str]:
    """The record, the transcript, and what of it is kept apart; one hash tag, so one server."""
    return [f"sinkserve:{{{conversation_id}}}:{part}" for part in ("rec", "log", "sys")]


def tenant_key(tenant: str) -> str:
    """The index of a tenant's conversations."""
    return f"sinkserve:tenant:{tenant}"


def history_key(tenant: str, history: str) -> str:
    """Where a transcript hash was last seen."""
    return f"sinkserve:history:{history}:{tenant}"


def micros(seconds: float) -> int:
    """Whole microseconds."""
    return round(seconds * 1e6)


def identity(new: NewConversation) -> str:
    """Tells a repeated `create` from another conversation under the same id."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(new), sort_keys=True).encode()).hexdigest()


def index_entry(conversation: Conversation, turn: int) -> list[Any]:
    """Names a turn of this life of the conversation: its id may be created again."""
    return [conversation.conversation_id, turn, conversation.created_s]


def pack(ids: TokenIds) -> bytes:
    """Little-endian int32."""
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def unpack(data: bytes) -> TokenIds:
    """Inverse of `pack`."""
    return np.frombuffer(data, dtype="<i4").astype(np.int32)


def refusal_of(answer: Answer | StoreError, subject: str) -> StoreError | None:
    """One answer to a checkpoint."""
    if isinstance(answer, StoreError):
        return answer
    return None if answer[0] == b"OK" else error_of(answer, subject)


def error_of(answer: Answer, subject: str) -> StoreError:
    """The error that a status word other than OK stands for."""
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


def ownership_of(turn: BeginTurn, answer: Answer) -> Ownership:
    """Reads what `ownership` in conversation.lua writes."""
    view, sinks, recent, input_ids, output_ids, attempt, resumed = answer
    conversation = conversation_of(turn.conversation_id, view)
    return Ownership(
        fence=Fence(conversation.epoch, turn.nonce),
        conversation=conversation,
        replay=ReplayLog(unpack(sinks), unpack(recent), conversation.token_count),
        input_ids=unpack(input_ids),
        output_ids=unpack(output_ids),
        attempt=attempt,
        resumed=bool(resumed),
    )


def record_fields(snapshot: Snapshot) -> list[Argument]:
    """The first fields of REPAIR in conversation.lua."""
    last, replay = snapshot.conversation, snapshot.replay
    return [
        *(last.tenant, last.epoch, last.turn, last.fingerprint),
        *(last.sink_tokens, last.window_tokens, snapshot.replay_windows * last.window_tokens),
        *(encode_json(last.metadata), replay.token_count, last.head, last.history, last.owner),
        *(micros(last.created_s), micros(last.updated_s), encode_json(last.result)),
        *(pack(replay.sink_ids), pack(replay.recent_ids)),
    ]


def running_fields(running: RunningSnapshot | None) -> list[Argument]:
    """The fields of REPAIR for a running turn; all empty for none."""
    if running is None:
        return ["", "", "", b"", b"", 0]
    return [
        *(running.nonce, running.key, running.request_hash),
        *(pack(running.input_ids), pack(running.output_ids), micros(running.lease_s)),
    ]


def result_fields(result: RememberedTurn) -> list[Argument]:
    """One result as `repair` in conversation.lua reads it."""
    return [
        *(result.key, result.request_hash, result.turn, result.head, result.reply_start),
        *(pack(result.reply_ids), encode_json(result.result), int(result.quarantined)),
    ]


def conversation_of(conversation_id: str, view: Answer) -> Conversation:
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
