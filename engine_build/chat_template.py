"""Derive `ChatPieces` from a chat template by rendering it with marked contents, and verify them.

A template is refused when it is not append-only: when a later message changes what was rendered before
it, the cached tokens could not stay. Two departures are known and allowed, both about replies: white
space in front of a reply, which the model writes itself, and the end of a generation prompt that the
template leaves out of older replies (Qwen3's empty thinking block; thinking is switched off).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import cast

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from engine_build.chat import (
    ROLES,
    START,
    ChatPieces,
    ChatRolesError,
    Part,
    Parts,
    Run,
    SlotPart,
    Trim,
    joined,
)
from engine_build.spec import SpecError
from engine_build.text_runs import RunEncoder
from engine_build.tokenizer import TextSource

Messages = list[tuple[str, str]]

# Templates may print the day (Llama 3.2): a build must not depend on it. This is their own default.
FIXED_DATE = "26 Jul 2024"
_render = cast("Callable[..., tuple[list[str], object]]", render_jinja_template)
MARK = "\ue000{}\ue001"
NOW, EARLIER, LATER = MARK.format("now"), MARK.format("earlier"), MARK.format("later")
PADDING = " \n\t "
VERIFIED_MESSAGES = 4
FIX = "Build with another chat template (`chat_template.jinja` beside the weights)"


class _Refused(Exception):
    """The template raised: it has no form for these messages."""


class _Template:
    def __init__(self, source: TextSource) -> None:
        if not source.chat_template:
            raise SpecError("chat_template", "the model has none", FIX)
        self._text = source.chat_template
        self._variables = {
            "bos_token": source.bos_token or "",
            "eos_token": source.eos_token or "",
            "enable_thinking": False,
            "date_string": FIXED_DATE,
        }

    def render(self, messages: Messages, generate: bool = False) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            rendered, _ = _render(
                [conversation],
                chat_template=self._text,
                add_generation_prompt=generate,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
            raise _Refused(str(error)) from error
        return rendered[0]

    def render_or_nothing(self, messages: Messages) -> str:
        """Templates that render the system message inside the next one may refuse it alone."""
        try:
            return self.render(messages)
        except _Refused:
            return ""


def derive_chat_pieces(source: TextSource) -> ChatPieces:
    """The pieces of a checkpoint's chat template, verified. Raises SpecError naming the field at fault."""
    template = _Template(source)
    messages = _messages(template)
    if (START, "user") not in messages or ("user", "assistant") not in messages:
        raise SpecError("chat_template", "it renders no user message and reply", FIX)
    generation, reply_only = _generation(template, messages)
    closing = _closing(messages)
    pieces = ChatPieces(
        messages=messages,
        generation=generation,
        closing=closing,
        reply_only=reply_only,
        pinned=_pinned(messages),
        nonempty=frozenset(),
        eos_ids=_eos_ids(source, closing),
    )
    _verify_text(template, pieces)
    _verify_tokens(source.tokenizer, pieces)
    empty = {role for role in ROLES if _first_difference(template, pieces, {role: ""})}
    return dataclasses.replace(pieces, nonempty=frozenset(empty))


def _messages(template: _Template) -> dict[tuple[str, str], Parts]:
    messages: dict[tuple[str, str], Parts] = {}
    for before, role in itertools.product((START, *ROLES), ROLES):
        try:
            parts = _parts(_added(template, before, role), _trims(template, before, role))
        except _Refused:
            continue
        if _slots(parts) >= {"content"} or (before, role) == (START, "system"):
            messages[before, role] = parts
    if "content" in _slots(messages.get((START, "system"), ())):
        return messages
    # Llama 2: the system message is rendered inside the next one, or silently dropped.
    messages = {
        key: parts
        for key, parts in messages.items()
        if key[0] != "system" or "system" in _slots(parts)
    }
    if not any(before == "system" for before, _ in messages):
        messages.pop((START, "system"), None)
    return messages


def _slots(parts: Parts) -> set[str]:
    return {part.slot for part in parts if isinstance(part, SlotPart)}


def _context(before: str, content: str = EARLIER) -> Messages:
    if before == "assistant":
        return [("user", "hello"), ("assistant", content)]
    return [] if before == START else [(before, content)]


