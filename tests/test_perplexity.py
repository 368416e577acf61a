"""The perplexity benchmark measures what it says: its losses are those of a token-by-token run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.perplexity import Window, compare_int8, perplexity, stream, windows
from engine.onnx_engine import OnnxEngine
from engine.protocol import Row, StepPlan, TokenIds
from engine.window import SinkWindow
from tests.tiny_models import tiny_token_ids


def slow_losses(engine_dir: Path, window: Window, tokens: TokenIds) -> list[float]:
    """One token a step, float64 log-softmax."""
    engine = OnnxEngine(engine_dir, memory_budget_bytes=1 << 24, capacity=window.capacity)
    ring = engine.spec.slot_tokens - window.sinks
    sink_window = SinkWindow(window.sinks, window.capacity - window.sinks, ring)
    losses = []
    for start in range(len(tokens) - 1):
        row = Row(0, start, tokens[start : start + 1], sink_window, logits="last")
        logits = engine.step(StepPlan((row,))).rows[0].logits
        assert logits is not None
        values = logits[0].astype(np.float64)
        losses.append(math.log(np.exp(values).sum()) - values[tokens[start + 1]])
    engine.close()
    return losses


def test_losses_equal_a_token_by_token_run(tiny_engine_dir: Path) -> None:
    tokens = tiny_token_ids("llama", 75)
    seen = []
    for window in windows([16], sinks=4, tokens=len(tokens)):
        losses = stream(tiny_engine_dir, window, tokens, threads=1, label=window.kind)
        np.testing.assert_allclose(losses, slow_losses(tiny_engine_dir, window, tokens), atol=1e-4)
        seen.append(perplexity(losses))
    assert len(set(seen)) == 3  # the three windows really differ


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    assert perplexity(np.array([math.log(2.0), math.log(8.0)])) == pytest.approx(4.0)
    assert math.isnan(perplexity(np.zeros(0)))


def test_int8_is_compared_window_by_window() -> None:
    results = [
        {"window": "sinks", "capacity": 512, "weights": "float32", "perplexity": 10.0},
        {"window": "sinks", "capacity": 256, "weights": "float32", "perplexity": 20.0},
        {"window": "sinks", "capacity": 256, "weights": "int8", "perplexity": 21.0},
    ]
    assert compare_int8(results) == [{"window": "sinks", "capacity": 256, "ratio": 1.05}]
