"""A GGUF file: metadata, tokenizer and dequantised weights, renamed and un-permuted.

Sources: ggml-org/ggml docs/gguf.md for the metadata keys; llama.cpp convert_hf_to_gguf.py for tensor
names and for the row order of q and k in the `llama` architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize

from engine_build.hf_config import DEFAULT_THETA, Fields
from engine_build.spec import ModelShape, RopeSpec, SpecError
from engine_build.tensors import Checkpoint, StoredTensor, Weights, check_shape, select_tensors
from engine_build.tokenizer import TextSource, text_from_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_DIVISORS = "rope_freqs.weight"

LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_PARTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Metadata of other decoders that share an architecture name; any value but the neutral one changes the
# computation.
NEUTRAL: Mapping[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def read_gguf(file: Path) -> Checkpoint:
    """Read a GGUF file; weights stay on disk, quantised, until asked for.

    Raises SpecError naming the metadata key or tensor that is missing, damaged or unsupported.
    """
    reader, metadata = _open(file)
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise SpecError(
            "general.architecture", f"{arch!r} is not supported", "Supported: llama, qwen2, qwen3"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shape = _shape(str(arch), metadata, tensors)
    stored = {}
    for name, tensor in tensors.items():
        if name != ROPE_DIVISORS:
            canonical = _canonical_name(name)
            stored[canonical] = _stored_tensor(tensor, _interleaved_heads(canonical, shape))
    return Checkpoint(
        name=str(metadata.get("general.name") or file.stem),
        shape=shape,
        tensors=select_tensors(shape, stored),
        text=_text(metadata),
        trained_tokens=Fields(metadata).integer(f"{arch}.context_length"),
        generation={},
    )


def _open(file: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """The reader and its metadata as plain values."""
    try:
        reader = GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        problem = f"is not a readable GGUF file: {error}"
        raise SpecError(file.name, problem, "Fetch the file again") from error
    if Fields(metadata).values.get("split.count", 1) > 1:
        raise SpecError(
            "split.count", "the model is split over several files", "Merge it with llama-gguf-split"
        )
    return reader, metadata


def _text(metadata: Mapping[str, Any]) -> TextSource:
    try:
        return text_from_gguf(metadata)
    except KeyError as error:
        raise SpecError(str(error.args[0]), "is missing", "Take a complete GGUF file") from error


def _shape(
    arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]
) -> ModelShape:
    prefix = f"{arch}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    fields = Fields(own, where=prefix)
    for name, neutral in NEUTRAL.items():
        if own.get(name, neutral) != neutral:
            raise fields.refuse(name, f"{own[name]!r} is not supported", "Use another model")
    if "token_embd.weight" not in tensors:
        raise SpecError("token_embd.weight", "is missing", "Take a complete checkpoint")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", max(1, hidden // heads))
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.refuse(
            "attention.value_length", "differs from key_length", "Use another model"
        )
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise fields.refuse(
            "rope.dimension_count", "is not the head size", "Use a model that rotates whole heads"
        )
    return check_shape(
        ModelShape(
            architecture=arch,
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=fields.integer("feed_forward_length"),
            num_layers=fields.integer("block_count"),
            num_heads=heads,
            num_kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=_decimal(fields.number("attention.layer_norm_rms_epsilon")),
            rope=_rope(fields, head_dim, tensors),
            tied_head="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
        )
    )


def _rope(fields: Fields, head_dim: int, tensors: Mapping[str, ReaderTensor]) -> RopeSpec:
    theta = _decimal(fields.number("rope.freq_base", DEFAULT_THETA))
    kind = fields.values.get("rope.scaling.type", "none")
    if any(name.startswith("rope_factors_") for name in tensors):
        kind = "longrope"
    if ROPE_DIVISORS in tensors and kind == "none":
        divisors = dequantize(tensors[ROPE_DIVISORS].data, tensors[ROPE_DIVISORS].tensor_type)
        if divisors.shape != (head_dim // 2,) or not (divisors > 0).all():
            raise SpecError(ROPE_DIVISORS, "is not one divisor a frequency", "Fetch the file again")
        return RopeSpec(
            theta=theta,
            rotary_dim=head_dim,
            scaling="divisors",
            frequency_divisors=tuple(_decimal(value) for value in divisors),
        )
    if kind == "none":
        return RopeSpec(theta=theta, rotary_dim=head_dim)
    factor = _decimal(fields.number("rope.scaling.factor", 1.0))
    if kind == "linear" and ROPE_DIVISORS not in tensors:
        return RopeSpec(theta=theta, rotary_dim=head_dim, scaling="linear", factor=factor)
    if kind == "yarn" and ROPE_DIVISORS not in tensors:
        original = fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        )
        return RopeSpec(
            theta=theta,
            rotary_dim=head_dim,
            scaling="yarn",
            factor=factor,
            original_max_positions=original,
            beta_fast=_decimal(fields.number("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=_decimal(fields.number("rope.scaling.yarn_beta_slow", 1.0)),
        )
    raise fields.refuse(
        "rope.scaling.type", f"{kind!r} is not supported", "Supported: none, linear, yarn, llama3"
    )


def _canonical_name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown one keeps its own and is refused later by it."""
    if name in TOP_PARTS:
        return TOP_PARTS[name]
    block, _, rest = name.partition(".")
    layer, _, tail = rest.partition(".")
    part, _, kind = tail.partition(".")
    if block == "blk" and layer.isdecimal() and part in LAYER_PARTS:
        return f"model.layers.{layer}.{LAYER_PARTS[part]}.{kind}"
    return name


def _interleaved_heads(canonical: str, shape: ModelShape) -> int:
    """Heads whose rows llama.cpp interleaved for its rotary layout; 0 for none."""
    if shape.architecture != "llama":
        return 0
    if ".q_proj." in canonical:
        return shape.num_heads
    return shape.num_kv_heads if ".k_proj." in canonical else 0


def _stored_tensor(tensor: ReaderTensor, interleaved_heads: int) -> StoredTensor:
    shape = tuple(int(length) for length in reversed(tensor.shape))

    def load() -> Weights:
        try:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            kind = GGMLQuantizationType(tensor.tensor_type).name
            raise SpecError(
                tensor.name,
                f"is stored as {kind}",
                "Use another quantisation, such as Q8_0 or Q4_K_M",
            ) from error
        return _split_halves(values.reshape(shape), interleaved_heads)

    return StoredTensor(shape=shape, load=load)


def _split_halves(values: Weights, heads: int) -> Weights:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...) back to (0, 1, ...); axis 0 is heads * d."""
    if not heads:
        return values
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32: GGUF keeps 1e-05 as 9.9999997e-06."""
    return float(str(np.float32(value)))