def _added(template: _Template, before: str, role: str) -> str:
    """What a message of `role` with content NOW adds after a message of role `before`."""
    context = _context(before)
    earlier = "" if before == START else template.render_or_nothing(context)
    whole = template.render([*context, (role, NOW)])
    end = len(whole)
    if role == "assistant" and NOW in whole:
        tail = whole[_end_of(NOW, whole) :]
        with contextlib.suppress(_Refused):
            whole = template.render([*context, (role, NOW), ("user", LATER)])
        end = _boundary(NOW, tail, whole)
    if EARLIER in earlier:
        start = _boundary(EARLIER, earlier[_end_of(EARLIER, earlier) :], whole)
    elif whole.startswith(earlier):
        start = len(earlier)
    else:
        raise _not_append_only(f"a {role} message changes what comes before it")
    return whole[start:end]


def _end_of(mark: str, text: str) -> int:
    return text.index(mark) + len(mark)


def _boundary(mark: str, tail: str, text: str) -> int:
    """Where, in `text`, the message that holds `mark` ends, given what followed it when it was last."""
    if mark not in text:
        raise _not_append_only("a later message removes an earlier one")
    end = _end_of(mark, text)
    if not text.startswith(tail, end):
        raise _not_append_only("a later message changes the end of an earlier one")
    return end + len(tail)


def _not_append_only(problem: str) -> SpecError:
    return SpecError("chat_template", f"not append-only: {problem}", FIX)


def _trims(template: _Template, before: str, role: str) -> dict[str, Trim]:
    """How the template strips each mark's content, where it is shown."""
    padded: Messages = [
        *_context(before, PADDING + EARLIER + PADDING),
        (role, PADDING + NOW + PADDING),
    ]
    text = template.render_or_nothing([*padded, ("user", LATER)])
    if NOW not in text:
        text = template.render(padded)
    return {mark: _trim(text, mark) for mark in (NOW, EARLIER) if mark in text}


def _trim(text: str, mark: str) -> Trim:
    left, right = text.split(mark)[:2]
    kinds: dict[tuple[bool, bool], Trim] = {
        (True, True): "none",
        (False, True): "left",
        (True, False): "right",
        (False, False): "both",
    }
    return kinds[left.endswith(PADDING), right.startswith(PADDING)]


def _parts(text: str, trims: dict[str, Trim]) -> Parts:
    parts: list[Part] = []
    for piece in re.split(f"({NOW}|{EARLIER})", text):
        if piece == NOW:
            parts.append(SlotPart("content", trims.get(NOW, "none")))
        elif piece == EARLIER:
            parts.append(SlotPart("system", trims.get(EARLIER, "none")))
        elif piece:
            parts.append(Run(piece))
    slots = [part for part in parts if isinstance(part, SlotPart)]
    if len(slots) != len(set(slots)):
        raise SpecError("chat_template", "it renders a message's content twice", FIX)
    return tuple(parts)


def _head(parts: Parts) -> str:
    """The text before the content; "" also when the content comes first."""
    return parts[0].text if isinstance(parts[0], Run) else ""


def _tail(parts: Parts) -> str:
    return parts[-1].text if isinstance(parts[-1], Run) else ""


def _generation(
    template: _Template, messages: dict[tuple[str, str], Parts]
) -> tuple[dict[str, str], str]:
    """The generation prompt after each role that has one, and its end that older replies lack."""
    prompts: dict[str, str] = {}
    for role in ROLES:
        shown = role != "system" or _shows_system_alone(messages)
        if (role, "assistant") not in messages or not shown:
            continue
        try:
            before = template.render(_context(role))
            after = template.render(_context(role), generate=True)
        except _Refused:
            continue
        if after.startswith(before):
            prompts[role] = after[len(before) :]
    if "user" not in prompts:
        raise _not_append_only("the generation prompt changes what comes before it")
    reply_only = prompts["user"].removeprefix(_head(messages["user", "assistant"]))
    fitting: dict[str, str] = {}
    for role, prompt in prompts.items():
        head = _head(messages[role, "assistant"])
        if prompt == head + reply_only:
            fitting[role] = prompt
        elif head.startswith(prompt) and not head[len(prompt) :].strip():
            fitting[role], reply_only = prompt, ""
    if reply_only:
        fitting.pop("assistant", None)
    if "user" not in fitting:
        raise SpecError("chat_template", "replies do not start as its generation prompt does", FIX)
    return fitting, reply_only


