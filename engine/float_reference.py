"""The decoder in plain floating point, for engines to be compared with: whole conversations at once.

Shares no code with any engine: NumPy alone, no ring, no chunks, no cache in another number format. All
tokens go through a layer before the next layer is loaded, so that one layer's weights are in memory at a
time, whatever the model's size. Held to `tests/reference.py`, which is slow and obvious.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine_build.spec import ModelShape

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
WeightOf = Callable[[str], npt.NDArray[np.float32]]
"""A weight of `engine_build.weights.merged_weights` by its name, float32."""

Mistake = Literal["no sinks", "no shift", "one key too few", "one key too many", "sinks too far"]
MISTAKES: tuple[Mistake, ...] = (
    "no sinks",
    "no shift",
    "one key too few",
    "one key too many",
    "sinks too far",
)
"""Ways to get the window wrong that still give fluent text; see `Passage.mistake`."""

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of one conversation that were cached, under its window.

    `token_ids` int [n] at `indices` int64 [n], rising; tokens of the window that a bounded replay left out
    are not among them. Query i sees the sinks (j < `sink_tokens`) and the last `window_tokens`, itself
    included (design of the window: docs/ARCHITECTURE.md).

    `mistake` is a window that is wrong on purpose. "no sinks": the first tokens slide out like any other.
    "no shift": sinks are met at their distance in the stream. "one key too few", "too many": of the window.
    "sinks too far": sinks are met one position further away than the cache is long.
    """

    token_ids: npt.NDArray[np.int32]
    indices: Ints
    sink_tokens: int
    window_tokens: int
    mistake: Mistake | None = None

    @property
    def num_sinks(self) -> int:
        """Tokens of the passage that are seen as sinks."""
        if self.mistake == "no sinks":
            return 0
        return int(np.searchsorted(self.indices, self.sink_tokens))

    @property
    def num_window(self) -> int:
        """Keys that a query sees of the window."""
        change = {"one key too few": -1, "one key too many": 1}
        return self.window_tokens + change.get(self.mistake or "", 0)

    @property
    def sink_positions(self) -> Ints:
        """Where each query rotates when it meets a sink, int64 [n]."""
        if self.mistake == "no shift":
            return self.indices
        further = int(self.mistake == "sinks too far")
        return np.minimum(self.indices, self.sink_tokens + self.window_tokens - 1 + further)


