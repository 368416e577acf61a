"""The models that are measured, by shape alone, and the grid of points. Pure.

Weights are random: the speed of a dense decoder does not depend on their values (zeros excepted, which
draw less power and run faster).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine_build.spec import EngineSpec, ModelShape, RopeSpec, Target, WeightFormat, kv_dtype_for

BATCHES = (1, 8, 64, 256)
CAPACITIES = (512, 1024, 2048, 4096)
AGES = (1_000, 10_000, 100_000, 1_000_000, 4_000_000)
REPLAY_WINDOWS = (1, 2, 4, 8)
MAX_CHUNK = 512
SINK_TOKENS = 4
CHECKED_LAYERS, CHECKED_VOCABULARY = 4, 2048

LLAMA_2_7B = ModelShape(
    architecture="llama",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=10_000.0, rotary_dim=128),
)
LLAMA_3_8B = ModelShape(
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=500_000.0, rotary_dim=128),
)
QWEN2_5_0_5B = ModelShape(
    architecture="qwen2",
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope=RopeSpec(theta=1_000_000.0, rotary_dim=64),
    tied_head=True,
    qkv_bias=True,
)
TINY = ModelShape(
    architecture="llama",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=10_000.0, rotary_dim=16),
)
MODELS: Mapping[str, ModelShape] = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3-8b": LLAMA_3_8B,
    "qwen2.5-0.5b": QWEN2_5_0_5B,
    "tiny": TINY,
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a point is measured: about `seconds`, within `least` and `most` repetitions, after at least
    `warm_s` of the same steps; comparisons in `rounds` of `steps` each; `draws` sampled tokens are compared,
    three a step."""

    seconds: float = 1.5
    warm_s: float = 0.5
    least: int = 10
    most: int = 200
    rounds: int = 8
    steps: int = 24
    draws: int = 300

    def repetitions(self, seconds: float) -> int:
        """How often to repeat a step that takes `seconds`."""
        return max(self.least, min(self.most, int(self.seconds / max(seconds, 1e-6))))


@dataclass(frozen=True, slots=True)
class Grid:
    """What one run measures: `--quick` and `--tiny` take less of each."""

    models: tuple[str, ...] = ("llama-2-7b", "llama-3-8b", "qwen2.5-0.5b")
    batches: tuple[int, ...] = BATCHES
    capacities: tuple[int, ...] = CAPACITIES
    ages: tuple[int, ...] = AGES
    replay_windows: tuple[int, ...] = REPLAY_WINDOWS
    max_chunk: int = MAX_CHUNK
    weight_format: WeightFormat = "bfloat16"
    effort: Effort = Effort()


FULL = Grid()
QUICK = Grid(
    models=("llama-3-8b",), batches=(1, 64), capacities=(512, 2048), ages=(1_000, 4_000_000)
)
TINY_GRID = Grid(
    models=("tiny",),
    batches=(1, 2),
    capacities=(16,),
    ages=(40, 1_000_000),
    replay_windows=(1, 2),
    max_chunk=8,
    weight_format="float32",
    effort=Effort(seconds=0.0, warm_s=0.0, least=2, most=2, rounds=1, steps=2, draws=12),
)


def cut_shape(shape: ModelShape) -> ModelShape:
    """The widths of `shape`, with so few layers and tokens that a float32 reference fits beside it."""
    return replace(
        shape,
        num_layers=min(CHECKED_LAYERS, shape.num_layers),
        vocab_size=min(CHECKED_VOCABULARY, shape.vocab_size),
    )


def spec_for(
    shape: ModelShape,
    capacity: int,
    max_chunk: int,
    weight_format: WeightFormat,
    target: Target = "cuda",
) -> EngineSpec:
    """The engine of a shape. `rewind_tokens` 0: a benchmark drops no tokens."""
    return EngineSpec(
        shape,
        capacity,
        max_chunk,
        weight_format,
        kv_dtype_for(weight_format),
        target=target,
        rewind_tokens=0,
    )


@dataclass(frozen=True, slots=True)
class Point:
    """One engine to measure: a model by name, its window and number format, what it runs on."""

    model: str
    capacity: int
    max_chunk: int
    weight_format: WeightFormat
    target: Target = "cuda"

    @property
    def spec(self) -> EngineSpec:
        shape = MODELS[self.model]
        return spec_for(shape, self.capacity, self.max_chunk, self.weight_format, self.target)

    def described(self) -> dict[str, str | int]:
        return {
            "model": self.model,
            "capacity": self.capacity,
            "max_chunk": self.max_chunk,
            "weight_format": self.weight_format,
            "target": self.target,
        }


def linear_parameters(shape: ModelShape) -> int:
    """Elements of all matrices that a token is multiplied with: layers and head, not the embedding."""
    return sum(rows * columns * count for _, rows, columns, count in matrices(shape))


def matrices(shape: ModelShape) -> tuple[tuple[str, int, int, int], ...]:
    """(name, output features, input features, how often in the model) of every linear layer.

    q, k and v are one product, and so are gate and up: an engine is free to fuse them.
    """
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layers = shape.num_layers
    return (
        ("qkv", heads + 2 * kv_heads, shape.hidden_size, layers),
        ("output", shape.hidden_size, heads, layers),
        ("gate_up", 2 * shape.intermediate_size, shape.hidden_size, layers),
        ("down", shape.hidden_size, shape.intermediate_size, layers),
        ("head", shape.vocab_size, shape.hidden_size, 1),
    )
