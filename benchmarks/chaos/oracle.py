"""What a toy must have answered, computed from the requests alone, and a conversation's true log."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cluster.conversation import GENESIS, Message, TokenIds, chain_head
from deployments.text import ChatCodec
from engine.protocol import SampleRequest
from engine.sampling import SamplingParams, sample_rows
from engine.toy_engine import ToyModel, pair_hashes

_WORD = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One turn as the client asked for it: greedy, or drawn under its own seed."""

    text: str
    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    stop: tuple[str, ...] = ()

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Expected:
    """The reply due: its text and what its commit appends to the conversation, int32."""

    text: str
    input_ids: TokenIds
    output_ids: TokenIds
    sampled_tokens: int


@dataclass(slots=True)
class TrueLog:
    """Every token of one conversation as it ought to be, hash chain and transcript included."""

    model: ToyModel
    capacity: int
    codec: ChatCodec
    sink_tokens: int = 4
    ids: list[int] = field(default_factory=list)
    turn: int = 0
    head: str = GENESIS
    messages: list[Message] = field(default_factory=list)

    def due(self, asked: Asked) -> Expected:
        """The reply to `asked` if it were the next turn."""
        encode = self.codec.encode_turn if self.turn else self.codec.encode_opening
        input_ids = encode([Message("user", asked.text)])
        sampled = self._sample([*self.ids, *input_ids.tolist()], asked)
        reply = self.codec.close_reply(sampled, asked.stop)
        output_ids = np.concatenate([reply.output_ids, reply.closing_ids])
        return Expected(reply.text, input_ids, output_ids, len(sampled))

    def commit(self, asked: Asked, expected: Expected) -> None:
        """Go on from there."""
        self.ids += [*expected.input_ids.tolist(), *expected.output_ids.tolist()]
        self.head = chain_head(self.head, expected.input_ids, expected.output_ids)
        self.turn += 1
        self.messages += [Message("user", asked.text), Message("assistant", expected.text)]

    def _sample(self, tokens: list[int], asked: Asked) -> list[int]:
        start = len(tokens)
        text = self.codec.text_stream(asked.stop)
        while len(tokens) - start < asked.max_tokens:
            history = np.array(tokens, np.int32)
            visible = self._visible(len(tokens) - 1)
            hashes = pair_hashes(visible, history[visible])
            state = int(hashes.sum(dtype=np.uint64)) & _WORD
            sample = SampleRequest(asked.sampling, self.turn + 1, len(tokens) - start, history)
            (drawn,) = sample_rows(self.model.logits(state)[None], [sample])
            if drawn.token_id is None:
                raise ValueError(drawn.failed)
            tokens.append(drawn.token_id)
            text.push(drawn.token_id)
            if drawn.token_id in self.codec.eos_ids or text.stopped:
                break
        return tokens[start:]

    def _visible(self, query: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Indices that token `query` sees: the sinks and the last R, itself included."""
        recent = self.capacity - self.sink_tokens
        first = max(self.sink_tokens, query - recent + 1)
        sinks = np.arange(min(self.sink_tokens, query + 1), dtype=np.int64)
        return np.concatenate([sinks, np.arange(first, query + 1, dtype=np.int64)])
