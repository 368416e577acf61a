"""`POST /v1/chat/completions` and `POST /v1/conversations`, parsed strictly.

Every field that OpenAI documents is either honoured or refused as `unsupported_value` with the reason;
a field that nobody documents is refused as `unknown_field`. Null means absent. Booleans are not
numbers. Errors name the path of the value at fault, e.g. `messages[2].content[0].text`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from cluster.conversation import CONVERSATION_ID, Message
from deployments.openai_reply import StreamUsage
from deployments.openai_sampling import (
    RequestLimits,
    read_max_tokens,
    read_sampling,
    read_stops,
)
from deployments.strict_json import Fields, Tree, child, json_type, refuse, wrong_type
from deployments.turn_call import OnDisconnect
from deployments.turn_identity import EventId, body_hash, check_event_id, check_key
from engine.sampling import SamplingParams

MAX_LABEL_CHARS = 512
MAX_METADATA = 16
MAX_METADATA_BYTES = 10_000
MAX_OPENING_MESSAGES = 64

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_LEAVING: dict[str, OnDisconnect] = {"cancel": "cancel", "finish": "finish"}
_ETAG = re.compile(r'"([0-9a-f]{64})"\Z')

# Fields honoured by value: what is accepted, and why nothing else is.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "A turn has one reply; only n=1 is supported."),
    "modalities": ((["text"],), "Only text is supported."),
    "response_format": (({"type": "text"},), "Only plain text replies are supported."),
    "tools": (([],), "Tools are not supported."),
    "tool_choice": (("none", "auto"), "Tools are not supported."),
    "functions": (([],), "Functions are not supported."),
    "function_call": (("none", "auto"), "Functions are not supported."),
    "parallel_tool_calls": ((True, False), "Must be a boolean."),
    "service_tier": (("auto", "default"), "There is one service tier."),
    "store": (
        (False,),
        "Completions are not stored for retrieval; conversations are: GET /v1/conversations.",
    ),
    "verbosity": (("medium",), "The model has no verbosity setting."),
    "reasoning_effort": (("none",), "The model does no separate reasoning."),
    "audio": ((), "Audio is not supported."),
    "prediction": ((), "Predicted outputs are not supported."),
    "web_search_options": ((), "Web search is not supported."),
    "moderation": ((), "Moderation is not supported."),
    "prompt_cache_options": ((), "The cache follows the conversation and has no options."),
    "prompt_cache_retention": ((), "The cache follows the conversation and has no options."),
}
_LABELS = ("user", "safety_identifier", "prompt_cache_key")
_READ = frozenset(
    {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"}
    | {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"}
    | {"dry_multiplier", "dry_base", "dry_allowed_length"}
    | {"frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "seed", "stop", "ignore_eos"}
    | {"metadata", "conversation", "expect_turn"}
    | {"idempotency_key", "last_event_id", "on_disconnect"}
)
_NOT_OF_TEXT = (
    "refusal",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "audio",
    "annotations",
)
_MESSAGE_FIELDS = frozenset({"role", "content", "name", *_NOT_OF_TEXT})
_PART_FIELDS = frozenset({"type", "text"})
_STREAM_FIELDS = frozenset({"include_usage", "include_obfuscation", "continuous_usage_stats"})
CHAT_FIELDS = _READ | frozenset(_ONLY) | frozenset(_LABELS)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request. `messages` have roles system, user or assistant and end with the user's.

    `conversation_id` set: they are the new messages; None: they are the whole history. `key` is the
    client's idempotency key ("" for none) and `body_hash` what the request asks for; without
    `has_seed` the seed in `sampling` means nothing. `last_event` is the last one the client has of the
    stream that it rejoins.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    usage: StreamUsage = "none"
    metadata: dict[str, str] = field(default_factory=dict)
    conversation_id: str | None = None
    expect_turn: int | None = None
    expect_head: str | None = None
    has_seed: bool = False
    key: str = ""
    body_hash: str = ""
    on_disconnect: OnDisconnect | None = None
    last_event: EventId | None = None

    @property
    def when_left(self) -> OnDisconnect:
        """What a closed connection does: who brought a key is expected back."""
        return self.on_disconnect or ("finish" if self.key else "cancel")


@dataclass(frozen=True, slots=True)
class TurnHeaders:
    """The headers that say something about a turn, as sent; None where absent."""

    conversation: str | None = None
    if_match: str | None = None
    idempotency_key: str | None = None
    last_event_id: str | None = None


NO_HEADERS = TurnHeaders()


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A valid `POST /v1/conversations`."""

    messages: tuple[Message, ...]
    metadata: dict[str, str]


def parse_chat(body: Tree, limits: RequestLimits, headers: TurnHeaders = NO_HEADERS) -> ChatRequest:
    """Parse a tree that passed `strict_json`, and the headers it came with. Raises ServiceError."""
    return _apply_headers(_parse_body(body, limits), headers)


