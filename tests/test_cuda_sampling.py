"""The device sampler against engine.sampling: on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest

from engine.protocol import SampleRequest
from engine.sampling import SamplingParams, sample_rows

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from engine.cuda_sampling import DeviceSampler  # noqa: E402

NO_HISTORY = np.zeros(0, np.int32)


def test_rows_without_a_request_are_left_alone() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    requests = [SampleRequest(SamplingParams(seed=seed), 1, 0, NO_HISTORY) for seed in range(2)]
    sampler = DeviceSampler(4, 300, DEVICE)
    sampler.prepare(requests)
    sampler.run(torch.tensor(logits, device=DEVICE))
    assert sampler.read() == sample_rows(logits[:2], requests)
