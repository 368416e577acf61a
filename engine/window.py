"""The sink window: which tokens a query sees, where they are stored, at what position they rotate.

Pure integers. Everything here depends on token indices alone, never on how tokens were grouped into
steps; that is what makes chunked prefill, batching and replay give the same result.

    token_index   0 .. S-1 | S ...  slid out ... | i-R+1 ......... i
                  sinks    |                     | window (R tokens)

Source: StreamingLLM (arXiv 2309.17453, section 3.2), its per-token eviction schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SinkWindow:
    """S sink tokens, R window tokens (the current one included), a ring of `ring_tokens` places.

    Raises ValueError unless `sink_tokens` >= 0, `window_tokens` >= 1 and `ring_tokens` >= R - 1 (a
    step reads the ring before it writes its own tokens, so the current token needs no place).
    """

    sink_tokens: int
    window_tokens: int
    ring_tokens: int

    def __post_init__(self) -> None:
        if self.sink_tokens < 0 or self.window_tokens < 1:
            raise ValueError("a window needs sink_tokens >= 0 and window_tokens >= 1")
        if self.ring_tokens < self.window_tokens - 1:
            raise ValueError("ring_tokens must be at least window_tokens - 1")

    @property
    def capacity(self) -> int:
        return self.sink_tokens + self.window_tokens

    @property
    def slot_tokens(self) -> int:
        return self.sink_tokens + self.ring_tokens

    def sees(self, query: int, key: int) -> bool:
        """Whether the query at token_index `query` attends to the key at token_index `key`."""
        return key <= query and (key < self.sink_tokens or key > query - self.window_tokens)

    def cache_position(self, token_index: int) -> int:
        """Position at which the query rotates, as seen from the sinks: saturates at capacity - 1."""
        return min(token_index, self.capacity - 1)

    def place(self, token_index: int) -> int:
        """Place in the kv_slot, 0 <= place < slot_tokens."""
        if token_index < self.sink_tokens:
            return token_index
        return self.sink_tokens + (token_index - self.sink_tokens) % self.ring_tokens

    def num_slid(self, length: int) -> int:
        """Tokens that have left the window once `length` tokens are cached."""
        return max(0, length - self.capacity)

    def can_rewind(self, length: int, to_length: int) -> bool:
        """Whether a slot of `length` tokens can forget all but the first `to_length` of them.

        True when nothing the next query (token_index `to_length`) sees has been overwritten.
        """
        oldest_seen = max(self.sink_tokens, to_length - self.window_tokens + 1)
        oldest_stored = max(self.sink_tokens, length - self.ring_tokens)
        nothing_needed = to_length <= oldest_seen
        return to_length <= length and (nothing_needed or oldest_stored <= oldest_seen)

    def tokens_at(self, length: int) -> Ints:
        """token_index stored at each place of a slot of `length` tokens, -1 where empty.

        int64 [slot_tokens].
        """
        places = np.arange(self.slot_tokens, dtype=np.int64)
        ring_place = places - self.sink_tokens
        newest = length - 1 - self.sink_tokens
        turns = (newest - ring_place) // self.ring_tokens if self.ring_tokens else ring_place * 0
        token = np.where(
            ring_place < 0, places, self.sink_tokens + ring_place + turns * self.ring_tokens
        )
        empty = np.where(ring_place < 0, places >= length, turns < 0)
        return np.where(empty, -1, token)

    def visible(self, queries: Ints, keys: Ints, window_start: int = 0) -> Bools:
        """`sees` for arrays: bool [len(queries), len(keys)]. Keys of -1 are never visible.

        Keys with sink_tokens <= key < `window_start` were not replayed and are absent.
        """
        query, key = queries[:, None], keys[None, :]
        sink = key < self.sink_tokens
        in_window = (key > query - self.window_tokens) & (key >= window_start)
        return (key >= 0) & (key <= query) & (sink | in_window)
