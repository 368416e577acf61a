"""Runs of template text and message text -> token ids, as encoding the whole text would give them.

Special tokens cut a text into stretches that a tokenizer encodes on their own, so encoding stretch by
stretch equals encoding the whole, while special-token strings inside messages stay plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from engine_build.chat import Run


class RunEncoder:
    """Encodes runs with one tokenizer. Keeps its own copies; the caller's tokenizer is not changed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        text = tokenizer.to_str()
        fields: dict[str, Any] = json.loads(text)
        self._specials = {
            token["content"]: token for token in fields["added_tokens"] if token["special"]
        }
        self._by_id = {token["id"]: token for token in self._specials.values()}
        ordered = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(token) for token in ordered) or r"(?!)")
        prefixed = _plain_text_tokenizer(text)
        scheme = _remove_space_prefix(fields)
        bare = prefixed if scheme is None else _plain_text_tokenizer(json.dumps(fields))
        # SentencePiece sets a space before a text ("first") or before each stretch (the legacy way).
        self._at_start = prefixed
        self._after_special = bare if scheme == "first" else prefixed
        self._inside = bare

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens: hidden from the text of a reply."""
        return frozenset(self._by_id)

    def encode(
        self, runs: Sequence[Run], after: int | None = None, inside: bool = False
    ) -> list[int]:
        """Token ids of `runs`: at the start of a text, right after the special token `after`, or inside
        a text that went on in plain text so far."""
        ids: list[int] = []
        stretch = ""
        previous = after
        plain = self._inside if inside else self._at_start if after is None else self._after_special
        for piece in self._pieces(runs):
            if isinstance(piece, str):
                stretch += piece
                continue
            ids += self._stretch(plain, stretch, previous, piece)
            ids.append(piece)
            previous, stretch, plain = piece, "", self._after_special
        return ids + self._stretch(plain, stretch, previous, None)

    def split_after_last_special(self, text: str) -> tuple[str, str]:
        """Template text cut after its last special token."""
        end = max((match.end() for match in self._pattern.finditer(text)), default=0)
        return text[:end], text[end:]

    def _pieces(self, runs: Sequence[Run]) -> list[int | str]:
        pieces: list[int | str] = []
        for run in runs:
            if run.plain:
                pieces.append(run.text)
                continue
            done = 0
            for match in self._pattern.finditer(run.text):
                pieces += [run.text[done : match.start()], self._specials[match.group()]["id"]]
                done = match.end()
            pieces.append(run.text[done:])
        return pieces

    def _stretch(
        self, tokenizer: Tokenizer, text: str, previous: int | None, following: int | None
    ) -> list[int]:
        """Encode plain text between two special tokens, which may swallow the space beside them."""
        if previous is not None and self._by_id[previous]["rstrip"]:
            text = text.lstrip()
        if following is not None and self._by_id[following]["lstrip"]:
            text = text.rstrip()
        return list(tokenizer.encode(text, add_special_tokens=False).ids) if text else []


def _plain_text_tokenizer(text: str) -> Tokenizer:
    tokenizer: Tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _remove_space_prefix(fields: dict[str, Any]) -> str | None:
    """Take the space that SentencePiece tokenizers set before a text out of `fields`, in place.

    Returns how it was set: None, "first" (only at the start of the text) or "always".
    """
    found: str | None = None
    for part in _sub_parts(fields.get("normalizer"), "normalizers"):
        if part.get("type") == "Prepend":
            part["prepend"], found = "", "always"
    for part in _sub_parts(fields.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") in ("first", "always"):
            found, part["prepend_scheme"] = part["prepend_scheme"], "never"
    return found


def _sub_parts(part: Any, key: str) -> list[dict[str, Any]]:
    if not part:
        return []
    if part.get("type") == "Sequence":
        return [leaf for sub in part[key] for leaf in _sub_parts(sub, key)]
    return [part]
