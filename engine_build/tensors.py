"""What a checkpoint is once read: a model's shape, its weights under canonical names, its text side.

Canonical names are those of Hugging Face Llama checkpoints: `model.embed_tokens.weight`,
`model.layers.N.self_attn.q_proj.weight`, ..., `model.norm.weight`, `lm_head.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine_build.spec import ModelShape, SpecError
from engine_build.tokenizer import TextSource

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk. `load` reads it as float32 of `shape`."""

    shape: tuple[int, ...]
    load: Callable[[], Weights]


class LazyTensors(Mapping[str, Weights]):
    """Tensors by name, read from disk at each access and not kept: float32, C-contiguous.

    Raises SpecError naming the tensor when it holds NaN or infinity.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> Weights:
        values = np.ascontiguousarray(self._stored[name].load(), dtype=np.float32)
        if not np.isfinite(values).all():
            raise SpecError(name, "holds NaN or infinity", "Take an undamaged checkpoint")
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model read from disk.

    `trained_tokens` is the longest context it was trained for; `generation` holds its own sampling
    defaults (a subset of temperature, top_p, top_k, min_p, repetition_penalty).
    """

    name: str
    shape: ModelShape
    tensors: Mapping[str, Weights]
    text: TextSource
    trained_tokens: int
    generation: Mapping[str, float]


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor that a model of this shape has, in the order of use."""
    hidden, inner, head_dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q_size, kv_size = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        expected[prefix + "input_layernorm.weight"] = (hidden,)
        for part, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            expected[f"{attention}{part}.weight"] = (size, hidden)
            if shape.qkv_bias:
                expected[f"{attention}{part}.bias"] = (size,)
        if shape.qk_norm:
            expected[attention + "q_norm.weight"] = (head_dim,)
            expected[attention + "k_norm.weight"] = (head_dim,)
        expected[attention + "o_proj.weight"] = (hidden, q_size)
        if shape.output_bias:
            expected[attention + "o_proj.bias"] = (hidden,)
        expected[prefix + "post_attention_layernorm.weight"] = (hidden,)
        expected[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
        expected[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        expected[prefix + "mlp.down_proj.weight"] = (hidden, inner)
    expected["model.norm.weight"] = (hidden,)
    if not shape.tied_head:
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    return expected


def select_tensors(shape: ModelShape, stored: Mapping[str, StoredTensor]) -> LazyTensors:
    """The tensors of this shape out of those on disk.

    Raises SpecError for a missing or mis-shaped tensor, and for one that the model would not use:
    leaving a weight out silently would be a different model.
    """
    expected = expected_tensors(shape)
    for name, wanted in expected.items():
        if name not in stored:
            raise SpecError(name, "is missing from the checkpoint", "Take a complete checkpoint")
        if stored[name].shape != wanted:
            raise SpecError(
                name,
                f"has shape {list(stored[name].shape)}, the configuration says {list(wanted)}",
                "Take the configuration and the weights from the same model",
            )
    for name in stored:
        unused = name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")
        if name not in expected and not unused:
            raise SpecError(
                name,
                "is not a tensor of a supported decoder",
                "Supported: Llama, Mistral, Qwen2, Qwen3 without adapters or extra heads",
            )
    return LazyTensors({name: stored[name] for name in expected})


def check_shape(shape: ModelShape) -> ModelShape:
    """Return the shape. Raises SpecError where attention heads do not divide as they must."""
    if shape.num_heads % shape.num_kv_heads:
        raise SpecError(
            "num_key_value_heads",
            f"{shape.num_heads} heads are not a multiple of {shape.num_kv_heads} key/value heads",
            "Correct the configuration",
        )
    if shape.head_dim % 2:
        raise SpecError(
            "head_dim",
            f"{shape.head_dim} is odd, rotary embedding needs pairs",
            "Use another model",
        )
    return shape
