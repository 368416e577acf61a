"""Strict parsing: every documented field is honoured or refused, values arrive where they belong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from cluster.conversation import Message
from deployments.errors import ErrorInfo, ServiceError
from deployments.openai_sampling import RequestLimits
from deployments.openai_schema import (
    CHAT_FIELDS,
    NO_HEADERS,
    ChatRequest,
    TurnHeaders,
    parse_chat,
    parse_create,
)
from deployments.strict_json import MAX_DEPTH, Tree, check_object, decode_json
from deployments.turn_identity import EventId, request_hash
from engine.sampling import SamplingParams

LIMITS = RequestLimits(vocab_size=1000, sampling=SamplingParams(temperature=0.6, top_p=0.9))
ID = "conv_" + "a" * 32
HEAD = "b" * 64
MAX_SIZE = 1 << 16


def parse_object(body: bytes, max_size: int) -> Tree:
    return check_object(decode_json(body, max_size), max_size)


def parse(headers: TurnHeaders = NO_HEADERS, /, **fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return parse_chat(parse_object(json.dumps(body).encode(), MAX_SIZE), LIMITS, headers)


def refusal(**fields: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        parse(**fields)
    return caught.value.info.code


def documented_fields() -> set[str]:
    both = (CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming)
    return {name for params in both for name in get_type_hints(params)}


def test_every_documented_field_is_known() -> None:
    assert len(documented_fields()) > 30
    assert documented_fields() <= CHAT_FIELDS


@pytest.mark.parametrize("name", sorted(CHAT_FIELDS))
def test_no_known_field_is_ignored(name: str) -> None:
    """A value that no field can take is refused by name."""
    with pytest.raises(ServiceError) as caught:
        parse(**{name: {"no": [{"field": "takes this"}]}})
    info = caught.value.info
    assert info.code in ("invalid_type", "unsupported_value", "invalid_value", "unknown_field")
    assert (info.param or "").startswith(name)


@pytest.mark.parametrize("name", sorted(CHAT_FIELDS - {"model", "messages"}))
def test_null_is_absent(name: str) -> None:
    plain, with_null = parse(seed=1), parse(**{"seed": 1, name: None})
    if name != "seed":
        assert with_null == plain
        assert with_null.body_hash == plain.body_hash


def test_defaults() -> None:
    request = parse()
    assert request.messages == (Message("user", "Hi"),)
    assert request.max_tokens == LIMITS.default_max_tokens
    assert (request.sampling.temperature, request.sampling.top_p) == (0.6, 0.9)
    assert not request.stream
    assert request.conversation_id is None


def test_seeds() -> None:
    assert parse(seed=0).sampling.seed == 0
    assert parse(seed=-1).sampling.seed == 2**64 - 1
    assert parse(seed=2**64 - 1).sampling.seed == 2**64 - 1
    assert parse(seed=0).has_seed
    assert not parse().has_seed


def test_sampling_fields_arrive() -> None:
    given = {
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "dry_multiplier": 0.8,
        "dry_base": 1.5,
        "dry_allowed_length": 3,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 5,
    }
    sampling = parse(**given, logit_bias={"9": -100, "5": 2.5}).sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert sampling.logit_bias == ((5, 2.5), (9, -100.0))
    assert isinstance(sampling.temperature, float)


def test_a_bias_is_for_a_token_of_the_vocabulary() -> None:
    assert parse(logit_bias={"999": 1}).sampling.logit_bias == ((999, 1.0),)
    with pytest.raises(ServiceError) as refusal:
        parse(logit_bias={"1000": 1})
    assert (refusal.value.info.code, refusal.value.info.param) == (
        "invalid_value",
        "logit_bias.1000",
    )


def test_an_empty_nucleus_is_the_most_likely_token() -> None:
    sampling = parse(top_p=0, top_k=50).sampling
    assert (sampling.top_k, sampling.top_p) == (1, 0.9)
    assert parse(top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 4096}, 4096),
    ],
)
def test_output_limits(fields: dict[str, int], limit: int) -> None:
    assert parse(**fields).max_tokens == limit
    assert refusal(max_tokens=4097) == "invalid_value"


def test_stop_strings() -> None:
    assert parse(stop="a").stop == ("a",)
    assert parse(stop=["b", "a", "b"]).stop == ("b", "a")
    assert parse(stop=[]).stop == ()
    assert len(parse(stop=[str(i) for i in range(16)]).stop) == 16


def test_messages_become_plain() -> None:
    request = parse(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "a", "name": "Ann"},
            {
                "role": "assistant",
                "content": "b",
                "refusal": None,
                "tool_calls": None,
                "audio": None,
            },
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("c", "", "d")]},
        ]
    )
    assert request.messages == (
        Message("system", "Be brief."),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "cd"),
    )


def test_streams() -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    assert (request.stream, request.usage) == (True, "last")
    assert parse(stream=True).usage == "none"
    assert parse(stream=True, stream_options={"include_obfuscation": False}).usage == "none"
    both = {"include_usage": True, "continuous_usage_stats": True}
    assert parse(stream=True, stream_options=both).usage == "each"
    alone = {"continuous_usage_stats": True}
    assert refusal(stream=True, stream_options=alone) == "invalid_value"
    assert refusal(stream=True, stream_options={"include_obfuscation": True}) == "unsupported_value"
    assert refusal(stream=True, stream_options={"usage": True}) == "unknown_field"
    assert refusal(stream=False, stream_options={}) == "invalid_value"


def test_conversations() -> None:
    assert parse(conversation=ID).conversation_id == ID
    assert parse(conversation={"id": ID}, expect_turn=3).expect_turn == 3
    assert refusal(conversation={"id": ID, "x": 1}) == "unknown_field"


def test_headers() -> None:
    named = parse(TurnHeaders(conversation=ID, if_match=f'"{HEAD}"'))
    assert (named.conversation_id, named.expect_head) == (ID, HEAD)
    assert parse(TurnHeaders(conversation=ID), conversation=ID).conversation_id == ID
    for etag in (HEAD, f'W/"{HEAD}"', "*", f'"{HEAD}", "{HEAD}"', ""):
        with pytest.raises(ServiceError, match="invalid_value"):
            parse(TurnHeaders(conversation=ID, if_match=etag))


def test_keys_come_in_the_body_or_in_a_header() -> None:
    for asked in (
        parse(idempotency_key="k-1"),
        parse(TurnHeaders(idempotency_key="k-1")),
        parse(TurnHeaders(idempotency_key="k-1"), idempotency_key="k-1"),
    ):
        assert (asked.key, asked.when_left) == ("k-1", "finish")
    assert (parse().key, parse().when_left) == ("", "cancel")
    assert parse(idempotency_key="k", on_disconnect="cancel").when_left == "cancel"
    assert parse(on_disconnect="finish").when_left == "finish"
    for key in ("", " ", "a b", "a\n", "\u00e9", "k" * 256, "\x00", "k\x7f"):
        assert refusal(idempotency_key=key) == "invalid_value", key
        with pytest.raises(ServiceError, match="Idempotency-Key"):
            parse(TurnHeaders(idempotency_key=key))
    with pytest.raises(ServiceError, match="idempotency_key"):
        parse(TurnHeaders(idempotency_key="k-1"), idempotency_key="k-2")


def test_a_stream_with_a_key_can_be_rejoined() -> None:
    mine: dict[str, Any] = {"stream": True, "idempotency_key": "k"}
    assert parse(**mine, last_event_id="3.120").last_event == EventId(3, 120)
    assert parse(TurnHeaders(last_event_id="3.0"), **mine).last_event == EventId(3, 0)
    assert str(EventId(3, 120)) == "3.120"
    for event_id in ("", "3", "3.", "3.1.1", "-3.1", "3.1 ", "a.b", "\u0663.1", "3." + "1" * 16):
        assert refusal(**mine, last_event_id=event_id) == "invalid_value", event_id
    assert refusal(idempotency_key="k", last_event_id="3.1") == "invalid_value"
    assert refusal(stream=True, last_event_id="3.1") == "invalid_value"


def test_the_hash_is_of_what_is_asked_for() -> None:
    plain = parse().body_hash
    delivery: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "idempotency_key": "k",
        "last_event_id": "1.1",
        "on_disconnect": "finish",
        "conversation": ID,
        "expect_turn": 3,
    }
    assert parse(**delivery).body_hash == plain
    asked: list[dict[str, Any]] = [
        {"seed": 1},
        {"max_tokens": 2},
        {"stop": "x"},
        {"model": "n"},
        {"metadata": {"a": ""}},
    ]
    asked += [{"messages": [{"role": "user", "content": "Ho"}]}, {"temperature": 0}]
    assert len({plain, *[parse(**fields).body_hash for fields in asked]}) == 1 + len(asked)
    # ... and of the conversation that it names, however it names it.
    assert request_hash(plain, None) != request_hash(plain, ID)


def test_creating() -> None:
    assert parse_create({}).messages == ()
    assert parse_create({"system": "x"}).messages == (Message("system", "x"),)
    made = parse_create({"messages": [{"role": "user", "content": "a"}], "metadata": {"k": "v"}})
    assert (made.messages, made.metadata) == ((Message("user", "a"),), {"k": "v"})


def test_depth_and_size_are_exact() -> None:
    def deep(levels: int) -> Any:
        value: Any = "x"
        for _ in range(levels):
            value = [value]
        return value

    assert check_object({"a": deep(MAX_DEPTH - 1)}, 100)
    with pytest.raises(ServiceError, match="invalid_json"):
        check_object({"a": deep(MAX_DEPTH)}, 100)
    assert parse_object(b'{"a": "1234"}', 13)
    with pytest.raises(ServiceError, match="request_too_large"):
        parse_object(b'{"a": "1234"}', 12)
    # As objects: two values, the key, the text.
    assert check_object({"a": "1234"}, 7)
    with pytest.raises(ServiceError, match="request_too_large"):
        check_object({"a": "1234"}, 6)


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["user", "text", ID, "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*sorted(CHAT_FIELDS), "role", "content", "id"]), inner)
    ),
    max_leaves=12,
)


def outcome(parse_tree: Callable[[], Tree]) -> ChatRequest | ErrorInfo:
    try:
        request = parse_chat(parse_tree(), LIMITS)
    except ServiceError as error:
        return error.info
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=0))


@given(st.dictionaries(st.sampled_from(sorted(CHAT_FIELDS)) | st.text(max_size=4), trees))
@settings(max_examples=100, deadline=None)
def test_whatever_comes_it_is_parsed_or_refused(body: dict[str, Any]) -> None:
    """And HTTP and handles agree."""
    good = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    for sent in (body, {**good, **body}, {**body, **good}):
        over_http = outcome(partial(parse_object, json.dumps(sent).encode(), MAX_SIZE))
        assert over_http == outcome(partial(check_object, sent, MAX_SIZE))
        if isinstance(over_http, ErrorInfo):
            assert over_http.kind.status in (400, 413)
            assert json.dumps(over_http.body(), ensure_ascii=False).encode()


@given(st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_whatever_bytes_come(body: bytes) -> None:
    result = outcome(partial(parse_object, body, MAX_SIZE))
    assert isinstance(result, ErrorInfo)
    assert result.kind.status == 400