@dataclass(frozen=True, slots=True)
class FloatDecoder:
    """A model of this shape. `dtype` float32 or float64 is that of all products; angles, norms and
    softmax are float64 in either case."""

    shape: ModelShape
    weight: WeightOf
    dtype: type[np.floating[Any]] = np.float32

    def embed(self, passage: Passage) -> Floats:
        """Hidden states before the first layer, [n, hidden]."""
        return self._load("embed")[passage.token_ids]

    def layer(self, number: int) -> FloatLayer:
        """Load a layer's weights."""
        prefix = f"layers.{number}."
        names = ["input_norm", "qkv", "output", "mlp_norm", "gate_up", "down"]
        names += ["qkv.bias"] * self.shape.qkv_bias + ["output.bias"] * self.shape.output_bias
        names += ["q_norm", "k_norm"] * self.shape.qk_norm
        return FloatLayer(self.shape, {name: self._load(prefix + name) for name in names})

    def head(self) -> Callable[[Floats], Floats]:
        """Load the head: a function from hidden states [n, hidden] to logits [n, vocab]."""
        norm = self._load("norm")
        matrix = self._load("embed" if self.shape.tied_head else "head")
        epsilon = self.shape.rms_norm_eps
        return lambda x: _norm(x, norm, epsilon) @ matrix.T

    def hidden(self, passage: Passage) -> Floats:
        """Hidden states after the last layer, [n, hidden]."""
        x = self.embed(passage)
        for number in range(self.shape.num_layers):
            x = self.layer(number).apply(x, passage)
        return x

    def _load(self, name: str) -> Floats:
        values: Floats = self.weight(name).astype(self.dtype, copy=False)
        return values


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """One layer's weights, by the last part of their name."""

    shape: ModelShape
    weights: dict[str, Floats]

    def apply(self, x: Floats, passage: Passage, first: int = 0) -> Floats:
        """Hidden states [n - first, hidden] after this layer of a passage's tokens from `first` on.

        `x` [n, hidden] are those before it, of all tokens.
        """
        weights, epsilon = self.weights, self.shape.rms_norm_eps
        normed = _norm(x, weights["input_norm"], epsilon)
        attended = self._attend(self._linear(normed, "qkv"), passage, first)
        x = x[first:] + self._linear(attended, "output")
        normed = _norm(x, weights["mlp_norm"], epsilon)
        gate, up = np.split(self._linear(normed, "gate_up"), 2, axis=1)
        with np.errstate(over="ignore"):
            gated = gate / (1 + np.exp(-gate)) * up
        result: Floats = x + self._linear(gated, "down")
        return result

    def _linear(self, x: Floats, name: str) -> Floats:
        product: Floats = x @ self.weights[name].T
        bias = self.weights.get(name + ".bias")
        return product if bias is None else product + bias

    def _attend(self, qkv: Floats, passage: Passage, first: int) -> Floats:
        """[n, (heads + 2 * kv_heads) * head_dim] -> [n - first, heads * head_dim]."""
        shape, indices = self.shape, passage.indices
        num_q, num_kv = shape.num_heads, shape.num_kv_heads
        heads = qkv.reshape(len(qkv), num_q + 2 * num_kv, shape.head_dim)
        q, k, v = np.split(heads, [num_q, num_q + num_kv], axis=1)
        if shape.qk_norm:
            q = _norm(q, self.weights["q_norm"], shape.rms_norm_eps)
            k = _norm(k, self.weights["k_norm"], shape.rms_norm_eps)
        # A sink and a query meet at cache positions; a window key and a query at token indices, whose
        # difference is the same.
        turned_k, turned_q = self._rotate(k, indices), self._rotate(q, indices)
        q_to_sinks = self._rotate(q, passage.sink_positions)
        attended = np.empty_like(q)
        sinks = passage.num_sinks
        for begin in range(first, len(q), _QUERIES_AT_ONCE):
            queries = indices[begin : begin + _QUERIES_AT_ONCE]
            end = begin + len(queries)
            oldest = int(np.searchsorted(indices, queries[0] - passage.num_window + 1))
            oldest = max(sinks, oldest)
            keys = indices[oldest:end]
            causal = indices[:sinks] <= queries[:, None]
            window = (keys <= queries[:, None]) & (keys > queries[:, None] - passage.num_window)
            scores = np.concatenate(
                [
                    self._scores(q_to_sinks[begin:end], turned_k[:sinks]),
                    self._scores(turned_q[begin:end], turned_k[oldest:end]),
                ],
                axis=-1,
            ).astype(np.float64)
            scores[:, :, ~np.concatenate([causal, window], axis=1)] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            values = np.concatenate([v[:sinks], v[oldest:end]]).transpose(1, 0, 2)
            mixed = scores.astype(v.dtype) @ values[:, None]
            attended[begin:end] = mixed.reshape(num_q, end - begin, -1).transpose(1, 0, 2)
        return attended[first:].reshape(len(qkv) - first, -1)

    def _scores(self, q: Floats, k: Floats) -> Floats:
        """[n, heads, dim] and [m, kv_heads, dim] -> [kv_heads, heads / kv_heads, n, m]."""
        grouped = q.transpose(1, 0, 2).reshape(
            self.shape.num_kv_heads, self.shape.heads_per_kv_head, len(q), -1
        )
        scores: Floats = grouped @ k.transpose(1, 2, 0)[:, None]
        return scores

    def _rotate(self, heads: Floats, positions: Ints) -> Floats:
        """Rotate-half of [n, heads, head_dim]; dimensions past rotary_dim stay."""
        rope = self.shape.rope
        angles = positions[:, None, None] * rope.inverse_frequencies()
        cos = (np.cos(angles) * rope.cos_sin_scale()).astype(heads.dtype)
        sin = (np.sin(angles) * rope.cos_sin_scale()).astype(heads.dtype)
        half = rope.rotary_dim // 2
        first, second, rest = np.split(heads, [half, 2 * half], axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin, rest]
        return np.concatenate(turned, axis=-1)


def _norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """RMS norm over the last axis."""
    square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    result: Floats = (x / np.sqrt(square + epsilon)).astype(x.dtype) * weight
    return result