def _parse_body(body: Tree, limits: RequestLimits) -> ChatRequest:
    fields = Fields(body, "", CHAT_FIELDS)
    for name, (accepted, reason) in _ONLY.items():
        _check_only(fields, name, accepted, reason)
    for name in _LABELS:
        fields.text(name, max_chars=MAX_LABEL_CHARS)
    model = fields.text("model", max_chars=MAX_LABEL_CHARS)
    if model is None:
        refuse("missing_field", "The model is missing: see GET /v1/models.", "model")
    messages = _messages(fields.items("messages"), "messages")
    if not messages:
        refuse("missing_field", "At least one message is needed.", "messages")
    if messages[-1].role != "user":
        where = child(child("messages", len(messages) - 1), "role")
        refuse("unsupported_value", "The last message must be the user's.", where)
    stream = fields.boolean("stream")
    conversation_id = _conversation(fields)
    key = fields.text("idempotency_key")
    last_event = fields.text("last_event_id")
    expect_turn = fields.integer("expect_turn", 0, 2**53)
    if expect_turn is not None and conversation_id is None:
        refuse("invalid_value", "expect_turn needs a conversation.", "expect_turn")
    return ChatRequest(
        model=model,
        messages=messages,
        sampling=read_sampling(fields, limits),
        max_tokens=read_max_tokens(fields, limits),
        stop=read_stops(fields.value("stop")),
        ignore_eos=fields.boolean("ignore_eos"),
        stream=stream,
        usage=_stream_usage(fields, stream),
        metadata=_metadata(fields),
        conversation_id=conversation_id,
        expect_turn=expect_turn,
        has_seed=fields.value("seed") is not None,
        key="" if key is None else check_key(key, "idempotency_key"),
        body_hash=body_hash(body),
        on_disconnect=_on_disconnect(fields),
        last_event=None if last_event is None else check_event_id(last_event, "last_event_id"),
    )


def parse_create(body: Tree) -> CreateRequest:
    """Parse the body of `POST /v1/conversations`: `system` or `messages`, `metadata`."""
    fields = Fields(body, "", frozenset({"system", "messages", "metadata"}))
    system = fields.text("system")
    messages = _messages(fields.items("messages"), "messages")
    if system is not None and messages:
        refuse("invalid_value", "Give either system or messages.", "system")
    if len(messages) > MAX_OPENING_MESSAGES:
        refuse("invalid_value", f"At most {MAX_OPENING_MESSAGES} messages.", "messages")
    if system is not None:
        messages = (Message("system", system),)
    return CreateRequest(messages, _metadata(fields))


def _apply_headers(request: ChatRequest, headers: TurnHeaders) -> ChatRequest:
    """What a header says must not contradict the body."""
    changes: dict[str, Any] = {}
    if headers.conversation is not None:
        named = check_conversation_id(headers.conversation, "X-Conversation-Id")
        changes["conversation_id"] = _same(request.conversation_id, named, "conversation")
    if headers.idempotency_key is not None:
        key = check_key(headers.idempotency_key, "Idempotency-Key")
        changes["key"] = _same(request.key or None, key, "idempotency_key")
    if headers.last_event_id is not None:
        seen = check_event_id(headers.last_event_id, "Last-Event-ID")
        changes["last_event"] = _same(request.last_event, seen, "last_event_id")
    if headers.if_match is not None:
        etag = _ETAG.fullmatch(headers.if_match.strip())
        if etag is None:
            refuse("invalid_value", "If-Match must be one ETag as given in a reply.", "If-Match")
        changes["expect_head"] = etag.group(1)
    request = dataclasses.replace(request, **changes)
    if request.expect_head is not None and request.conversation_id is None:
        refuse("invalid_value", "If-Match needs a conversation.", "If-Match")
    if request.last_event is not None and not (request.stream and request.key):
        message = "Only a stream with an idempotency key can be rejoined."
        refuse("invalid_value", message, "last_event_id")
    return request


def _same(in_body: Any, in_header: Any, name: str) -> Any:
    if in_body not in (None, in_header):
        refuse("invalid_value", "A header says otherwise than the body.", name)
    return in_header


def check_conversation_id(value: str, param: str) -> str:
    """The id itself. Raises ServiceError (invalid_conversation_id)."""
    if CONVERSATION_ID.fullmatch(value) is None:
        message = "A conversation id is conv_ and 32 hexadecimal digits."
        refuse("invalid_conversation_id", message, param)
    return value


def _check_only(fields: Fields, name: str, accepted: tuple[Any, ...], reason: str) -> None:
    value = fields.value(name)
    if value is None:
        return
    # `True == 1` in Python, not in JSON.
    if any(type(value) is type(known) and value == known for known in accepted):
        return
    if accepted and not any(type(value) is type(known) for known in accepted):
        allowed_object = name in ("tool_choice", "function_call") and isinstance(value, dict)
        if not allowed_object:
            wrong_type(value, json_type(accepted[0]), fields.at(name))
    refuse("unsupported_value", reason, fields.at(name))


