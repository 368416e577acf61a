"""`POST /v1/chat/completions` and `POST /v1/conversations`, parsed strictly.

Every field that OpenAI documents is either honoured or refused as `unsupported_value` with the reason;
a field that nobody documents is refused as `unknown_field`. Null means absent. Booleans are not
numbers. Errors name the path of the value at fault, e.g. `messages[2].content[0].text`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from cluster.conversation import CONVERSATION_ID, Message
from deployments.openai_reply import StreamUsage
from deployments.strict_json import (
    Fields,
    Tree,
    child,
    json_type,
    number,
    refuse,
    wrong_type,
)
from engine.sampling import MAX_TOP_LOGPROBS, SamplingParams

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_LABEL_CHARS = 512
MAX_METADATA = 16
MAX_METADATA_BYTES = 14 * 1024
MAX_OPENING_MESSAGES = 64

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
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
    | {"frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "seed", "stop", "ignore_eos"}
    | {"metadata", "conversation", "expect_turn"}
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
class RequestLimits:
    """What a request may ask for. Token counts; `sampling` holds the defaults of this service."""

    vocab_size: int
    default_max_tokens: int = 512
    max_output_tokens: int = 4096
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request. `messages` have roles system, user or assistant and end with the user's.

    `conversation_id` set: they are the new messages; None: they are the whole history.
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


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A valid `POST /v1/conversations`."""

    messages: tuple[Message, ...]
    metadata: dict[str, str]


def parse_chat(body: Tree, limits: RequestLimits) -> ChatRequest:
    """Parse a tree that passed `strict_json`. Raises ServiceError."""
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
    expect_turn = fields.integer("expect_turn", 0, 2**53)
    if expect_turn is not None and conversation_id is None:
        refuse("invalid_value", "expect_turn needs a conversation.", "expect_turn")
    return ChatRequest(
        model=model,
        messages=messages,
        sampling=_sampling(fields, limits),
        max_tokens=_max_tokens(fields, limits),
        stop=_stops(fields.value("stop")),
        ignore_eos=fields.boolean("ignore_eos"),
        stream=stream,
        usage=_stream_usage(fields, stream),
        metadata=_metadata(fields),
        conversation_id=conversation_id,
        expect_turn=expect_turn,
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


def apply_headers(
    request: ChatRequest, conversation: str | None, if_match: str | None
) -> ChatRequest:
    """Take `X-Conversation-Id` and `If-Match` into the request. Raises ServiceError."""
    if conversation is not None:
        check_conversation_id(conversation, "X-Conversation-Id")
        if request.conversation_id not in (None, conversation):
            message = "The X-Conversation-Id header names another conversation than the body."
            refuse("invalid_value", message, "conversation")
        request = dataclasses.replace(request, conversation_id=conversation)
    if if_match is None:
        return request
    etag = _ETAG.fullmatch(if_match.strip())
    if etag is None:
        refuse("invalid_value", "If-Match must be one ETag as given in a reply.", "If-Match")
    if request.conversation_id is None:
        refuse("invalid_value", "If-Match needs a conversation.", "If-Match")
    return dataclasses.replace(request, expect_head=etag.group(1))


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


def _sampling(fields: Fields, limits: RequestLimits) -> SamplingParams:
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 10),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "top_k": fields.integer("top_k", -1, limits.vocab_size),
        "seed": fields.integer("seed", -(2**63), 2**64 - 1),
        "top_logprobs": fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS),
        "logprobs": fields.boolean("logprobs"),
        "logit_bias": _logit_bias(fields, limits.vocab_size),
    }
    if given["top_logprobs"] is not None and not given["logprobs"]:
        refuse("invalid_value", "top_logprobs needs logprobs to be true.", "top_logprobs")
    if given["top_k"] == -1:
        given["top_k"] = 0
    if given["top_p"] == 0:
        # The nucleus of mass 0 is the one most likely token.
        given["top_p"], given["top_k"] = None, 1
    seed = given["seed"]
    given["seed"] = secrets.randbits(64) if seed is None else seed % 2**64
    chosen = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(limits.sampling, **chosen)


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    members, path = fields.members("logit_bias"), fields.at("logit_bias")
    if len(members) > MAX_LOGIT_BIAS:
        refuse("invalid_value", f"At most {MAX_LOGIT_BIAS} tokens.", path)
    pairs = []
    for key, value in members.items():
        where = child(path, key)
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            message = f"Keys are token ids from 0 to {vocab_size - 1}."
            refuse("invalid_value", message, where)
        pairs.append((int(key), number(value, -100, 100, where)))
    if len({token_id for token_id, _ in pairs}) < len(pairs):
        refuse("invalid_value", "A token id is given twice.", path)
    return tuple(sorted(pairs))


def _max_tokens(fields: Fields, limits: RequestLimits) -> int:
    old = fields.integer("max_tokens", 1, limits.max_output_tokens)
    new = fields.integer("max_completion_tokens", 1, limits.max_output_tokens)
    if old is not None and new is not None and old != new:
        refuse("invalid_value", "max_tokens and max_completion_tokens differ.", "max_tokens")
    chosen = new if new is not None else old
    return limits.default_max_tokens if chosen is None else chosen


def _stops(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list):
        refuse("invalid_type", f"Expected a string or an array, got {json_type(value)}.", "stop")
    if len(listed) > MAX_STOPS:
        refuse("invalid_value", f"At most {MAX_STOPS} stop strings.", "stop")
    stops: list[str] = []
    for index, stop in enumerate(listed):
        where = "stop" if isinstance(value, str) else child("stop", index)
        if not isinstance(stop, str):
            refuse("invalid_type", f"Expected a string, got {json_type(stop)}.", where)
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            refuse("invalid_value", f"Must have 1 to {MAX_STOP_CHARS} characters.", where)
        stops.append(stop)
    return tuple(dict.fromkeys(stops))


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
