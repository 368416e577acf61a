"""What an engine is: the model's shape, its number formats and the size of its window.

Pure data. An `EngineSpec` is written to `spec.json` by a build and is all that a runtime needs to
know before it maps the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

RopeScaling = Literal["default", "linear", "llama3", "yarn", "divisors"]
WeightFormat = Literal["float32", "int8", "float16", "bfloat16", "float8", "int4"]
KvDtype = Literal["float32", "float16", "bfloat16"]
Target = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]

SPEC_VERSION = 2

KV_TILE = 16
"""Places and head dimensions of a kv_slot are padded to multiples of this: kernels read whole tiles."""

TARGET_FORMATS: Mapping[Target, tuple[WeightFormat, ...]] = {
    "cpu": ("int8", "float32"),
    "cuda": ("bfloat16", "float16", "float8", "int4", "float32"),
    "tensorrt": ("bfloat16", "float16", "int4", "float32"),
    "tensorrt-rtx": ("bfloat16", "float16", "int8", "float8", "int4", "float32"),
}
"""Weight formats that each target runs, its default first."""

_KV_BYTES: Mapping[KvDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
_KV_DTYPES: Mapping[WeightFormat, KvDtype] = {
    "float32": "float32",
    "int8": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8": "bfloat16",
    "int4": "bfloat16",
}


class SpecError(ValueError):
    """A model or build option that SinkServe does not support. `field` names it."""

    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(f"{field}: {problem}. {fix}")
        self.field = field
        self.problem = problem
        self.fix = fix


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding, rotate-half layout (RoFormer, arXiv 2104.09864).

    `rotary_dim` <= head_dim dimensions are rotated. The scaling fields are those of the Hugging Face
    `rope_scaling` / `rope_parameters` entry of the same name and are ignored by the other scalings.
    "divisors" divides each frequency by its entry of `frequency_divisors` [rotary_dim / 2]: what a
    GGUF file keeps of llama3 scaling.
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_divisors: tuple[float, ...] = ()

    def inverse_frequencies(self) -> npt.NDArray[np.float64]:
        """Angle in radians per position, float64 [rotary_dim / 2]."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        inverse = 1.0 / self.theta**exponents
        if self.scaling == "linear":
            return inverse / self.factor
        if self.scaling == "llama3":
            return self._llama3(inverse)
        if self.scaling == "yarn":
            return self._yarn(inverse)
        if self.scaling == "divisors":
            return inverse / np.array(self.frequency_divisors, dtype=np.float64)
        return inverse

    def cos_sin_scale(self) -> float:
        """Factor on cos and sin: 1 except for yarn (arXiv 2309.00071, section 3.4)."""
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return _yarn_mscale(self.factor, 1.0)

    def _llama3(self, inverse: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        wavelength = 2 * math.pi / inverse
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * inverse / self.factor + smooth * inverse

    def _yarn(self, inverse: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        def dimension(rotations: float) -> float:
            return (
                self.rotary_dim
                * math.log(self.original_max_positions / (rotations * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        span = high - low if high != low else 0.001
        ramp = (np.arange(self.rotary_dim // 2, dtype=np.float64) - low) / span
        extrapolate = 1.0 - np.clip(ramp, 0.0, 1.0)
        return inverse / self.factor * (1 - extrapolate) + inverse * extrapolate


def kv_dtype_for(weight_format: WeightFormat) -> KvDtype:
    """The exact variant keeps an exact cache; 8-bit weights lose more than 16-bit keys do."""
    return _KV_DTYPES[weight_format]


def _padded(count: int) -> int:
    return -(-count // KV_TILE) * KV_TILE


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-family decoder: RMSNorm, rotary GQA attention, SwiGLU; optional biases and q/k norm."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that fixes an engine's numbers and memory.

    `capacity` = S + R is the number of tokens a query can see; S is chosen per conversation.
    `max_chunk` is the most tokens of one conversation in a step. `kv_dtype` is that of cached keys and
    values. `rewind_tokens` extra ring places let a conversation drop its newest tokens (a cut at a stop
    string) without a replay.
    """

    model: ModelShape
    capacity: int
    max_chunk: int
    weight_format: WeightFormat = "int8"
    kv_dtype: KvDtype = "float16"
    target: Target = "cpu"
    tp_size: int = 1
    rewind_tokens: int = 16
    version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        if self.capacity < 8:
            raise SpecError("capacity", f"{self.capacity} is too small", "Use at least 8 tokens")
        if self.max_chunk < 1:
            raise SpecError("max_chunk", f"{self.max_chunk} is not positive", "Use 16 to 512")
        if self.weight_format not in get_args(WeightFormat):
            formats = ", ".join(get_args(WeightFormat))
            raise SpecError("weight_format", f"{self.weight_format!r} is unknown", f"Use {formats}")
        if self.target not in get_args(Target):
            targets = ", ".join(get_args(Target))
            raise SpecError("target", f"{self.target!r} is unknown", f"Use {targets}")
        if self.weight_format not in TARGET_FORMATS[self.target]:
            formats = ", ".join(TARGET_FORMATS[self.target])
            raise SpecError(
                "weight_format",
                f"{self.target} does not run {self.weight_format}",
                f"Use {formats}",
            )
        if self.kv_dtype not in get_args(KvDtype):
            formats = ", ".join(get_args(KvDtype))
            raise SpecError("kv_dtype", f"{self.kv_dtype!r} is unknown", f"Use {formats}")

    @property
    def slot_tokens(self) -> int:
        """Token places of one kv_slot: the window plus the slack that makes writes safe.

        The CPU engine reads the ring before it writes a chunk; the others write a chunk first, and no key
        that an earlier query of the chunk still sees may be overwritten.
        """
        if self.target == "cpu":
            return self.capacity + self.rewind_tokens
        return self.capacity + max(self.rewind_tokens, self.max_chunk - 1)

    @property
    def max_sink_tokens(self) -> int:
        """The most tokens a conversation may pin."""
        return self.capacity // 2

    @property
    def kv_bytes(self) -> int:
        """Bytes of one element of `kv_dtype`."""
        return _KV_BYTES[self.kv_dtype]

    @property
    def head_bytes(self) -> int:
        """Bytes of the keys, or the values, of one head of one layer in a kv_slot."""
        return _padded(self.slot_tokens) * _padded(self.model.head_dim) * self.kv_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one kv_slot: K and V of all layers."""
        return 2 * self.model.num_layers * self.model.num_kv_heads * self.head_bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of this spec."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineSpec:
        """Inverse of `to_json`. Raises SpecError for another version or anything damaged."""
        again = "Build the engine again with `sinkserve build`"
        try:
            fields: Any = json.loads(text)
        except ValueError as error:
            raise SpecError("spec.json", f"not valid JSON: {error}", again) from error
        if not isinstance(fields, dict):
            raise SpecError("spec.json", "is not a JSON object", again)
        if fields.get("version") != SPEC_VERSION:
            raise SpecError(
                "spec.version",
                f"{fields.get('version')!r}, this release reads {SPEC_VERSION}",
                again,
            )
        try:
            model: Mapping[str, Any] = fields.pop("model")
            rope = RopeSpec(**model["rope"])
            divisors = tuple(rope.frequency_divisors)
            rope = dataclasses.replace(rope, frequency_divisors=divisors)
            return cls(model=ModelShape(**{**model, "rope": rope}), **fields)
        except (KeyError, TypeError) as error:
            raise SpecError("spec.json", str(error), again) from error
