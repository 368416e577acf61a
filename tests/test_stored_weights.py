"""Stored weights are read back as what an engine computes with, whatever their format and ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from engine_build import int4
from engine_build.graph import export_graph
from engine_build.lowering_cuda import INT4_SCALE
from engine_build.spec import (
    TARGET_FORMATS,
    EngineSpec,
    SpecError,
    Target,
    WeightFormat,
    kv_dtype_for,
)
from engine_build.stored_weights import stored_weights
from engine_build.weights import merged_weights
from tests.engine_fixtures import cached_tensors, tiny_shape

ROUNDED: dict[WeightFormat, float] = {
    "float32": 0.0,
    "float16": 1e-3,
    "bfloat16": 1e-2,
    "int8": 1.5e-2,
    "float8": 6e-2,
    "int4": 0.13,
}
"""The most that a format's rounding makes a matrix differ (Frobenius norm, relative)."""


def exported(
    folder: Path, target: Target, weight_format: WeightFormat, tp_size: int, family: str = "llama"
) -> EngineSpec:
    spec = EngineSpec(
        tiny_shape(family), 32, 16, weight_format, kv_dtype_for(weight_format), target, tp_size
    )
    export_graph(spec, cached_tensors(family), folder, lambda fraction: None)
    return spec


def check(folder: Path, spec: EngineSpec, family: str = "llama") -> None:
    load = stored_weights(folder, spec)
    for weight in merged_weights(spec.model):
        got, wanted = load(weight.name), weight.load(cached_tensors(family))
        assert got.dtype == np.float32
        assert got.shape == wanted.shape
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert error <= ROUNDED[spec.weight_format], weight.name


@pytest.mark.parametrize(
    ("target", "weight_format"),
    [
        (target, one)
        for target, formats in TARGET_FORMATS.items()
        for one in formats
        if (target, one) != ("tensorrt", "int4")  # wants wider matrices than a tiny model has
    ],
)
def test_every_format_of_every_target(
    target: Target, weight_format: WeightFormat, tmp_path: Path
) -> None:
    check(tmp_path, exported(tmp_path, target, weight_format, 1))


@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama-mha-tied", "qwen3"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_the_ranks_of_a_group_are_put_together(family: str, tp_size: int, tmp_path: Path) -> None:
    """With 4 ranks and 2 key/value heads, each is held by two ranks."""
    check(tmp_path, exported(tmp_path, "cpu", "float32", tp_size, family), family)


@pytest.mark.parametrize("target", ["cuda", "tensorrt-rtx"])
def test_four_bits_are_rounded_by_each_rank(target: Target, tmp_path: Path) -> None:
    """What each rank has is what it would make of its part alone: no scale is shared across a cut."""
    inner = 128
    shape = dataclasses.replace(tiny_shape("llama"), intermediate_size=inner)
    tensors = dict(cached_tensors("llama"))
    rng = np.random.default_rng(5)
    for layer in range(shape.num_layers):
        for name, size in (("gate", (inner, 64)), ("up", (inner, 64)), ("down", (64, inner))):
            values = rng.standard_normal(size).astype(np.float32)
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = values
    spec = EngineSpec(shape, 32, 16, "int4", "bfloat16", target, 2)
    export_graph(spec, tensors, tmp_path, lambda fraction: None)
    load = stored_weights(tmp_path, spec)
    for weight in merged_weights(shape):
        if weight.name.endswith((".output", ".down")):
            parts = np.split(weight.load(tensors), 2, axis=1)
            rounded = [int4.dequantise(*int4.quantise(part, INT4_SCALE)) for part in parts]
            assert (load(weight.name) == np.concatenate(rounded, axis=1)).all()


@pytest.mark.parametrize("target", ["cuda", "tensorrt-rtx"])
def test_ranks_whose_parts_have_no_groups_are_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"weight_format: int4 .* has 48 on each rank"):
        exported(tmp_path, target, "int4", 2)


def test_what_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    spec = exported(tmp_path, "cpu", "float32", 1)
    load = stored_weights(tmp_path, spec)
    with pytest.raises(SpecError, match=r"has no layers\.9\.qkv"):
        load("layers.9.qkv")
    for damage in (b"", b"\x05" * 64):
        (tmp_path / "weights.safetensors").write_bytes(damage)
        with pytest.raises(SpecError, match="cannot be read"):
            stored_weights(tmp_path, spec)
