"""Token ids of a reply in, text out, one token at a time.

A pure function of the token log: whoever pushes the same ids gets the same text, in any grouping.
Half a character is never shown, nor text that may turn out to be the start of a stop string.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from engine_build.spec import SpecError


class TokenBytes:
    """What each token adds to the text, as UTF-8 bytes; special tokens add none.

    Byte-level BPE: equal to the tokenizer's own decoding, always. SentencePiece with byte fallback: equal
    where its byte tokens are valid UTF-8; a broken run gets one U+FFFD per broken character, not per byte.
    Raises SpecError for other decoders.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        fields: dict[str, Any] = json.loads(tokenizer.to_str())
        steps = _steps(fields.get("decoder"))
        kinds = [step["type"] for step in steps]
        self.strips_first_space = False
        if kinds == ["ByteLevel"]:
            to_bytes = _byte_level(tokenizer)
        elif "ByteFallback" in kinds and set(kinds) <= _SENTENCEPIECE_STEPS:
            to_bytes = _sentencepiece(tokenizer)
            self.strips_first_space = any(_strips_a_space(step) for step in steps)
        else:
            raise SpecError(
                "tokenizer.json",
                f"its decoder is {kinds}",
                "Use a byte-level BPE tokenizer, or SentencePiece BPE with byte fallback",
            )
        self._bytes = to_bytes
        for token in fields["added_tokens"]:
            if token["special"]:
                self._bytes[token["id"]] = b""

    def __getitem__(self, token_id: int) -> bytes:
        """b"" also for ids beyond the vocabulary (models pad theirs)."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""


class TextStream:
    """The text of one reply. Cost per token: its bytes, whatever came before.

    The pieces put together are the decoded ids, cut before the first stop string: of those that are
    complete first, the longest.
    """

    def __init__(self, tokens: TokenBytes, stop: Iterable[str] = ()) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(_StopString(text) for text in stop if text)
        self._held = ""
        self._drop_space = tokens.strips_first_space
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is now certain to belong to the reply; often ""."""
        if self.stopped:
            return ""
        return self._advance(self._decoder.decode(self._tokens[token_id]))

    def finish(self) -> str:
        """What was held back: no token follows. A broken last character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        if not self._stops:
            return text
        whole = self._held + text
        for index, char in enumerate(text):
            complete = max((len(stop.text) for stop in self._stops if stop.push(char)), default=0)
            if complete:
                self.stopped = True
                end = len(self._held) + index + 1 - complete
                self._held = ""
                return whole[:end]
        keep = len(whole) - max(stop.matched for stop in self._stops)
        self._held = whole[keep:]
        return whole[:keep]


class StopWatch:
    """`engine.turn.StopCheck` over a TextStream."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def push(self, token_id: int) -> bool:
        """Whether a stop string is now complete."""
        self._stream.push(token_id)
        return self._stream.stopped


class _StopString:
    """Knuth-Morris-Pratt, one character at a time: `matched` characters of `text` end what was pushed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0] * (len(text) + 1)
        length = 0
        for end in range(2, len(text) + 1):
            while length and text[length] != text[end - 1]:
                length = self._shorter[length]
            length += text[length] == text[end - 1]
            self._shorter[end] = length

    def push(self, char: str) -> bool:
        while self.matched and self.text[self.matched] != char:
            self.matched = self._shorter[self.matched]
        self.matched += self.text[self.matched] == char
        return self.matched == len(self.text)


_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_SPACE = "\u2581"


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it in byte-level BPE (GPT-2's bytes_to_unicode)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


def _byte_level(tokenizer: Tokenizer) -> list[bytes]:
    values = {char: byte for byte, char in byte_alphabet().items()}

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([values[char] for char in token])
        except KeyError:  # an added token, stored as its own text
            return token.encode()

    return _table(tokenizer, to_bytes)


def _sentencepiece(tokenizer: Tokenizer) -> list[bytes]:
    def to_bytes(token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()

    return _table(tokenizer, to_bytes)


def _table(tokenizer: Tokenizer, to_bytes: Any) -> list[bytes]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        table[token_id] = to_bytes(token)
    return table


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if not decoder:
        return []
    if decoder["type"] == "Sequence":
        return [leaf for step in decoder["decoders"] for leaf in _steps(step)]
    return [decoder]


def _strips_a_space(step: dict[str, Any]) -> bool:
    strip = step["type"] == "Strip" and step["content"] == " " and step["start"] >= 1
    metaspace = step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"
    return strip or metaspace
