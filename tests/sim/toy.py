"""The toy model of the simulation: the next token is a hash of what its slot really holds.

    slot -> digest of (token_index, token) pairs in sinks and window -> token(digest, seed, turn, k, salt)

A slot that is stale, lacks a token or holds one too many changes every token from there on. A salt
makes the model noisy: its tokens then tell which replica computed them. `engine.toy_engine` is the
same idea behind the engine protocol; this one costs microseconds.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence

from deployments.turn_call import TurnCall

EOS = 1
POISON = 2
"""An input token that kills whatever engine prefills it."""

FIRST_WORD = 3
VOCAB = 64
STOP_PERIOD = 12
MODEL = "toy"
CAPACITY = 24


class ToySlot:
    """A kv_slot: S sinks and the R latest tokens, each with its token_index."""

    def __init__(self, sink_tokens: int, window_tokens: int, head: str) -> None:
        self.head = head
        self.length = 0
        self._sinks = [-1] * sink_tokens
        self._window: deque[tuple[int, int]] = deque(maxlen=window_tokens)

    def push(self, start: int, tokens: Iterable[int]) -> None:
        """Cache `tokens` at token_index `start`, `start` + 1, ..."""
        self.length = start
        for token in tokens:
            if self.length < len(self._sinks):
                self._sinks[self.length] = token
            else:
                self._window.append((self.length, token))
            self.length += 1

    def digest(self) -> bytes:
        """All that the next token may depend on."""
        state = repr((self.length, self._sinks, list(self._window)))
        return hashlib.blake2b(state.encode(), digest_size=16).digest()


def toy_token(slot: ToySlot, seed: int, turn: int, k: int, salt: str) -> int:
    """Output token number `k` of the turn, after what `slot` holds."""
    drawn = hashlib.blake2b(
        slot.digest() + repr((seed, turn, k, salt)).encode(), digest_size=8
    ).digest()
    value = int.from_bytes(drawn, "little")
    if value % STOP_PERIOD == 0:
        return EOS
    return FIRST_WORD + (value >> 8) % (VOCAB - FIRST_WORD)


def oracle_reply(
    window: tuple[int, int], context: Sequence[int], call: TurnCall, turn: int
) -> list[int]:
    """What the salt-free toy must sample after `context`, all tokens of the conversation and the
    input; `window` is (S, R). Slow and obvious: no slot survives a call."""
    reply: list[int] = []
    slot = ToySlot(*window, head="")
    slot.push(0, context)
    while len(reply) < call.max_tokens and EOS not in reply:
        token = toy_token(slot, call.sampling.seed, turn, len(reply), salt="")
        slot.push(slot.length, [token])
        reply.append(token)
    return reply


def close_reply(sampled: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sampled tokens as (reply, closing ids): the end token is no part of a reply and closes it."""
    reply = list(sampled[:-1] if sampled and sampled[-1] == EOS else sampled)
    return reply, [EOS]
