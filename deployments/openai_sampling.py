"""The fields of a chat completion that say how tokens are drawn, and when the reply ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from deployments.strict_json import Fields, child, json_type, number, refuse
from engine.sampling import MAX_TOP_LOGPROBS, SamplingParams

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may ask for. Token counts; `sampling` holds the defaults of this service."""

    vocab_size: int
    default_max_tokens: int = 512
    max_output_tokens: int = 4096
    sampling: SamplingParams = field(default_factory=SamplingParams)


def read_sampling(fields: Fields, limits: RequestLimits) -> SamplingParams:
    """The service's defaults with what the request changes. Raises ServiceError, as all of these."""
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 10),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "dry_multiplier": fields.number("dry_multiplier", 0, 5),
        "dry_base": fields.number("dry_base", 1, 4),
        "dry_allowed_length": fields.integer("dry_allowed_length", 1, 64),
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
    if given["seed"] is not None:
        given["seed"] %= 2**64
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


def read_max_tokens(fields: Fields, limits: RequestLimits) -> int:
    """Under its old name or its new one."""
    old = fields.integer("max_tokens", 1, limits.max_output_tokens)
    new = fields.integer("max_completion_tokens", 1, limits.max_output_tokens)
    if old is not None and new is not None and old != new:
        refuse("invalid_value", "max_tokens and max_completion_tokens differ.", "max_tokens")
    chosen = new if new is not None else old
    return limits.default_max_tokens if chosen is None else chosen


def read_stops(value: object) -> tuple[str, ...]:
    """Stop strings, each once."""
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
