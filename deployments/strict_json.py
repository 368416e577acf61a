"""Bytes or Python values in, a JSON tree out that holds no surprises; every refusal names its path.

A tree is dict, list, str, bool, int, float or None. HTTP bodies and the arguments of handle calls go
through the same check, so the same rules hold on both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from deployments.errors import ErrorInfo, ServiceError

Tree = dict[str, Any]

MAX_DEPTH = 16
MAX_INT = 2**64 - 1
_MAX_DIGITS = 40
_SHOWN_NAME = 64


def refuse(code: str, message: str, param: str | None = None) -> NoReturn:
    """Raise the ServiceError of `code`."""
    raise ServiceError(ErrorInfo(code, message, param))


def shown(name: object) -> str:
    """A name from a request, made safe to repeat in an answer: ASCII and short."""
    text = str(name)
    cut = text if len(text) <= _SHOWN_NAME else text[:_SHOWN_NAME] + "..."
    return cut.encode("ascii", "backslashreplace").decode()


def child(path: str, key: str | int) -> str:
    """Path of a member: `messages[2].content[0].text`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{shown(key)}" if path else shown(key)


class _WithDuplicate(dict[str, Any]):
    """An object that named a key twice; found by the tree check, which knows its path."""

    duplicate = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    seen: set[str] = set()
    marked = _WithDuplicate(members)
    for key, _ in pairs:
        if key in seen:
            marked.duplicate = key
            break
        seen.add(key)
    return marked


def _integer(digits: str) -> int | float:
    # Python refuses to convert very long digit strings; infinity is refused later, with its path.
    return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


def decode_json(body: bytes, max_size: int) -> object:
    """Decode a body. What it holds is for `check_object` to judge: duplicate keys, NaN...

    Raises ServiceError: request_too_large, invalid_encoding, invalid_json.
    """
    if len(body) > max_size:
        refuse("request_too_large", f"The body has more than {max_size} bytes.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("invalid_encoding", f"The body is not UTF-8 at byte {error.start}.")
    try:
        value: object = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        refuse("invalid_json", f"The body is not JSON: {error.msg} at {where}.")
    except RecursionError:
        refuse("invalid_json", f"The body is nested more than {MAX_DEPTH} levels deep.")
    return value


def check_object(value: object, max_size: int) -> Tree:
    """Check a value that came as Python objects or from `decode_json`; returns it.

    `max_size` bounds the characters of all strings plus one for every value. Raises ServiceError:
    request_too_large, invalid_encoding, invalid_json, duplicate_key, invalid_type, invalid_value.
    """
    if not isinstance(value, dict):
        refuse("invalid_type", f"The body must be a JSON object, not {json_type(value)}.")
    walk = _Walk(max_size)
    walk.visit(value, None, 0)
    return value


def json_type(value: object) -> str:
    """The name of a value's JSON type, as messages use it."""
    names: tuple[tuple[type, str], ...] = (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (list, "an array"),
        (dict, "an object"),
    )
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


_Where = tuple[Any, str | int] | None
"""A path as (path of the parent, key): made for every value, rendered only for the one at fault."""


def _rendered(where: _Where) -> str | None:
    if where is None:
        return None
    return child(_rendered(where[0]) or "", where[1])


@dataclass(slots=True)
class _Walk:
    room: int

    def visit(self, value: object, where: _Where, depth: int) -> None:
        if depth > MAX_DEPTH:
            message = f"The body is nested more than {MAX_DEPTH} levels deep."
            refuse("invalid_json", message, _rendered(where))
        self._take(1)
        if isinstance(value, str):
            self._text(value, where)
        elif isinstance(value, dict):
            self._members(value, where, depth)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self.visit(item, (where, index), depth + 1)
        elif isinstance(value, float):
            if not math.isfinite(value):
                message = "NaN, Infinity and numbers too large are refused."
                refuse("invalid_value", message, _rendered(where))
        elif isinstance(value, int):
            if abs(value) > MAX_INT:
                message = "Integers beyond 64 bits are refused."
                refuse("invalid_value", message, _rendered(where))
        elif value is not None:
            message = f"{json_type(value)} is not a JSON type."
            refuse("invalid_type", message, _rendered(where))

    def _members(self, value: dict[Any, Any], where: _Where, depth: int) -> None:
        if isinstance(value, _WithDuplicate):
            message = f"The key {shown(value.duplicate)!r} is given twice."
            refuse("duplicate_key", message, _rendered((where, value.duplicate)))
        for key, item in value.items():
            inside = (where, key)
            if not isinstance(key, str):
                message = "The keys of an object must be strings."
                refuse("invalid_type", message, _rendered(where))
            self._text(key, inside)
            self.visit(item, inside, depth + 1)

    def _text(self, text: str, where: _Where) -> None:
        self._take(len(text))
        if text.isascii():
            return
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"The text holds a lone surrogate at character {error.start}."
            refuse("invalid_encoding", message, _rendered(where))

    def _take(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            refuse("request_too_large", "The request is larger than this service accepts.")


class Fields:
    """Typed access to the members of an object; null is absent, unknown names are refused."""

    def __init__(self, body: Mapping[str, Any], path: str, known: frozenset[str]) -> None:
        self._body = body
        self.path = path
        for name in body:
            if name not in known:
                where = child(path, name)
                refuse("unknown_field", f"The field {shown(name)!r} is not known.", where)

    def at(self, name: str) -> str:
        return child(self.path, name)

    def value(self, name: str) -> Any:
        return self._body.get(name)

    def typed(self, name: str, kind: type, expected: str) -> Any:
        value = self.value(name)
        if value is not None and not isinstance(value, kind):
            wrong_type(value, expected, self.at(name))
        return value

    def text(self, name: str, max_chars: int | None = None) -> str | None:
        value: str | None = self.typed(name, str, "a string")
        if value is not None and max_chars is not None and len(value) > max_chars:
            refuse("invalid_value", f"At most {max_chars} characters.", self.at(name))
        return value

    def items(self, name: str) -> list[Any]:
        value: list[Any] | None = self.typed(name, list, "an array")
        return [] if value is None else value

    def members(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] | None = self.typed(name, dict, "an object")
        return {} if value is None else value

    def boolean(self, name: str) -> bool:
        return bool(self.typed(name, bool, "a boolean"))

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            wrong_type(value, "an integer", self.at(name))
        _check_range(value, low, high, self.at(name))
        return int(value)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.value(name)
        return None if value is None else number(value, low, high, self.at(name))


def wrong_type(value: object, expected: str, path: str) -> NoReturn:
    """Refuse a value of another type than `expected`."""
    refuse("invalid_type", f"Expected {expected}, got {json_type(value)}.", path)


def _check_range(value: float, low: float, high: float, path: str) -> None:
    if not low <= value <= high:
        refuse("invalid_value", f"Must be from {low} to {high}.", path)


def number(value: object, low: float, high: float, path: str) -> float:
    """A number in low..high; a boolean is none. Raises ServiceError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse("invalid_type", f"Expected a number, got {json_type(value)}.", path)
    _check_range(value, low, high, path)
    return float(value)
