"""StreamingLLM as published (arXiv 2309.17453, section 3.2, the authors' evaluation loop): the peer.

Written from the description. Keys are cached without rotation; each step every cached key is rotated to
its position inside the cache, in every layer; attention is eager (matmul, softmax in float32, matmul);
after each token every layer's keys and values are cut to the sinks and the most recent ones and
concatenated anew. Everything around attention is transformers' own Llama.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch


class StreamingCache:
    """Un-rotated keys and values, a pair of [1, kv_heads, n, head_dim] a layer; n <= sinks + recent."""

    def __init__(self, num_layers: int, sink_tokens: int, recent_tokens: int) -> None:
        self.sink_tokens, self.recent_tokens = sink_tokens, recent_tokens
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the layer, the new ones last."""
        kept = self.layers[layer]
        if kept is not None:
            keys = torch.cat([kept[0], keys], dim=2)
            values = torch.cat([kept[1], values], dim=2)
        self.layers[layer] = keys, values
        return keys, values

    def evict(self) -> None:
        """Keep the first `sink_tokens` and the last `recent_tokens` of every layer."""
        for number, layer in enumerate(self.layers):
            if layer is None or layer[0].shape[2] <= self.sink_tokens + self.recent_tokens:
                continue
            self.layers[number] = self._cut(layer[0]), self._cut(layer[1])

    def _cut(self, kept: torch.Tensor) -> torch.Tensor:
        first = kept[:, :, : self.sink_tokens]
        last = kept[:, :, kept.shape[2] - self.recent_tokens :]
        return torch.cat([first, last], dim=2)


class StreamingLlama:
    """`model`: a transformers Llama with eager attention, which is replaced in place.

    Attends to S + R keys, the current one included, as the engine does: S sinks and R - 1 recent tokens
    are kept between steps.
    """

    def __init__(self, model: Any, sink_tokens: int, window_tokens: int) -> None:
        self._model = model
        config = model.config
        self._head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.cache = StreamingCache(config.num_hidden_layers, sink_tokens, window_tokens - 1)
        weight = model.lm_head.weight
        positions = torch.arange(sink_tokens + window_tokens, device=weight.device)[None]
        probe = torch.zeros(1, 1, 1, device=weight.device, dtype=weight.dtype)
        cos, sin = model.model.rotary_emb(probe, positions)
        self._cos, self._sin = cos[0], sin[0]
        for number, layer in enumerate(model.model.layers):
            self._replace_attention(layer.self_attn, number)

    def fill(self) -> None:
        """Random keys and values, as many as a full cache keeps: speed does not depend on their values."""
        config, weight = self._model.config, self._model.lm_head.weight
        size = (
            1,
            config.num_key_value_heads,
            self.cache.sink_tokens + self.cache.recent_tokens,
            self._head_dim,
        )
        for number in range(config.num_hidden_layers):
            keys = torch.randn(size, device=weight.device, dtype=weight.dtype)
            self.cache.layers[number] = keys, torch.randn_like(keys)

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocab] after one more token; `token_ids` int64 [1, 1]."""
        with torch.no_grad():
            logits: torch.Tensor = self._model(input_ids=token_ids, use_cache=False).logits
            self.cache.evict()
        return logits[:, -1]

    def _replace_attention(self, attention: Any, number: int) -> None:
        def forward(module: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            # None stands for the attention weights that nobody asks for.
            return self._attend(module, number, hidden_states), None

        attention.forward = types.MethodType(forward, attention)

    def _attend(self, module: Any, number: int, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        split = (batch, count, -1, self._head_dim)
        q = module.q_proj(x).view(split).transpose(1, 2)
        k = module.k_proj(x).view(split).transpose(1, 2)
        v = module.v_proj(x).view(split).transpose(1, 2)
        k, v = self.cache.append(number, k, v)
        cached = k.shape[2]
        query_places = torch.arange(cached - count, cached, device=x.device)
        key_places = torch.arange(cached, device=x.device)
        q, k = self._rotate(q, query_places), self._rotate(k, key_places)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self._head_dim)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(batch, count, -1)
        result: torch.Tensor = module.o_proj(out)
        return result

    def _rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self._cos[positions], self._sin[positions]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-second, first], dim=-1) * sin
