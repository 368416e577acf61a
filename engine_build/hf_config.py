"""A Hugging Face `config.json` as a `ModelShape`; everything unsupported is refused by field name.

Sources: transformers 5 `configuration_{llama,mistral,qwen2,qwen3}.py` and `modeling_rope_utils.py`,
for both the older keys (`rope_theta`, `rope_scaling`) and the newer `rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine_build.spec import ModelShape, RopeSpec, SpecError
from engine_build.tensors import check_shape

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED = "Supported: " + ", ".join(ARCHITECTURES.values())

QWEN3_HEAD_DIM = 128
DEFAULT_THETA = 10_000.0
DEFAULT_RMS_NORM_EPS = 1e-6
DEFAULT_SLIDING_WINDOW = 4096
DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to a JSON object. Null and absent mean the default; `where` prefixes names."""

    values: Mapping[str, Any]
    where: str = ""

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer. Raises SpecError naming the field."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(name, f"{value!r} is not a positive integer", "Correct it")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number. Raises SpecError naming the field."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, f"{value!r} is not a number", "Correct it")
        if not (math.isfinite(value) and value > 0):
            raise self.refuse(name, f"{value!r} is not a finite positive number", "Correct it")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, f"{value!r} is not true or false", "Correct it")
        return value

    def refuse(self, name: str, problem: str, fix: str) -> SpecError:
        return SpecError(self.where + name, problem, fix)

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.refuse(name, "is missing", "Take the model's own complete config.json")
        return default


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The model's shape. Raises SpecError naming the field that is wrong or unsupported."""
    fields = Fields(config)
    family = _family(fields)
    _refuse_unsupported(fields, family)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads if family == "llama" else None)
    head_dim = _head_dim(fields, family, hidden, heads)
    bias = family in ("llama", "qwen3") and fields.flag("attention_bias", False)
    return check_shape(
        ModelShape(
            architecture=family,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", DEFAULT_RMS_NORM_EPS),
            rope=_rope(fields, head_dim, trained_tokens(config)),
            tied_head=fields.flag("tie_word_embeddings", False),
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            qk_norm=family == "qwen3",
        )
    )


def trained_tokens(config: Mapping[str, Any]) -> int:
    """`max_position_embeddings`, or what transformers takes for the family when it is absent."""
    default = DEFAULT_MAX_POSITIONS.get(str(config.get("model_type")))
    return Fields(config).integer("max_position_embeddings", default)


def _family(fields: Fields) -> str:
    if fields.values.get("auto_map"):
        raise fields.refuse(
            "auto_map",
            "the model brings its own Python code, which is never run",
            f"Use a model of a stock architecture. {SUPPORTED}",
        )
    family = fields.values.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise fields.refuse("model_type", f"{family!r} is not supported", SUPPORTED)
    names = fields.values.get("architectures")
    if names is not None and names != [ARCHITECTURES[family]]:
        raise fields.refuse("architectures", f"{names!r} is not supported", SUPPORTED)
    return family


def _refuse_unsupported(fields: Fields, family: str) -> None:
    values = fields.values
    if values.get("quantization_config"):
        raise fields.refuse(
            "quantization_config",
            "the weights are already quantised",
            "Use the float32, float16 or bfloat16 checkpoint, or a GGUF file; the build quantises",
        )
    if values.get("hidden_act", "silu") != "silu":
        raise fields.refuse(
            "hidden_act", f"{values['hidden_act']!r} is not supported", "Only silu is"
        )
    if fields.flag("mlp_bias", False):
        raise fields.refuse("mlp_bias", "biases in the MLP are not supported", "Use another model")
    _refuse_sliding_window(fields, family)


def _refuse_sliding_window(fields: Fields, family: str) -> None:
    values = fields.values
    fix = "Use a model with full attention in all layers"
    in_effect = family == "mistral" or fields.flag("use_sliding_window", False)
    window = values.get("sliding_window", DEFAULT_SLIDING_WINDOW)
    if in_effect and window is not None:
        raise fields.refuse("sliding_window", f"a window of {window!r} is in effect", fix)
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        raise fields.refuse("layer_types", "not all layers have full attention", fix)


def _head_dim(fields: Fields, family: str, hidden: int, heads: int) -> int:
    if family == "qwen3":
        return fields.integer("head_dim", QWEN3_HEAD_DIM)
    if fields.values.get("head_dim") is not None:
        return fields.integer("head_dim")
    if hidden % heads:
        raise fields.refuse(
            "hidden_size",
            f"{hidden} is not a multiple of {heads} heads",
            "Correct the configuration",
        )
    return hidden // heads


def _rope(fields: Fields, head_dim: int, max_positions: int) -> RopeSpec:
    values = fields.values
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    entry = values.get(name) or {}
    if not isinstance(entry, Mapping) or any(isinstance(v, Mapping) for v in entry.values()):
        raise fields.refuse(
            name, "is not one set of parameters", "Use a model with one for all layers"
        )
    rope = Fields(entry, where=f"{name}.")
    theta = rope.number("rope_theta", fields.number("rope_theta", DEFAULT_THETA))
    if theta <= 1:
        raise fields.refuse("rope_theta", f"{theta!r} is not above 1", "Correct it")
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.refuse(
                "partial_rotary_factor", "is not 1", "Use a model that rotates whole heads"
            )
    kind = entry.get("rope_type") or entry.get("type") or "default"
    length = "original_max_position_embeddings"
    original = fields.integer(length, rope.integer(length, max_positions))
    if kind == "default" and "mrope_section" not in entry:
        return RopeSpec(theta=theta, rotary_dim=head_dim)
    if kind == "linear":
        return RopeSpec(
            theta=theta, rotary_dim=head_dim, scaling="linear", factor=rope.number("factor")
        )
    if kind == "llama3":
        return _llama3(rope, theta, head_dim, original)
    if kind == "yarn":
        factor = rope.number("factor", max_positions / original)
        return _yarn(rope, theta, head_dim, (original, factor))
    raise rope.refuse(
        "rope_type",
        f"{'mrope' if kind == 'default' else kind!r} is not supported: its angles depend on more than "
        "the position",
        "Supported: default, linear, llama3, yarn",
    )


def _llama3(rope: Fields, theta: float, head_dim: int, original: int) -> RopeSpec:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.refuse("high_freq_factor", f"{high} is not above {low}", "Correct it")
    return RopeSpec(
        theta=theta,
        rotary_dim=head_dim,
        scaling="llama3",
        factor=rope.number("factor"),
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Fields, theta: float, head_dim: int, lengths: tuple[int, float]) -> RopeSpec:
    return RopeSpec(
        theta=theta,
        rotary_dim=head_dim,
        scaling="yarn",
        original_max_positions=lengths[0],
        factor=lengths[1],
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
