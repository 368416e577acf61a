"""Linear layers of 4-bit weights, interpreted, against NumPy on the very numbers that were stored."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from engine_build import int4
from tests.cuda_fixtures import torch

from engine import cuda_linear  # isort: skip
from engine.cuda_kernels.linear import Blocks, Norm  # isort: skip
from engine.cuda_kernels.packed_linear import PackedWeights, unpack  # isort: skip
from engine.cuda_linear import LIBRARY, Choice, LinearLayers, default_choice, key_of  # isort: skip

Floats = npt.NDArray[np.floating[Any]]
EPSILON = 1e-5
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
LAYERS = LinearLayers({}, num_processors=1, overlap=False)
VECTOR, WIDE = Choice("vector", Blocks(16, 128)), Choice("vector", Blocks(32, 1024))
TILE = Choice("tile", Blocks(32, 128))


def drawn(*size: int) -> Any:
    return torch.from_numpy(np.random.default_rng(sum(size)).standard_normal(size))


def packed(
    outputs: int, inputs: int, dtype: Any, gated: bool = False
) -> tuple[PackedWeights, Floats]:
    """Weights and the matrix they stand for."""
    matrix = (drawn(outputs, inputs) / inputs**0.5).float().numpy()
    matrix[:, -3:] *= 4  # the last group has a scale of its own
    kind = ml_dtypes.bfloat16 if dtype is torch.bfloat16 else np.float16
    levels, scales = int4.quantise(matrix, kind)
    exact = int4.dequantise(levels, scales).astype(np.float64)
    words, padded = int4.to_words(levels, scales)
    bits = torch.from_numpy(padded.view(np.int16))
    scale = bits.view(torch.bfloat16 if dtype is torch.bfloat16 else torch.float16)
    bias = drawn(outputs).to(dtype)
    return PackedWeights(torch.from_numpy(words), scale, bias, gated, inputs), exact


def normed(x: Floats, weight: Floats) -> Floats:
    result: Floats = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON) * weight
    return result


def error_of(
    choice: Choice | None,
    tokens: int,
    inputs: int,
    gated: bool,
    dtype: Any,
    wrong_group: bool = False,
) -> float:
    """The largest, relative to the largest result: norm, product, bias, then gate or sum."""
    outputs = 40
    weights, exact = packed(2 * outputs if gated else outputs, inputs, dtype, gated)
    if wrong_group and weights.scale is not None:
        weights = dataclasses.replace(weights, scale=weights.scale.roll(1, 1))
    norm = 1 + 0.2 * drawn(inputs).float()
    x, before = drawn(tokens, inputs).to(dtype), drawn(tokens, outputs).to(dtype)
    out, way = before.clone(), choice or default_choice(weights, tokens, 1)
    LAYERS.run_as(way, x, weights, out, Norm(norm, EPSILON), accumulate=not gated)
    assert weights.bias is not None
    wanted = normed(x.double().numpy(), norm.double().numpy()) @ exact.T
    wanted = wanted + weights.bias.double().numpy()
    gate, up = wanted[:, :outputs], wanted[:, outputs:]
    with np.errstate(over="ignore"):
        wanted = gate / (1 + np.exp(-gate)) * up if gated else wanted + before.double().numpy()
    return float(np.abs(out.double().numpy() - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("inputs", [128, 256 + 128, 64, 576, 96, 288])
@pytest.mark.parametrize(
    ("choice", "tokens"), [(VECTOR, 1), (WIDE, 1), (TILE, 2), (TILE, 20), (LIBRARY, 3)]
)
def test_layers_equal_numpy(
    choice: Choice, tokens: int, inputs: int, gated: bool, dtype: Any
) -> None:
    """Groups of 128, 64 and 32; blocks that end beyond the inputs; outputs that no block divides."""
    assert error_of(choice, tokens, inputs, gated, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [*range(1, 6), 15, 16, 17, 31, 33, 48, 63, 64, 65, 70])
def test_any_number_of_tokens(tokens: int) -> None:
    """As the engine chooses; and in tiles, of which there are two beyond 64 tokens."""
    assert error_of(None, tokens, 320, True, torch.bfloat16) < TOLERANCE[torch.bfloat16]
    assert error_of(TILE, tokens, 320, False, torch.float32) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("choice", "tokens"), [(VECTOR, 1), (TILE, 4), (LIBRARY, 4)])
def test_a_scale_of_the_group_beside_is_noticed(choice: Choice, tokens: int) -> None:
    assert error_of(choice, tokens, 576, False, torch.float32, wrong_group=True) > 0.05


def test_a_matrix_is_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, exact = packed(600, 96, torch.float16)
    whole = torch.empty(600, 96, dtype=torch.float32)
    unpack(weights, slice(0, 600), whole)
    assert (whole.numpy() == exact.astype(np.float32)).all()
    monkeypatch.setattr(cuda_linear, "_UNPACKED_BYTES", 1)
    seen: list[slice] = []

    def watched(weights: PackedWeights, rows: slice, out: Any) -> None:
        seen.append(rows)
        unpack(weights, rows, out)

    monkeypatch.setattr(cuda_linear, "unpack", watched)
    x, out = drawn(5, 96).float(), torch.empty(5, 600)
    LAYERS.run_as(LIBRARY, x, dataclasses.replace(weights, bias=None), out)
    assert seen == [slice(0, 256), slice(256, 512), slice(512, 600)]
    assert np.abs(out.numpy() - x.numpy() @ exact.T).max() < 1e-4


def test_a_choice_knows_the_group() -> None:
    weights, _ = packed(40, 576, torch.float16, gated=True)
    assert key_of(weights, 5) == "40x576-int4by64-gated@8"
    assert (weights.num_inputs, weights.num_outputs, weights.num_words) == (576, 20, 80)


@pytest.mark.parametrize("tokens", [1, 2, 32, 64, 65])
def test_defaults_on_a_gpu(tokens: int) -> None:
    for outputs, inputs in ((6144, 4096), (4096, 14336), (1152, 896)):
        words = torch.empty(outputs, inputs // 8, dtype=torch.int32, device="meta")
        scale = torch.empty(outputs, inputs // 128, dtype=torch.bfloat16, device="meta")
        choice = default_choice(PackedWeights(words, scale, inputs=inputs), tokens, 132)
        assert choice.kind == ("vector" if tokens == 1 else "tile" if tokens <= 64 else "library")
