"""Weights on the device: out of an engine directory, out of tensors already there, or random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.cuda_kernels.linear import Norm, Weights
from engine.cuda_kernels.packed_linear import PackedWeights
from engine.cuda_kernels.rotate import HeadNorms
from engine.cuda_options import CudaOptions
from engine_build import int4
from engine_build.engine_names import LEVELS, SCALES
from engine_build.lowering_cuda import INT4_SCALE, LARGEST_FLOAT8, is_scaled
from engine_build.shard import rank_weights
from engine_build.spec import EngineSpec, KvDtype, ModelShape, SpecError
from engine_build.weights import MergedWeight, read_weight_file

Source = Callable[[MergedWeight], "Stored"]

DTYPES: Mapping[KvDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as kept: `scale` is float32 [outputs] if `values` are float8, 16-bit [outputs, groups] if they
    are words of 4-bit levels."""

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's."""

    input_norm: Norm
    qkv: Weights
    head_norms: HeadNorms | None
    output: Weights
    mlp_norm: Norm
    gate_up: Weights
    down: Weights


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """One rank's. `embed` is [vocab, hidden] of the activations' dtype."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Weights


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of the weights: this rank's of `size`."""

    rank: int = 0
    size: int = 1


def part_of(options: CudaOptions) -> Part:
    """This process's part, by its options."""
    parallel = options.tensor_parallel
    return Part() if parallel is None else Part(parallel.rank, parallel.size)


def from_file(file: Path, device: torch.device) -> Source:
    """The weights of one rank's folder of an engine directory."""
    stored = read_weight_file(file)

    def tensor(name: str) -> Tensor:
        if name not in stored:
            raise SpecError(name, "is not in weights.safetensors", "Build the engine again")
        # NumPy's own types only: torch does not know ml_dtypes.
        values = stored[name]
        bits = torch.from_numpy(np.array(values.view(f"u{values.dtype.itemsize}")))
        return bits.to(device).view(_TORCH_TYPES[values.dtype.name])

    def load(weight: MergedWeight) -> Stored:
        if weight.name + LEVELS in stored:
            return Stored(tensor(weight.name + LEVELS), tensor(weight.name + SCALES))
        return Stored(tensor(weight.name))

    return load


def from_tensors(tensors: Mapping[str, Tensor], spec: EngineSpec, device: torch.device) -> Source:
    """Out of tensors under Hugging Face names, such as a reference in the same process runs on."""
    model = spec.model
    scale = model.head_dim**-0.5

    def load(weight: MergedWeight) -> Stored:
        prefix, _, kind = weight.name.rpartition(".")
        if kind == "bias":
            prefix, _, kind = prefix.rpartition(".")
            kind += ".bias"
        return _stored(_merge(tensors, prefix, kind, scale).to(device), weight, spec)

    def _merge(tensors: Mapping[str, Tensor], prefix: str, kind: str, scale: float) -> Tensor:
        if not prefix:
            return tensors[_OUTER[kind]]
        parts = [tensors[f"model.{prefix}.{name}"] for name in _INNER[kind]]
        # The scale of attention is folded into q, or into its norm if it has one.
        if kind == "q_norm" or (kind.startswith("qkv") and not model.qk_norm):
            parts[0] = (parts[0].float() * scale).to(parts[0].dtype)
        return torch.cat(parts)

    return load


def random_weights(spec: EngineSpec, seed: int, device: torch.device) -> Source:
    """Weights of a model nobody trained: speed does not depend on their values."""
    generator = torch.Generator(device).manual_seed(seed)

    def load(weight: MergedWeight) -> Stored:
        if spec.weight_format == "int4" and is_scaled(weight, "int4"):
            return _random_packed(weight.shape, generator)
        values = torch.empty(weight.shape, dtype=DTYPES[spec.kv_dtype], device=device)
        if weight.is_matrix:
            values.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
        else:
            values.normal_(1.0, 0.1, generator=generator)
        return _stored(values, weight, spec)

    return load


def load_weights(spec: EngineSpec, local: ModelShape, part: Part, source: Source) -> DecoderWeights:
    """All weights of one rank, whose decoder has the shape `local`."""
    names = {weight.name: weight for weight in rank_weights(spec.model, part.rank, part.size)}
    epsilon, activations = spec.model.rms_norm_eps, DTYPES[spec.kv_dtype]

    def vector(name: str) -> Tensor:
        return source(names[name]).values.float()

    def matrix(name: str, bias: bool = False, gated: bool = False) -> Weights:
        stored = source(names[name])
        added = vector(name + ".bias").to(activations) if bias else None
        if stored.values.dtype == torch.int32:
            inputs = names[name].shape[1]
            return PackedWeights(stored.values, stored.scale, added, gated, inputs)
        return Weights(stored.values, stored.scale, added, gated)

    layers = []
    for number in range(local.num_layers):
        name = f"layers.{number}."
        norms = None
        if local.qk_norm:
            norms = HeadNorms(vector(name + "q_norm"), vector(name + "k_norm"), epsilon)
        layers.append(
            LayerWeights(
                input_norm=Norm(vector(name + "input_norm"), epsilon),
                qkv=matrix(name + "qkv", local.qkv_bias),
                head_norms=norms,
                output=matrix(name + "output", local.output_bias),
                mlp_norm=Norm(vector(name + "mlp_norm"), epsilon),
                gate_up=matrix(name + "gate_up", gated=True),
                down=matrix(name + "down"),
            )
        )
    embed = source(names["embed"]).values
    head = Weights(embed) if local.tied_head else matrix("head")
    return DecoderWeights(embed, tuple(layers), Norm(vector("norm"), epsilon), head)


def _stored(values: Tensor, weight: MergedWeight, spec: EngineSpec) -> Stored:
    if not is_scaled(weight, spec.weight_format):
        return Stored(values.to(DTYPES[spec.kv_dtype]) if weight.is_matrix else values)
    if spec.weight_format == "int4":
        return _packed(values)
    wide = values.float()
    scale = wide.abs().amax(dim=1).clamp(min=1e-12) / LARGEST_FLOAT8
    return Stored((wide / scale[:, None]).to(torch.float8_e4m3fn), scale)


def _packed(values: Tensor) -> Stored:
    """On the host, as a build does."""
    levels, scales = int4.quantise(values.float().cpu().numpy(), INT4_SCALE)
    words, padded = int4.to_words(levels, scales)
    scale = torch.from_numpy(padded.view(np.int16)).view(torch.bfloat16)
    return Stored(torch.from_numpy(words).to(values.device), scale.to(values.device))


def _random_packed(shape: tuple[int, ...], generator: torch.Generator) -> Stored:
    """Any words are levels; their root mean square is 4.6."""
    outputs, inputs = shape
    device = generator.device
    words = torch.empty((outputs, int4.num_words(inputs)), dtype=torch.int32, device=device)
    words.random_(-(2**31), 2**31, generator=generator)
    scale = torch.full((outputs, int4.num_scales(inputs)), inputs**-0.5 / 4.6, device=device)
    return Stored(words, scale.to(torch.bfloat16))


_TORCH_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int32": torch.int32,
}
_OUTER = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_INNER = {
    "input_norm": ("input_layernorm.weight",),
    "qkv": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "qkv.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "output": ("self_attn.o_proj.weight",),
    "output.bias": ("self_attn.o_proj.bias",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
