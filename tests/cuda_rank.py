"""One rank of a tensor-parallel CUDA engine, interpreted, over gloo: run by test_cuda_ranks.py.

python tests/cuda_rank.py ENGINE_DIR RANK SIZE ADDRESS OUT.npy
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np

from engine.cuda_engine import CudaEngine
from engine.cuda_options import CudaOptions, TensorParallel
from engine.protocol import Row, SampleRequest, StepPlan
from engine.sampling import SamplingParams
from tests.engine_fixtures import cut, random_tokens, window_of

LENGTH, SIZES = 60, (20, 1, 7)
GREEDY = SampleRequest(SamplingParams(temperature=0.0), 0, 0, np.zeros(0, np.int32))


def main(engine_dir: str, rank: str, size: str, address: str, out: str) -> None:
    parallel = TensorParallel(int(rank), int(size), address)
    engine = CudaEngine(
        Path(engine_dir),
        # Ranks have different room: they agree on what all of them have.
        memory_budget_bytes=(3 + int(rank)) * 10**6,
        device="cpu",
        options=CudaOptions(tensor_parallel=parallel),
    )
    tokens, window, shown = random_tokens(7, LENGTH), window_of(engine.spec, 4), []
    for begin, end in cut(LENGTH, SIZES):
        row = Row(0, begin, tokens[begin:end], window, sample=GREEDY, logits="all")
        (result,) = engine.step(StepPlan((row,))).rows
        if rank == "0":
            assert result.logits is not None
            assert result.token_id == int(result.logits[-1].argmax())
            shown.append(result.logits)
        else:
            assert result.logits is None
    np.save(out, np.concatenate(shown) if shown else np.array([engine.max_resident]))
    if shown:
        print(engine.max_resident)
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