def _shows_system_alone(messages: dict[tuple[str, str], Parts]) -> bool:
    return "content" in _slots(messages.get((START, "system"), ()))


def _closing(messages: dict[tuple[str, str], Parts]) -> str:
    tails = {_tail(parts) for (_, role), parts in messages.items() if role == "assistant"}
    if len(tails) != 1:
        raise SpecError("chat_template", "replies end in more than one way", FIX)
    return tails.pop()


def _pinned(messages: dict[tuple[str, str], Parts]) -> dict[str, Parts]:
    """What precedes the first user message's own header. Its last token may still merge with it."""
    again = messages.get(("assistant", "user"), ())
    header = _head(again) if again else ""
    pinned: dict[str, Parts] = {}
    for before in (START, "system"):
        parts = messages.get((before, "user"), ())
        prefix = list(itertools.takewhile(lambda part: not _is_content(part), parts))
        if prefix and isinstance(prefix[-1], Run):
            prefix[-1] = Run(prefix[-1].text.removesuffix(header))
        pinned[before] = tuple(part for part in prefix if part != Run(""))
    return pinned


def _is_content(part: Part) -> bool:
    return isinstance(part, SlotPart) and part.slot == "content"


def _eos_ids(source: TextSource, closing: str) -> tuple[int, ...]:
    """The tokens that end a reply: the checkpoint's, and the one the template closes a reply with."""
    encoder = RunEncoder(source.tokenizer)
    first = encoder.encode([Run(closing.lstrip())])[:1]
    ends = set(source.eos_ids) | (set(first) & encoder.special_ids)
    if not ends:
        raise SpecError("eos_token", "no token ends a reply", "Set eos_token_id in the checkpoint")
    return tuple(sorted(ends))


def _verify_text(template: _Template, pieces: ChatPieces) -> None:
    problem = _first_difference(template, pieces, {})
    if problem is not None:
        raise _not_append_only(problem)


def _first_difference(
    template: _Template, pieces: ChatPieces, contents: dict[str, str]
) -> str | None:
    """Compare with the template every transcript of up to VERIFIED_MESSAGES messages the pieces allow."""
    for count, padding in itertools.product(range(1, VERIFIED_MESSAGES + 1), (PADDING, "\n ")):
        for roles in itertools.product(ROLES, repeat=count):
            messages = [
                (role, contents.get(role, f"{padding}Größe {number}: 😀\nnext{padding}"))
                for number, role in enumerate(roles)
            ]
            try:
                if not _same(template, pieces, messages):
                    return f"the transcript {' '.join(roles)} is not the sum of its messages"
            except ChatRolesError:
                continue
            except _Refused:
                return f"it refuses the transcript {' '.join(roles)}"
    return None


def _same(template: _Template, pieces: ChatPieces, messages: Messages) -> bool:
    expected = joined(pieces.runs(messages))
    last = messages[-1][0]
    if last == "system" and not _shows_system_alone(pieces.messages):
        return True  # it shows in the next message only
    if last == "assistant" and pieces.reply_only:
        return template.render([*messages, ("user", LATER)]).startswith(expected)
    if template.render(messages) != expected:
        return False
    prompt = pieces.generation.get(last)
    return prompt is None or template.render(messages, generate=True) == expected + prompt


def _verify_tokens(tokenizer: Tokenizer, pieces: ChatPieces) -> None:
    """Stretch by stretch must equal the tokenizer on the whole text."""
    encoder = RunEncoder(tokenizer)
    for system in ([], [("system", " Sei kurz. 日本語\n")]):
        for turns in range(1, 4):
            messages: Messages = list(system)
            for turn in range(turns):
                messages += [("user", f"  Grüße {turn}!\n\n"), ("assistant", f"Ja 😀 {turn} \n")]
            try:
                runs = pieces.runs([*messages, ("user", "x = [1,  2]")], generate=True)
            except ChatRolesError:
                continue
            whole = tokenizer.encode(joined(runs), add_special_tokens=False).ids
            if encoder.encode(runs) != whole:
                raise SpecError(
                    "tokenizer.json",
                    "a text encodes differently in stretches between special tokens",
                    "Use the model's own fast tokenizer",
                )
