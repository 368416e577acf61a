"""The GPU benchmark's peers and its float reference compute what they claim."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine_fixtures import cached_tensors, random_tokens, tiny_shape
from tests.reference import ReferenceDecoder, Rule

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.gpu.peers import PEERS, transformers_llama  # noqa: E402
from benchmarks.gpu.reference import WRONG_RULES, FloatReference, WindowRule  # noqa: E402
from benchmarks.gpu.shapes import TINY  # noqa: E402
from benchmarks.gpu.streaming_llm import StreamingLlama  # noqa: E402

SINKS, WINDOW, LENGTH = 4, 12, 60
MAX_ERROR = 1e-4


@pytest.mark.parametrize("family", ["llama", "llama-mha-tied"])
def test_streaming_llm_equals_the_oracle_token_by_token(family: str) -> None:
    model = transformers_llama(tiny_shape(family), "cpu", torch.float32, "eager")
    tensors = {name: torch.from_numpy(values) for name, values in cached_tensors(family).items()}
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    streaming = StreamingLlama(model, SINKS, WINDOW)
    tokens = random_tokens(3, LENGTH)
    got = np.concatenate([streaming.step(torch.tensor([[int(t)]])).numpy() for t in tokens])
    rule = Rule(SINKS, WINDOW)
    wanted = ReferenceDecoder(tiny_shape(family), cached_tensors(family), rule).push_all(0, tokens)
    assert np.abs(got - wanted).max() < MAX_ERROR
    wrong = Rule(SINKS, WINDOW, one_key_too_few=True)
    other = ReferenceDecoder(tiny_shape(family), cached_tensors(family), wrong).push_all(0, tokens)
    assert np.abs(got - other).max() > 1000 * MAX_ERROR


def test_streaming_llm_keeps_a_full_cache_full() -> None:
    peer = PEERS["streaming_llm"](TINY, "cpu", 16, torch.float32)
    assert len(peer.decode(3)) == 3
    cache = peer._streaming.cache  # type: ignore[attr-defined]
    assert all(layer[0].shape[2] == 15 for layer in cache.layers)


@pytest.mark.parametrize("name", ["recompute", "static_compile"])
def test_the_other_peers_run(name: str) -> None:
    seconds = PEERS[name](TINY, "cpu", 16, torch.float32).decode(4)
    assert len(seconds) == 4


@pytest.mark.parametrize("variant", [{}, *WRONG_RULES.values()])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llama-yarn"])
def test_the_torch_reference_equals_the_oracle_under_every_rule(
    family: str, variant: dict[str, bool]
) -> None:
    tensors = {name: torch.from_numpy(values) for name, values in cached_tensors(family).items()}
    tokens = random_tokens(5, LENGTH)
    reference = FloatReference(tiny_shape(family), tensors)
    rule = WindowRule(SINKS, WINDOW, **variant)
    indices = torch.arange(LENGTH)
    got = reference.logits(torch.from_numpy(tokens).long(), indices, rule, LENGTH).numpy()
    oracle = ReferenceDecoder(
        tiny_shape(family), cached_tensors(family), Rule(SINKS, WINDOW, **variant)
    )
    assert np.abs(got - oracle.push_all(0, tokens)).max() < MAX_ERROR


def test_the_torch_reference_equals_the_oracle_far_into_a_stream_and_after_a_bounded_replay() -> (
    None
):
    tensors = {name: torch.from_numpy(values) for name, values in cached_tensors("llama").items()}
    first, rest, offset = random_tokens(1, SINKS), random_tokens(2, 40), 16_000_000
    oracle = ReferenceDecoder(tiny_shape("llama"), cached_tensors("llama"), Rule(SINKS, WINDOW))
    oracle.push_all(0, first)
    wanted = oracle.push_all(offset, rest)
    tokens = torch.from_numpy(np.concatenate([first, rest])).long()
    indices = torch.cat([torch.arange(SINKS), torch.arange(offset, offset + 40)])
    rule = WindowRule(SINKS, WINDOW)
    got = FloatReference(tiny_shape("llama"), tensors).logits(tokens, indices, rule, 40).numpy()
    assert np.abs(got - wanted).max() < MAX_ERROR
