"""A chat template as pieces that can be appended turn by turn.

A template is a function of the whole transcript; a cache wants only what is new. `ChatPieces` says what
each message adds after the one before it, so that the pieces put together equal the template rendered on
the whole transcript. `engine_build.chat_template` derives and verifies them; they live in chat.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine_build.spec import SpecError

CHAT_VERSION = 1
START = "start"
ROLES = ("system", "user", "assistant")

Trim = Literal["none", "left", "right", "both"]
Slot = Literal["content", "system"]


@dataclass(frozen=True, slots=True)
class Run:
    """Text of the template (special-token strings are tokens) or, if `plain`, of a message (they are not)."""

    text: str
    plain: bool = False


@dataclass(frozen=True, slots=True)
class SlotPart:
    """Where a message's content goes, stripped as the template strips it there.

    "system" stands for a system message that is rendered inside the next one.
    """

    slot: Slot
    trim: Trim = "none"


Part = Run | SlotPart
Parts = tuple[Part, ...]


class ChatRolesError(ValueError):
    """The template has no form for this message here. `index` is the message's, `field` role or content."""

    def __init__(self, index: int, field: str, problem: str) -> None:
        super().__init__(problem)
        self.index = index
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class ChatPieces:
    """What each message adds, keyed by (role before it, its role); the role before the first is "start".

    `generation[role]`: what comes after a message of that role for the model to reply. `closing`: what
    follows a reply. `reply_only`: the end of a generation prompt that the template leaves out of replies
    further back (Qwen3's empty thinking block); it stays in the cache. `pinned[role]`: what a
    conversation begins with (after `role`, start or system) whatever the first user message says.
    `nonempty`: roles whose empty content the template renders in another way, so that it is refused.
    """

    messages: dict[tuple[str, str], Parts]
    generation: dict[str, str]
    closing: str
    reply_only: str
    pinned: dict[str, Parts]
    nonempty: frozenset[str]
    eos_ids: tuple[int, ...]

    def runs(
        self, messages: Sequence[tuple[str, str]], previous: str = START, generate: bool = False
    ) -> list[Run]:
        """The runs that `messages` (role, content) add after a message of role `previous`.

        With `generate`, up to where the model's reply starts. Raises ChatRolesError.
        """
        runs: list[Run] = []
        folded = ""
        for index, (role, content) in enumerate(messages):
            parts = self.messages.get((previous, role))
            if parts is None:
                where = "first" if previous == START else f"after a {previous} message"
                raise ChatRolesError(
                    index, "role", f"this model's chat template takes no {role} message {where}"
                )
            if not content.strip() and role in self.nonempty:
                raise ChatRolesError(
                    index, "content", f"this model's chat template takes no empty {role} message"
                )
            runs += _filled(parts, content, folded)
            folded, previous = content, role
        if generate:
            if previous not in self.generation:
                raise ChatRolesError(
                    max(0, len(messages) - 1),
                    "role",
                    f"this model's chat template has no reply after a {previous} message",
                )
            runs.append(Run(self.generation[previous]))
        return runs

    def pinned_runs(self, system: Sequence[str]) -> list[Run]:
        """The runs of the pinned prefix under these system prompts. Raises ChatRolesError."""
        messages = [("system", content) for content in system]
        runs = self.runs(messages)
        last = system[-1] if system else ""
        return runs + _filled(self.pinned.get("system" if system else START, ()), "", last)

    def to_json(self) -> str:
        fields = {
            "version": CHAT_VERSION,
            "messages": {
                f"{before}>{role}": _to_list(parts)
                for (before, role), parts in self.messages.items()
            },
            "generation": self.generation,
            "closing": self.closing,
            "reply_only": self.reply_only,
            "pinned": {role: _to_list(parts) for role, parts in self.pinned.items()},
            "nonempty": sorted(self.nonempty),
            "eos_ids": list(self.eos_ids),
        }
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ChatPieces:
        """Inverse of `to_json`. Raises SpecError for another version or a missing field."""
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields["version"] != CHAT_VERSION:
                raise ValueError(f"version {fields['version']!r}")
            return cls(
                messages={
                    (key.split(">")[0], key.split(">")[1]): _from_list(parts)
                    for key, parts in fields["messages"].items()
                },
                generation=fields["generation"],
                closing=fields["closing"],
                reply_only=fields["reply_only"],
                pinned={role: _from_list(parts) for role, parts in fields["pinned"].items()},
                nonempty=frozenset(fields["nonempty"]),
                eos_ids=tuple(fields["eos_ids"]),
            )
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise SpecError(
                "chat.json", str(error), "Build the engine again with `sinkserve build`"
            ) from error


def _trimmed(content: str, trim: Trim) -> str:
    if trim in ("left", "both"):
        content = content.lstrip()
    if trim in ("right", "both"):
        content = content.rstrip()
    return content


def joined(runs: Sequence[Run]) -> str:
    """The text of runs: what the template would have rendered."""
    return "".join(run.text for run in runs)


def _filled(parts: Parts, content: str, system: str) -> list[Run]:
    values = {"content": content, "system": system}
    return [
        Run(_trimmed(values[part.slot], part.trim), plain=True)
        if isinstance(part, SlotPart)
        else part
        for part in parts
    ]


def _to_list(parts: Parts) -> list[str | dict[str, str]]:
    return [
        {"slot": part.slot, "trim": part.trim} if isinstance(part, SlotPart) else part.text
        for part in parts
    ]


def _from_list(items: list[Any]) -> Parts:
    return tuple(
        Run(item) if isinstance(item, str) else SlotPart(item["slot"], item["trim"])
        for item in items
    )
