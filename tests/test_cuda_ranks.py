"""Tensor-parallel CUDA engines, interpreted, over gloo: equal to the oracle, whatever the number of ranks."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine_build.graph import export_graph
from engine_build.spec import EngineSpec, SpecError, WeightFormat
from tests.cuda_fixtures import cuda_spec
from tests.cuda_rank import LENGTH
from tests.engine_fixtures import cached_tensors, random_tokens, tiny_shape
from tests.reference import ReferenceDecoder, Rule

from engine.cuda_engine import CudaEngine  # isort: skip

SCRIPT = Path(__file__).with_name("cuda_rank.py")


def exported(folder: Path, family: str, size: int, weight_format: WeightFormat) -> EngineSpec:
    spec = dataclasses.replace(cuda_spec(family, weight_format=weight_format), tp_size=size)
    export_graph(spec, cached_tensors(family), folder, lambda fraction: None)
    (folder / "spec.json").write_text(spec.to_json())
    return spec


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size", "weight_format"),
    [("qwen2", 2, "float32"), ("llama-bias", 4, "float32"), ("qwen3", 2, "float8")],
)
def test_ranks_equal_the_oracle(
    tmp_path: Path, family: str, size: int, weight_format: WeightFormat
) -> None:
    """Four ranks share two key/value heads; a tied head is cut; biases are added once."""
    exported(tmp_path, family, size, weight_format)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path, str(n), str(size), address, tmp_path / f"{n}.npy"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(size)
    ]
    printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size
    rule = Rule(4, 36)
    wanted = ReferenceDecoder(tiny_shape(family), cached_tensors(family), rule)
    got = np.load(tmp_path / "0.npy")
    error = np.abs(got - wanted.push_all(0, random_tokens(7, LENGTH)))
    assert error.max() < 1e-4 if weight_format == "float32" else error.mean() < 0.5
    agreed = int(printed[0])
    assert all(int(np.load(tmp_path / f"{n}.npy")[0]) == agreed for n in range(1, size))


def test_another_number_of_ranks_than_the_engine_was_cut_for_is_refused(tmp_path: Path) -> None:
    spec = exported(tmp_path, "llama", 2, "float32")
    with pytest.raises(SpecError, match="tp_size: the engine is cut for 2 ranks, 1 run it"):
        CudaEngine(tmp_path, device="cpu", memory_budget_bytes=spec.slot_bytes)
