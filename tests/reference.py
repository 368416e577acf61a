"""The oracle: a decoder with a sink cache, written to be obviously right and nothing else.

One token at a time, every token's un-rotated key kept for ever, in a list per layer. Each query picks
the tokens it sees and rotates their keys to the positions that design says, from scratch:

    query i sees key j         iff  j <= i and (j < S or j > i - R)
    query i rotates at         c(i) = min(i, S + R - 1)
    window key j rotates at    c(i) - (i - j)
    sink j rotates at          j

Shares with the engine only `ModelShape` and the rope's frequencies (held to recorded stock values).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_build.spec import ModelShape

Floats = npt.NDArray[np.floating[Any]]
Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Rule:
    """The window, and the ways to get it wrong that tests must tell from the right one.

    `no_sinks`: the first tokens slide out like any other. `no_shift`: keys and queries rotate at their
    token_index, as if nothing had slid. `one_key_too_few`: the oldest window token is not seen.
    """

    sink_tokens: int
    window_tokens: int
    no_sinks: bool = False
    no_shift: bool = False
    one_key_too_few: bool = False

    def sees(self, i: int, j: int) -> bool:
        window = self.window_tokens - (1 if self.one_key_too_few else 0)
        sink = j < self.sink_tokens and not self.no_sinks
        return j <= i and (sink or j > i - window)

    def query_position(self, i: int) -> int:
        return i if self.no_shift else min(i, self.sink_tokens + self.window_tokens - 1)

    def key_position(self, i: int, j: int) -> int:
        if self.no_shift or (j < self.sink_tokens and not self.no_sinks):
            return j
        return self.query_position(i) - (i - j)


@dataclass
class _Layer:
    indices: list[int] = field(default_factory=list)
    keys: list[Floats] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)


class ReferenceDecoder:
    """A conversation. `push` adds tokens; `forget_after` drops the newest ones."""

    def __init__(
        self, shape: ModelShape, tensors: Tensors, rule: Rule, dtype: Any = np.float64
    ) -> None:
        self._shape, self._rule, self._dtype = shape, rule, dtype
        self._tensors = {name: values.astype(dtype) for name, values in tensors.items()}
        self._layers = [_Layer() for _ in range(shape.num_layers)]

    def push(self, token_index: int, token: int) -> Floats:
        """Cache one token and return the logits after it, [vocab]."""
        get = self._tensors.__getitem__
        x = get("model.embed_tokens.weight")[token]
        for number, layer in enumerate(self._layers):
            prefix = f"model.layers.{number}."
            normed = self._norm(x, prefix + "input_layernorm.weight")
            x = x + self._attend(layer, token_index, normed, prefix + "self_attn.")
            normed = self._norm(x, prefix + "post_attention_layernorm.weight")
            gate = get(prefix + "mlp.gate_proj.weight") @ normed
            up = get(prefix + "mlp.up_proj.weight") @ normed
            silu = gate / (1.0 + np.exp(-gate))
            x = x + get(prefix + "mlp.down_proj.weight") @ (silu * up)
        head = "model.embed_tokens.weight" if self._shape.tied_head else "lm_head.weight"
        logits: Floats = get(head) @ self._norm(x, "model.norm.weight")
        return logits

    def push_all(self, start: int, tokens: Iterable[int]) -> Floats:
        """Cache tokens at token_index `start`, ... and return all logits, [n, vocab]."""
        return np.stack([self.push(start + n, int(token)) for n, token in enumerate(tokens)])

    def forget_after(self, length: int) -> None:
        """Drop every token at token_index >= `length`."""
        for layer in self._layers:
            while layer.indices and layer.indices[-1] >= length:
                layer.indices.pop()
                layer.keys.pop()
                layer.values.pop()

    def _attend(self, layer: _Layer, i: int, x: Floats, prefix: str) -> Floats:
        shape = self._shape
        q = self._project(x, prefix + "q_proj").reshape(shape.num_heads, shape.head_dim)
        k = self._project(x, prefix + "k_proj").reshape(shape.num_kv_heads, shape.head_dim)
        v = self._project(x, prefix + "v_proj").reshape(shape.num_kv_heads, shape.head_dim)
        if shape.qk_norm:
            q = self._norm(q, prefix + "q_norm.weight")
            k = self._norm(k, prefix + "k_norm.weight")
        layer.indices.append(i)
        layer.keys.append(k)
        layer.values.append(v)
        seen = [n for n, j in enumerate(layer.indices) if self._rule.sees(i, j)]
        q = self._rotate(q, self._rule.query_position(i))
        heads = []
        keys = [
            self._rotate(layer.keys[n], self._rule.key_position(i, layer.indices[n])) for n in seen
        ]
        for head in range(shape.num_heads):
            kv_head = head // shape.heads_per_kv_head
            scores = np.array([q[head] @ key[kv_head] for key in keys]) / math.sqrt(shape.head_dim)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            heads.append(
                sum(w * layer.values[n][kv_head] for w, n in zip(weights, seen, strict=True))
            )
        return self._project(np.concatenate(heads), prefix + "o_proj")

    def _project(self, x: Floats, name: str) -> Floats:
        bias = self._tensors.get(name + ".bias")
        product: Floats = self._tensors[name + ".weight"] @ x
        return product if bias is None else product + bias

    def _norm(self, x: Floats, name: str) -> Floats:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self._shape.rms_norm_eps)
        result: Floats = x / scale * self._tensors[name]
        return result

    def _rotate(self, heads: Floats, position: int) -> Floats:
        """Rotate-half rotary embedding of [heads, head_dim]; dimensions past rotary_dim stay."""
        rope = self._shape.rope
        angles = position * rope.inverse_frequencies()
        cos = (np.cos(angles) * rope.cos_sin_scale()).astype(self._dtype)
        sin = (np.sin(angles) * rope.cos_sin_scale()).astype(self._dtype)
        half = rope.rotary_dim // 2
        first, second = heads[:, :half], heads[:, half : 2 * half]
        turned = [first * cos - second * sin, second * cos + first * sin, heads[:, 2 * half :]]
        return np.concatenate(turned, axis=1)
