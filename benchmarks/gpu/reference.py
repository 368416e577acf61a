"""A decoder with a sink window in plain torch, float32: what the CUDA engine is checked against.

All tokens of a conversation at once, no cache, no kernel of ours, nothing shared with the engine but the
model's shape. Keys are rotated at their own token_index; every query is rotated twice: at its own
token_index for the window's keys (the difference is their distance) and at its cache position for the
sinks. Angles in float64. `tests/test_gpu_bench.py` holds it to the oracle, which rotates each pair anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine_build.spec import ModelShape

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class WindowRule:
    """Which keys a query sees and where it rotates; the three wrong variants must fail every check."""

    sink_tokens: int
    window_tokens: int
    no_sinks: bool = False
    no_shift: bool = False
    one_key_too_few: bool = False

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """bool [queries, keys] from token indices."""
        i, j = queries[:, None], keys[None, :]
        recent = j > i - (self.window_tokens - int(self.one_key_too_few))
        sink = (j < self.sink_tokens) & (not self.no_sinks)
        return (j <= i) & (sink | recent)

    def sink_positions(self, queries: torch.Tensor) -> torch.Tensor:
        """Where queries rotate, as seen from the sinks."""
        last = self.sink_tokens + self.window_tokens - 1
        return queries if self.no_shift else queries.clamp(max=last)


WRONG_RULES: Mapping[str, dict[str, bool]] = {
    "no sinks": {"no_sinks": True},
    "no position shift": {"no_shift": True},
    "one key too few": {"one_key_too_few": True},
}


class FloatReference:
    """`tensors`: weights under Hugging Face names, any float dtype, on the device that computes."""

    def __init__(self, shape: ModelShape, tensors: Tensors) -> None:
        self._shape, self._tensors = shape, tensors
        device = tensors["model.embed_tokens.weight"].device
        frequencies = torch.from_numpy(shape.rope.inverse_frequencies())
        self._frequencies = frequencies.to(device)

    def logits(
        self, tokens: torch.Tensor, indices: torch.Tensor, rule: WindowRule, last: int
    ) -> torch.Tensor:
        """float32 [last, vocab] of the last tokens. `tokens`, `indices`: int64 [n]; what a bounded
        replay left out is simply not among them.
        """
        with torch.no_grad():
            return self._decoder(tokens, indices, rule, last)

    def _decoder(
        self, tokens: torch.Tensor, indices: torch.Tensor, rule: WindowRule, last: int
    ) -> torch.Tensor:
        get = self._weight
        x = get("model.embed_tokens.weight", tokens)
        for layer in range(self._shape.num_layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(x, prefix + "input_layernorm.weight")
            x = x + self._attend(normed, indices, rule, prefix + "self_attn.")
            normed = self._norm(x, prefix + "post_attention_layernorm.weight")
            gate = normed @ get(prefix + "mlp.gate_proj.weight").T
            up = normed @ get(prefix + "mlp.up_proj.weight").T
            x = x + (torch.nn.functional.silu(gate) * up) @ get(prefix + "mlp.down_proj.weight").T
        head = "model.embed_tokens.weight" if self._shape.tied_head else "lm_head.weight"
        return self._norm(x[-last:], "model.norm.weight") @ get(head).T

    def _attend(
        self, x: torch.Tensor, indices: torch.Tensor, rule: WindowRule, prefix: str
    ) -> torch.Tensor:
        shape = self._shape
        count, group = len(indices), shape.heads_per_kv_head
        q = self._project(x, prefix + "q_proj").view(count, shape.num_heads, shape.head_dim)
        k = self._project(x, prefix + "k_proj").view(count, shape.num_kv_heads, shape.head_dim)
        v = self._project(x, prefix + "v_proj").view(count, shape.num_kv_heads, shape.head_dim)
        if shape.qk_norm:
            q = self._norm(q, prefix + "q_norm.weight")
            k = self._norm(k, prefix + "k_norm.weight")
        window_q = self._rotate(q, indices)
        sink_q = self._rotate(q, rule.sink_positions(indices))
        k = self._rotate(k, indices)
        hidden = ~rule.visible(indices, indices)
        # Without sinks the first keys are window keys like any other.
        is_sink = (indices < rule.sink_tokens) & (not rule.no_sinks)
        heads = []
        for head in range(shape.num_heads):
            keys = k[:, head // group].T
            scores = torch.where(is_sink, sink_q[:, head] @ keys, window_q[:, head] @ keys)
            scores = (scores / math.sqrt(shape.head_dim)).masked_fill_(hidden, -math.inf)
            heads.append(torch.softmax(scores, dim=-1) @ v[:, head // group])
        return self._project(torch.cat(heads, dim=1), prefix + "o_proj")

    def _project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        product = x @ self._weight(name + ".weight").T
        bias = self._tensors.get(name + ".bias")
        return product if bias is None else product + bias.float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._shape.rms_norm_eps)
        return x * scale * self._weight(name)

    def _rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate-half of [n, heads, head_dim] at int64 [n]."""
        rope = self._shape.rope
        angles = torch.remainder(positions[:, None] * self._frequencies, 2 * math.pi)[:, None]
        cos = (torch.cos(angles) * rope.cos_sin_scale()).float()
        sin = (torch.sin(angles) * rope.cos_sin_scale()).float()
        half = rope.rotary_dim // 2
        first, second = heads[..., :half], heads[..., half : 2 * half]
        turned = [first * cos - second * sin, second * cos + first * sin, heads[..., 2 * half :]]
        return torch.cat(turned, dim=-1)

    def _weight(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        values = self._tensors[name]
        return (values if rows is None else values[rows]).float()