def _messages(values: list[Any], path: str) -> tuple[Message, ...]:
    return tuple(_message(value, child(path, index)) for index, value in enumerate(values))


def _message(value: object, path: str) -> Message:
    if not isinstance(value, dict):
        refuse("invalid_type", f"Expected an object, got {json_type(value)}.", path)
    fields = Fields(value, path, _MESSAGE_FIELDS)
    role = fields.text("role")
    if role is None:
        refuse("missing_field", "A message needs a role.", fields.at("role"))
    if role in ("tool", "function"):
        refuse("unsupported_value", "Tools are not supported.", fields.at("role"))
    if role not in _ROLES:
        refuse("invalid_value", f"Must be one of {', '.join(_ROLES)}.", fields.at("role"))
    for name in _NOT_OF_TEXT:
        if fields.value(name) not in (None, []):
            refuse("unsupported_value", f"{name} is not supported.", fields.at(name))
    # Checked and then left out: chat templates have no place for a speaker's name.
    fields.text("name", max_chars=MAX_LABEL_CHARS)
    return Message(_ROLES[role], _content(fields))


def _content(fields: Fields) -> str:
    content = fields.value("content")
    if isinstance(content, str):
        return content
    path = fields.at("content")
    if content is None:
        refuse("missing_field", "A message needs content.", path)
    if not isinstance(content, list):
        wrong_type(content, "a string or an array of text parts", path)
    if not content:
        refuse("invalid_value", "At least one part is needed.", path)
    return "".join(_part(part, child(path, index)) for index, part in enumerate(content))


def _part(value: object, path: str) -> str:
    if not isinstance(value, dict):
        refuse("invalid_type", f"Expected an object, got {json_type(value)}.", path)
    kind = value.get("type")
    if kind is None:
        refuse("missing_field", "A part needs a type.", child(path, "type"))
    if not isinstance(kind, str):
        wrong_type(kind, "a string", child(path, "type"))
    if kind != "text":
        refuse("unsupported_value", "Only text parts are supported.", child(path, "type"))
    fields = Fields(value, path, _PART_FIELDS)
    text = fields.text("text")
    if text is None:
        refuse("missing_field", "A text part needs text.", fields.at("text"))
    return text


def _on_disconnect(fields: Fields) -> OnDisconnect | None:
    chosen = fields.text("on_disconnect")
    if chosen is not None and chosen not in _LEAVING:
        refuse("invalid_value", "Must be cancel or finish.", "on_disconnect")
    return None if chosen is None else _LEAVING[chosen]


def _stream_usage(fields: Fields, stream: bool) -> StreamUsage:
    if fields.value("stream_options") is None:
        return "none"
    options = fields.members("stream_options")
    if not stream:
        refuse("invalid_value", "stream_options needs stream to be true.", "stream_options")
    inner = Fields(options, "stream_options", _STREAM_FIELDS)
    if inner.boolean("include_obfuscation"):
        where = inner.at("include_obfuscation")
        refuse("unsupported_value", "Obfuscation is not supported.", where)
    last, each = inner.boolean("include_usage"), inner.boolean("continuous_usage_stats")
    if each and not last:
        where = inner.at("continuous_usage_stats")
        refuse("invalid_value", "continuous_usage_stats needs include_usage to be true.", where)
    return "each" if each else "last" if last else "none"


def _metadata(fields: Fields) -> dict[str, str]:
    members = fields.members("metadata")
    if len(members) > MAX_METADATA:
        refuse("invalid_value", f"At most {MAX_METADATA} entries.", "metadata")
    for key, value in members.items():
        where = child("metadata", key)
        if not isinstance(value, str):
            wrong_type(value, "a string", where)
        if not 1 <= len(key) <= 64 or len(value) > 512:
            refuse("invalid_value", "Keys have 1 to 64 characters, values at most 512.", where)
    if len(json.dumps(members)) > MAX_METADATA_BYTES:
        message = f"All entries together take more than {MAX_METADATA_BYTES} bytes as JSON."
        refuse("invalid_value", message, "metadata")
    return dict(members)


def _conversation(fields: Fields) -> str | None:
    value = fields.value("conversation")
    if value is None:
        return None
    where = fields.at("conversation")
    if isinstance(value, dict):
        value = Fields(value, where, frozenset({"id"})).text("id")
        where = child(where, "id")
        if value is None:
            refuse("missing_field", "The id of the conversation is missing.", where)
    if not isinstance(value, str):
        refuse("invalid_type", f"Expected a string, got {json_type(value)}.", where)
    return check_conversation_id(value, where)
