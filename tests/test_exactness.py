"""What concerns the oracle itself, 8-bit weights and the demo model; every engine against the oracle is in
exactness_contract.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.onnx_engine import OnnxEngine
from engine_build.checkpoint import read_checkpoint
from engine_build.graph import export_graph
from engine_build.spec import EngineSpec
from tests.engine_fixtures import feed, make_engine, random_tokens, row_for, window_of
from tests.exactness_contract import (
    CAPACITY,
    DATA,
    MAX_ERROR,
    MIXED,
    error,
    oracle,
    oracle_logits,
)
from tests.reference import Rule
from tests.tiny_models import tiny_token_ids


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "qwen3"])
def test_the_oracle_equals_stock_transformers(family: str) -> None:
    stock = np.load(DATA / "stock_logits_tiny.npz")
    got = oracle(Rule(4, 60), family).push_all(0, tiny_token_ids(family, 48))
    assert error(got[stock[f"{family}/positions"]], stock[f"{family}/logits"]) < MAX_ERROR


@pytest.mark.parametrize("family", ["llama", "llama-mha-tied", "mistral", "qwen2"])
def test_int8_stays_near_float32(family: str) -> None:
    """Odd widths too: 24-wide heads, 96 columns that no long block divides."""
    engine = make_engine(family, capacity=CAPACITY, weight_format="int8", slots=1)
    got = feed(engine, random_tokens(7, 150), row_for(window_of(engine.spec, 4)), MIXED)
    wanted = oracle_logits(4, 150, family)
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.98


@pytest.mark.slow
def test_the_demo_model_equals_stock_transformers(demo_gguf: Path, tmp_path: Path) -> None:
    stock = json.loads((DATA / "stock_logits_smollm2.json").read_text())
    checkpoint = read_checkpoint(demo_gguf)
    spec = EngineSpec(checkpoint.shape, 512, 64, "float32", "float32")
    export_graph(spec, checkpoint.tensors, tmp_path, lambda fraction: None)
    (tmp_path / "spec.json").write_text(spec.to_json())
    engine = OnnxEngine(tmp_path, memory_budget_bytes=spec.slot_bytes)
    tokens = np.array(stock["token_ids"], np.int32)
    got = feed(engine, tokens, row_for(window_of(spec, 4)), [16])
    for row in stock["rows"]:
        logits = got[row["position"]]
        assert np.abs(logits[stock["logit_ids"]] - row["logits"]).max() < MAX_ERROR
        assert np.abs(logits[row["top_ids"]] - row["top_logits"]).max() < MAX_ERROR
