"""Engines without weights, for tests and demos: shipped, fast, exact to the bit.

The toy's "model" hashes every (token_index, token) pair that its last query sees, as found in the
places of its kv_slots, into logits; real sampling draws from them. So a wrong slot, place, rewind,
window_start, counter or seed changes the text, and `toy_reply` says what it should have been.

    step -> write pairs to places -> hash what is visible -> logits -> engine.sampling

Bounded replay of at least one window gives the very same state: a toy's cache holds no traces of
tokens that slid out. `NoisyToyEngine` also depends on its replica, and so tells one from another.

Bytes: ids 0..255 are UTF-8 bytes, then BOS, EOS and END_OF_TURN; `byte_spec` is the matching spec and
`ToyText` by default says lower-case words. With it a byte tokenizer can serve text, no weights needed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.host_slots import HostSlots
from engine.plan_check import check_plan
from engine.protocol import (
    EngineDead,
    Logits,
    Row,
    RowResult,
    SampleRequest,
    StepPlan,
    StepResult,
    TokenIds,
)
from engine.sampling import SamplingParams, sample_rows
from engine.window import SinkWindow
from engine_build.spec import EngineSpec, ModelShape, RopeSpec

Hashes = npt.NDArray[np.uint64]

BOS, EOS, END_OF_TURN = 256, 257, 258
BYTE_VOCAB = 259

_INDEX_SALT = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1
_FAR = np.float32(40.0)


def toy_spec(vocab_size: int, capacity: int, max_chunk: int) -> EngineSpec:
    """A spec of the smallest possible model with this vocabulary and window."""
    model = ModelShape(
        architecture="toy",
        vocab_size=vocab_size,
        hidden_size=2,
        intermediate_size=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        rms_norm_eps=1e-5,
        rope=RopeSpec(theta=10000.0, rotary_dim=2),
    )
    return EngineSpec(model, capacity=capacity, max_chunk=max_chunk, weight_format="float32")


def byte_spec(capacity: int = 64, max_chunk: int = 16) -> EngineSpec:
    """A toy that speaks bytes: vocabulary 256 + BOS, EOS, END_OF_TURN."""
    return toy_spec(BYTE_VOCAB, capacity, max_chunk)


@dataclass(frozen=True, slots=True)
class ToyText:
    """What a toy likes to say: `words` only (all tokens if empty), and `stop_id` about once in
    `stop_period` tokens (0: never)."""

    words: tuple[int, ...] = (*b"abcdefghijklmnopqrstuvwxyz", *b"      ")
    stop_id: int = END_OF_TURN
    stop_period: int = 0


class ToyModel:
    """Logits as a pure function of a set of (token_index, token) pairs and a salt.

    Raises ValueError if the text does not fit the vocabulary.
    """

    def __init__(self, vocab_size: int, text: ToyText, salt: str = "") -> None:
        if text.words and max(text.words) >= vocab_size:
            raise ValueError("a toy's words must be in its vocabulary")
        if text.stop_period and text.stop_id >= vocab_size:
            raise ValueError("a toy's stop_id must be in its vocabulary")
        self._text = text
        self._salt = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
        self._tokens = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(_INDEX_SALT)
        self._unlikely = np.zeros(vocab_size, dtype=np.float32)
        if text.words:
            self._unlikely[:] = _FAR
            self._unlikely[list(text.words)] = 0.0

    def logits(self, state: int) -> Logits:
        """float32 [vocab_size] for the sum modulo 2**64 of the visible pairs' `pair_hashes`."""
        seed = (state + self._salt) & _WORD
        bits = mix(self._tokens ^ np.uint64(seed))
        noise = (bits >> np.uint64(40)).astype(np.float32) * np.float32(8.0 * 2.0**-24)
        logits: Logits = noise - self._unlikely
        period = self._text.stop_period
        if period and int(mix(np.array([seed], np.uint64))[0]) % period == 0:
            logits[self._text.stop_id] = _FAR
        return logits


def mix(words: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): a bijection that scatters bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Hashes = words ^ (words >> np.uint64(31))
    return result


def pair_hashes(token_indices: npt.NDArray[np.int64], tokens: TokenIds) -> Hashes:
    """One hash per (token_index, token) pair, uint64."""
    pairs = token_indices.astype(np.uint64) * np.uint64(1 << 32) + tokens.astype(np.uint64)
    return mix(pairs + np.uint64(_INDEX_SALT))


