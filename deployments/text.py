"""Messages to token ids and back, for the model that is served.

The tokens of a turn depend on its own messages only. Put together, the turns of a conversation are the
chat template applied to its transcript, with each reply as the model wrote it:

    opening | reply | closing | turn | reply | closing | turn ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.conversation import Message, TokenIds
from deployments.errors import ErrorInfo, ServiceError
from deployments.text_stream import StopWatch, TextStream, TokenBytes, byte_alphabet
from deployments.turn_progress import ClosedReply
from engine.toy_engine import BOS, END_OF_TURN, EOS
from engine_build.chat import ROLES, START, ChatPieces, ChatRolesError, Run, SlotPart
from engine_build.text_runs import RunEncoder


class ChatCodec:
    """One model's tokenizer and chat template. Thread-safe; holds no conversation."""

    def __init__(self, tokenizer: Tokenizer, pieces: ChatPieces) -> None:
        self._pieces = pieces
        self._encoder = RunEncoder(tokenizer)
        self._bytes = TokenBytes(tokenizer)
        # What follows the closing's last special token goes in with the next turn: only then is it
        # known whether it merges with what comes after it.
        closing, self._between = self._encoder.split_after_last_special(pieces.closing)
        self._closing = self._encoder.encode([Run(closing)], inside=True)

    @classmethod
    def load(cls, engine_dir: Path) -> ChatCodec:
        """From tokenizer.json and chat.json of an engine directory. Raises SpecError, OSError."""
        text = (engine_dir / "chat.json").read_text(encoding="utf-8")
        tokenizer: Tokenizer = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
        return cls(tokenizer, ChatPieces.from_json(text))

    @classmethod
    def for_toy(cls) -> ChatCodec:
        """The codec of `engine.toy_engine.byte_spec`: a token is a byte. No files needed."""
        return cls(_byte_tokenizer(), _byte_pieces())

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return frozenset(self._pieces.eos_ids)

    # Messages -> ids.

    def encode_opening(self, messages: Sequence[Message]) -> TokenIds:
        """A first turn: prefix and messages, up to where the reply starts. int32.

        Raises ServiceError for roles in an order that the template has no form for.
        """
        return _int32(self._encoder.encode(self._runs(messages, START)))

    def encode_turn(self, messages: Sequence[Message]) -> TokenIds:
        """A later turn: from where the last reply was closed to where the next one starts. int32.

        Raises ServiceError like `encode_opening`.
        """
        runs = [Run(self._between), *self._runs(messages, "assistant")]
        after = self._closing[-1] if self._closing else None
        return _int32(self._encoder.encode(runs, after=after, inside=after is None))

    def pinned_ids(self, messages: Sequence[Message]) -> TokenIds:
        """The prefix to pin as sinks: what comes before the first message that is not the system's,
        including the template's own system prompt. int32.

        A count to choose S by: if the template puts no special token behind it, its last token may be
        another one in the opening.
        """
        system: list[str] = []
        for message in messages:
            if message.role != "system":
                break
            system.append(message.content)
        try:
            return _int32(self._encoder.encode(self._pieces.pinned_runs(system)))
        except ChatRolesError as error:
            raise _refusal(error) from error

    def pinned_tokens(self, messages: Sequence[Message]) -> int:
        """Number of `pinned_ids`."""
        return len(self.pinned_ids(messages))

    def _runs(self, messages: Sequence[Message], previous: str) -> list[Run]:
        pairs = [(message.role, message.content) for message in messages]
        try:
            return self._pieces.runs(pairs, previous, generate=True)
        except ChatRolesError as error:
            raise _refusal(error) from error

    # Ids -> text.

    def text_stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A fresh stream for one reply."""
        return TextStream(self._bytes, stop)

    def stop_check(self, stop: Sequence[str]) -> StopWatch | None:
        """Watches for stop strings during generation; None when there are none."""
        return StopWatch(self.text_stream(stop)) if any(stop) else None

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, UTF-8, possibly part of a character; b"" for special tokens."""
        return self._bytes[token_id]

    def decode(self, token_ids: Sequence[int] | TokenIds) -> str:
        """The text of a whole reply."""
        return self._shown(token_ids, ())[0]

    # The end of a reply.

    def close_reply(self, sampled: Sequence[int], stop: Sequence[str] = ()) -> ClosedReply:
        """A sampled reply as it is to be committed.

        The end token, if sampled, goes: the closing ids bring the template's own. A reply with a stop
        string is cut before it: whole tokens before the cut as they are, the rest encoded again, so that
        the ids decode to the text shown.
        """
        ids = list(sampled)
        text, stopped = self._shown(ids, stop)
        if stopped:
            ids = self._recut(ids, text)
        elif ids and ids[-1] in self.eos_ids:
            del ids[-1]
        return ClosedReply(_int32(ids), _int32(self._closing), text)

    def _shown(self, token_ids: Sequence[int] | TokenIds, stop: Sequence[str]) -> tuple[str, bool]:
        stream = self.text_stream(stop)
        text = "".join([stream.push(int(token_id)) for token_id in token_ids])
        return text + stream.finish(), stream.stopped

    def _recut(self, ids: list[int], text: str) -> list[int]:
        """Ids that decode to `text`, a part of what `ids` decode to, keeping as many as can be."""
        stream = self.text_stream()
        length = 0
        cuts = [(0, 0)]
        for number, token_id in enumerate(ids, start=1):
            length += len(stream.push(token_id))
            if length > len(text):
                break
            cuts.append((number, length))
        best: list[int] | None = None
        for kept, shown in reversed(cuts):
            rest = Run(text[shown:], plain=True)
            recut = ids[:kept] + self._encoder.encode([rest], inside=kept > 0)
            if self.decode(recut) == text:
                return recut
            best = best or recut
        return best or []  # only a tokenizer that normalizes text gets here


def _refusal(error: ChatRolesError) -> ServiceError:
    message = error.problem[0].upper() + error.problem[1:] + "."
    return ServiceError(
        ErrorInfo("invalid_value", message, f"messages[{error.index}].{error.field}")
    )


def _int32(ids: Sequence[int]) -> TokenIds:
    return np.asarray(ids, dtype=np.int32)


def _byte_tokenizer() -> Tokenizer:
    vocabulary = {char: byte for byte, char in byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {BOS: "<|bos|>", EOS: "<|eos|>", END_OF_TURN: "<|end_of_turn|>"}
    tokenizer.add_special_tokens(
        [AddedToken(specials[token_id], normalized=False) for token_id in sorted(specials)]
    )
    return tokenizer


def _byte_pieces() -> ChatPieces:
    """<|bos|>, then for each message: role, colon, content, <|end_of_turn|>."""

    def parts(before: str, role: str) -> tuple[Run | SlotPart, ...]:
        start = "<|bos|>" if before == START else ""
        return Run(f"{start}{role}:"), SlotPart("content"), Run("<|end_of_turn|>")

    return ChatPieces(
        messages={
            (before, role): parts(before, role) for before in (START, *ROLES) for role in ROLES
        },
        generation=dict.fromkeys(ROLES, "assistant:"),
        closing="<|end_of_turn|>",
        reply_only="",
        pinned={START: (Run("<|bos|>"),)},
        nonempty=frozenset(),
        eos_ids=(EOS, END_OF_TURN),
    )
