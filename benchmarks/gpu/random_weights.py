"""Random weights of a shape, made on the device, under Hugging Face names."""

from __future__ import annotations

import torch

from engine_build.spec import ModelShape


def random_tensors(
    shape: ModelShape, device: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights whose attention is peaked: scores have a spread of about 2, so that a wrong mask or angle
    moves the logits by much more than rounding does. Activations stay finite at any depth.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int, gain: float) -> None:
        values = torch.empty(rows, columns, device=device, dtype=dtype)
        tensors[name] = values.normal_(0.0, gain / columns**0.5, generator=generator)

    def vector(name: str, size: int, mean: float) -> None:
        values = torch.empty(size, device=device, dtype=dtype)
        tensors[name] = values.normal_(mean, 0.2, generator=generator)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrix("model.embed_tokens.weight", shape.vocab_size, hidden, 4.0)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        vector(prefix + "input_layernorm.weight", hidden, 1.0)
        for name, size, gain in (("q", q_size, 1.5), ("k", kv_size, 1.5), ("v", kv_size, 1.0)):
            matrix(f"{attention}{name}_proj.weight", size, hidden, gain)
            if shape.qkv_bias:
                vector(f"{attention}{name}_proj.bias", size, 0.0)
        if shape.qk_norm:
            vector(attention + "q_norm.weight", shape.head_dim, 1.3)
            vector(attention + "k_norm.weight", shape.head_dim, 1.3)
        matrix(attention + "o_proj.weight", hidden, q_size, 1.0)
        if shape.output_bias:
            vector(attention + "o_proj.bias", hidden, 0.0)
        vector(prefix + "post_attention_layernorm.weight", hidden, 1.0)
        matrix(prefix + "mlp.gate_proj.weight", inner, hidden, 1.0)
        matrix(prefix + "mlp.up_proj.weight", inner, hidden, 1.0)
        matrix(prefix + "mlp.down_proj.weight", hidden, inner, 1.0)
    vector("model.norm.weight", hidden, 1.0)
    if not shape.tied_head:
        matrix("lm_head.weight", shape.vocab_size, hidden, 2.0)
    return tensors