class ToyEngine:
    """`engine.protocol.Engine`. Refuses impossible plans with ValueError, as the real ones do.

    `step_delay_s` makes every step last at least about that long.
    """

    def __init__(
        self,
        spec: EngineSpec | None = None,
        max_resident: int = 16,
        text: ToyText | None = None,
        step_delay_s: float = 0.0,
        salt: str = "",
        host_slots: int = 0,
    ) -> None:
        self._spec = spec or byte_spec()
        self._step_delay_s = step_delay_s
        self.model = ToyModel(self._spec.model.vocab_size, text or ToyText(), salt)
        # The hash of the pair in each place; 0 where nothing was written yet.
        self._places = np.zeros((max_resident, self._spec.slot_tokens), dtype=np.uint64)
        self._host = HostSlots(self._places, host_slots)
        self._host_slots = host_slots
        self._closed = False

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def max_resident(self) -> int:
        return len(self._places)

    @property
    def host_slots(self) -> int:
        return self._host_slots

    def step(self, plan: StepPlan) -> StepResult:
        if self._closed:
            raise EngineDead("the engine is closed")
        check_plan(plan, self._spec, self.max_resident, self._host_slots)
        if any(row.window.capacity != self._spec.capacity for row in plan.rows):
            raise ValueError("a row's window is not of the engine's capacity")
        self._host.run(plan.copies)
        if self._step_delay_s:
            time.sleep(self._step_delay_s)
        return StepResult(tuple(self._run(row) for row in plan.rows))

    def close(self) -> None:
        self._closed = True

    def _run(self, row: Row) -> RowResult:
        slot, window = self._places[row.kv_slot], row.window
        count = len(row.tokens)
        indices = np.arange(row.start, row.start + count, dtype=np.int64)
        fresh = pair_hashes(indices, row.tokens)
        # As in a real engine: the cache is read before the row's own tokens are written.
        stored = slot.copy()
        _write(slot, window, indices, fresh)
        if row.sample is None and row.logits == "none":
            return RowResult()
        queries = indices if row.logits == "all" else indices[-1:]
        keys = window.tokens_at(row.start)
        seen_stored = window.visible(queries, keys, row.window_start)
        seen_fresh = window.visible(queries, indices, row.window_start)
        states = seen_stored @ stored[: len(keys)] + seen_fresh @ fresh
        logits = np.stack([self.model.logits(int(state)) for state in states])
        kept = None if row.logits == "none" else logits
        if row.sample is None:
            return RowResult(logits=kept)
        (drawn,) = sample_rows(logits[-1:], [row.sample])
        return RowResult(drawn.token_id, drawn.logprob, drawn.top, kept, drawn.failed)


class NoisyToyEngine(ToyEngine):
    """A toy whose text also depends on `replica`: makes visible who computed a token."""

    def __init__(
        self,
        replica: str,
        spec: EngineSpec | None = None,
        max_resident: int = 16,
        text: ToyText | None = None,
        step_delay_s: float = 0.0,
    ) -> None:
        super().__init__(spec, max_resident, text, step_delay_s, salt=replica)


def _write(slot: Hashes, window: SinkWindow, indices: npt.NDArray[np.int64], fresh: Hashes) -> None:
    sinks = window.sink_tokens
    ring_places = sinks + (indices - sinks) % max(window.ring_tokens, 1)
    places = np.where(indices < sinks, indices, ring_places)
    # Of several tokens for one place the newest stays; without a ring none does.
    stays = (indices < sinks) | (indices > indices[-1] - window.ring_tokens)
    slot[places[stays]] = fresh[stays]


def toy_reply(
    model: ToyModel,
    window: SinkWindow,
    context: Sequence[int],
    request: tuple[SamplingParams, int],
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """What a toy must answer to `context`, all tokens of the conversation so far; slow and obvious.

    `request` is (params, turn). Ends after `max_tokens` or after the first of `stop_ids`.
    """
    params, turn = request
    tokens, reply = list(context), list[int]()
    while len(reply) < max_tokens and not (reply and reply[-1] in stop_ids):
        query = len(tokens) - 1
        state = 0
        for key, token in enumerate(tokens):
            if window.sees(query, key):
                pair = pair_hashes(np.array([key], np.int64), np.array([token], np.int32))
                state = (state + int(pair[0])) & _WORD
        history = np.array(tokens, np.int32)
        sample = SampleRequest(params, turn, len(reply), history)
        (drawn,) = sample_rows(model.logits(state)[None], [sample])
        if drawn.token_id is None:
            raise ValueError(drawn.failed)
        tokens.append(drawn.token_id)
        reply.append(drawn.token_id)
    return reply
