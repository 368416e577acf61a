"""The objects that go back to a client, in OpenAI's shapes plus `conversation` and `usage.sinkserve`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.conversation import Conversation, Message
from deployments.turn_call import TurnDone, TurnUsage
from engine.sampling import TokenLogprob

Json = dict[str, Any]
StreamUsage = Literal["none", "last", "each"]
"""Usage in a stream: not at all, in a chunk of its own at the end, or also counted in each chunk."""

Logprob = tuple[TokenLogprob, tuple[TokenLogprob, ...]]


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What all objects of one reply share. `created_s` is Unix time."""

    completion_id: str
    created_s: int
    model: str
    fingerprint: str
    conversation_id: str
    turn: int
    prompt_tokens: int

    def fields(self, kind: str) -> Json:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": f"fp_{self.fingerprint[:16]}",
        }


def chunk(head: ReplyHead, delta: Json, logprobs: Json | None = None) -> Json:
    """One `chat.completion.chunk` with a piece of the reply."""
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}
    return {**head.fields("chat.completion.chunk"), "choices": [choice]}


def first_chunk(head: ReplyHead) -> Json:
    """Opens the reply; names the conversation before any text."""
    opened = chunk(head, {"role": "assistant", "content": ""})
    return {**opened, "conversation": {"id": head.conversation_id, "turn": head.turn}}


def last_chunk(head: ReplyHead, done: TurnDone, logprobs: Json | None = None) -> Json:
    """Carries finish_reason and the conversation's new ETag."""
    return end_chunk(head, done.finish_reason, conversation_block(head, done), logprobs)


def end_chunk(
    head: ReplyHead, finish_reason: str, conversation: Json, logprobs: Json | None = None
) -> Json:
    """The same of a turn whose `conversation` block is known."""
    ended = chunk(head, {}, logprobs)
    ended["choices"][0]["finish_reason"] = finish_reason
    return {**ended, "conversation": conversation}


def usage_chunk(head: ReplyHead, done: TurnDone) -> Json:
    """The extra chunk of `stream_options.include_usage`."""
    return {
        **head.fields("chat.completion.chunk"),
        "choices": [],
        "usage": usage(done.usage),
        "conversation": conversation_block(head, done),
    }


def completion(head: ReplyHead, done: TurnDone, text: str, logprobs: Json | None) -> Json:
    """A `chat.completion`."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": done.finish_reason,
    }
    return {
        **head.fields("chat.completion"),
        "choices": [choice],
        "usage": usage(done.usage),
        "conversation": conversation_block(head, done),
    }


def conversation_block(head: ReplyHead, done: TurnDone) -> Json:
    """Where the conversation stands now."""
    return {"id": head.conversation_id, "turn": done.turn, "etag": done.head}


def usage(counts: TurnUsage) -> Json:
    """Prompt tokens are the whole conversation up to the reply, as a client that resends it expects;
    `cached_tokens` of them were resident. Tokens that slid out of the window were neither cached nor
    computed."""
    prompt_tokens = counts.context_tokens + counts.input_tokens
    return {
        **running_usage(prompt_tokens, counts.output_tokens),
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "sinkserve": {
            "evicted_tokens": counts.evicted_tokens,
            "prefill_tokens": counts.prefill_tokens,
            "context_tokens": counts.context_tokens,
            "recovery": counts.recovery,
        },
    }


def running_usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """The counts of OpenAI's `usage` alone."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def logprobs_block(entries: Sequence[Logprob], token_bytes: Callable[[int], bytes]) -> Json:
    """OpenAI's `logprobs`. `bytes` is exact; `token` shows broken UTF-8 as U+FFFD."""

    def shown(entry: TokenLogprob) -> Json:
        raw = token_bytes(entry.token_id)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": entry.logprob, "bytes": list(raw)}

    content = [
        {**shown(token), "top_logprobs": [shown(other) for other in top]} for token, top in entries
    ]
    return {"content": content, "refusal": None}


def conversation_object(record: Conversation, model: str) -> Json:
    """A stored conversation, as `GET /v1/conversations/{id}` shows it."""
    return {
        "id": record.conversation_id,
        "object": "conversation",
        "created_at": int(record.created_s),
        "updated_at": int(record.updated_s),
        "model": model,
        "turn": record.turn,
        "etag": record.head,
        "token_count": record.token_count,
        "sink_tokens": record.sink_tokens,
        "window_tokens": record.window_tokens,
        "running": record.running,
        "metadata": record.metadata,
    }


def transcript_page(first: int, messages: Sequence[Message]) -> Json:
    """A page of the transcript; `first` is the position of its first message."""
    data = [
        {"position": first + offset, "role": message.role, "content": message.content}
        for offset, message in enumerate(messages)
    ]
    return {"object": "list", "data": data, "first_position": first, "has_more": first > 0}


def page(items: Sequence[Json], limit: int) -> Json:
    """A list object in OpenAI's shape."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": len(items) == limit,
    }
