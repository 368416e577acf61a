"""Cut weights, computed rank by rank and added up, give what the whole weights give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine_build.shard import (
    check_tp_size,
    head_rows,
    rank_weights,
    shard_shape,
    shard_values,
    whole_weights,
)
from engine_build.spec import ModelShape, SpecError
from engine_build.weights import MergedWeight, merged_weights
from tests.engine_fixtures import cached_tensors, tiny_shape

Floats = npt.NDArray[np.float32]
Loaded = Mapping[str, Floats]

CASES = [
    ("llama", 2),
    ("llama", 4),  # more ranks than key/value heads: they are repeated
    ("llama-mha-tied", 4),
    ("llama-bias", 2),
    ("qwen2", 2),
    ("qwen3", 2),
    ("mistral", 4),
]


def _loaded(weights: list[MergedWeight], family: str) -> dict[str, Floats]:
    return {weight.name: weight.load(cached_tensors(family)) for weight in weights}


def _attend(shape: ModelShape, qkv: Floats) -> Floats:
    """Plain causal attention without positions: what matters here is which heads meet."""
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    parts = qkv.reshape(len(qkv), heads + 2 * kv_heads, dim)
    hidden = np.triu(np.ones((len(qkv), len(qkv)), dtype=bool), 1)
    out = []
    for head in range(heads):
        kv = head // shape.heads_per_kv_head
        scores = parts[:, head] @ parts[:, heads + kv].T
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out.append(weights @ parts[:, heads + kv_heads + kv])
    return np.concatenate(out, axis=1)


def _blocks(shape: ModelShape, weights: Loaded, x: Floats) -> tuple[Floats, Floats, Floats]:
    """What one rank of one layer adds, after attention and after the MLP, and its logits."""
    bias = weights.get("layers.1.qkv.bias", np.float32(0))
    qkv = x @ weights["layers.1.qkv"].T + bias
    attended = _attend(shape, qkv) @ weights["layers.1.output"].T
    attended = attended + weights.get("layers.1.output.bias", np.float32(0))
    gate, up = np.split(x @ weights["layers.1.gate_up"].T, 2, axis=1)
    inner = gate / (1 + np.exp(-gate)) * up
    head = weights.get("head", weights["embed"])
    return attended, inner @ weights["layers.1.down"].T, x @ head.T


@pytest.mark.parametrize(("family", "tp_size"), CASES)
def test_ranks_add_up_to_the_whole(family: str, tp_size: int) -> None:
    model = tiny_shape(family)
    x = np.random.default_rng(5).standard_normal((7, model.hidden_size)).astype(np.float32) * 0.3
    whole = _blocks(model, _loaded(merged_weights(model), family), x)
    local = shard_shape(model, tp_size)
    ranks = [
        _blocks(local, _loaded(rank_weights(model, rank, tp_size), family), x)
        for rank in range(tp_size)
    ]
    np.testing.assert_allclose(sum(r[0] for r in ranks), whole[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sum(r[1] for r in ranks), whole[1], rtol=1e-4, atol=1e-4)
    logits = np.concatenate([r[2] for r in ranks], axis=1)
    np.testing.assert_allclose(logits, whole[2], rtol=1e-4, atol=1e-4)
    assert ranks[0][2].shape[1] == head_rows(model, tp_size)


def test_cutting_qkv_in_plain_rows_is_wrong() -> None:
    """The test above would see it: rows of q, k and v are not where equal pieces begin."""
    model, local = tiny_shape("llama"), shard_shape(tiny_shape("llama"), 2)
    x = np.random.default_rng(5).standard_normal((7, model.hidden_size)).astype(np.float32)
    weights = _loaded(merged_weights(model), "llama")
    whole = _blocks(model, weights, x)[0]
    total = np.zeros_like(whole)
    for rank in range(2):
        parts = _loaded(rank_weights(model, rank, 2), "llama")
        total += _blocks(local, {**parts, "layers.1.qkv": _half(weights, rank)}, x)[0]
    assert np.abs(total - whole).max() > 0.1


def _half(weights: Loaded, rank: int) -> Floats:
    half: Floats = np.split(weights["layers.1.qkv"], 2)[rank]
    return half


@pytest.mark.parametrize(("family", "tp_size"), CASES)
def test_shapes_are_what_a_decoder_of_the_ranks_shape_has(family: str, tp_size: int) -> None:
    """Graphs ask for weights by the rank's ModelShape; only the head is cut beyond it."""
    model = tiny_shape(family)
    expected = {weight.name: weight.shape for weight in merged_weights(shard_shape(model, tp_size))}
    expected["head"] = (head_rows(model, tp_size), model.hidden_size)
    for rank in range(tp_size):
        weights = rank_weights(model, rank, tp_size)
        assert {weight.name: weight.shape for weight in weights} == expected
        for weight in weights:
            values = weight.load(cached_tensors(family))
            assert values.shape == weight.shape
            assert values.flags.c_contiguous
            assert values.dtype == np.float32


def test_one_rank_is_the_model_itself() -> None:
    model = tiny_shape("qwen2")
    assert shard_shape(model, 1) is model
    assert [w.name for w in rank_weights(model, 0, 1)] == [w.name for w in merged_weights(model)]
    assert [w.name for w in whole_weights(model, 1)] == [w.name for w in merged_weights(model)]
    weight = merged_weights(model)[1]
    values = weight.load(cached_tensors("qwen2"))
    assert shard_values(weight, values, model, 0, 1) is values


@pytest.mark.parametrize(
    ("changes", "tp_size", "problem"),
    [
        ({}, 0, "not positive"),
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "attention heads of this model, 9"),
        ({"intermediate_size": 97}, 2, "intermediate size of this model, 97"),
        ({"vocab_size": 321}, 2, "vocabulary of this model, 321"),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, "3 key/value heads"),
        ({"num_heads": 12, "num_kv_heads": 6}, 4, "6 key/value heads"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    changes: dict[str, Any], tp_size: int, problem: str
) -> None:
    model = dataclasses.replace(tiny_shape("llama"), **changes)
    with pytest.raises(SpecError, match=problem) as raised:
        check_tp_size(model, tp_size)
    assert raised.value.field == "tp_size"


def test_a_refusal_names_the_sizes_that_fit() -> None:
    with pytest.raises(SpecError, match=r"Use one of 1, 2, 4$"):
        shard_shape(tiny_shape("llama"), 3)
