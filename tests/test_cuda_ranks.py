"""Tensor-parallel CUDA engines, interpreted, over gloo: equal to the oracle, whatever the number of ranks."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.protocol import Row, StepPlan
from engine_build.graph import export_graph
from engine_build.spec import EngineSpec, SpecError, WeightFormat
from tests.cuda_fixtures import cuda_spec
from tests.cuda_rank import GREEDY, LENGTH, SIZES
from tests.cuda_threads import as_ranks
from tests.engine_fixtures import cached_tensors, cut, random_tokens, tiny_shape, window_of
from tests.product import build_calm
from tests.reference import Floats, ReferenceDecoder, Rule
from tests.test_tensor_parallel import computed
from tests.tp_script import OPTIONS, conversations

from engine.cuda_engine import CudaEngine  # isort: skip
from engine.cuda_options import CudaOptions, TensorParallel  # isort: skip
from engine.open_engine import CPU_BUDGET_BYTES, EngineOptions, open_engine  # isort: skip
from engine.rank_executors import RankOptions  # isort: skip

SCRIPT = Path(__file__).with_name("cuda_rank.py")


def exported(folder: Path, family: str, size: int, weight_format: WeightFormat) -> EngineSpec:
    spec = dataclasses.replace(cuda_spec(family, weight_format=weight_format), tp_size=size)
    export_graph(spec, cached_tensors(family), folder, lambda fraction: None)
    (folder / "spec.json").write_text(spec.to_json())
    return spec


def oracle(family: str) -> Floats:
    reference = ReferenceDecoder(tiny_shape(family), cached_tensors(family), Rule(4, 36))
    return reference.push_all(0, random_tokens(7, LENGTH))


@pytest.mark.parametrize(("family", "size"), [("qwen2", 2), ("llama-bias", 4), ("qwen3", 2)])
def test_ranks_as_threads_equal_the_oracle(
    tmp_path: Path, family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below, without the processes: what is cut and where ranks meet, not how they do."""
    spec = exported(tmp_path, family, size, "float32")

    def work(parallel: TensorParallel) -> Floats | int:
        engine = CudaEngine(
            tmp_path,
            memory_budget_bytes=(3 + parallel.rank) * spec.slot_bytes,
            device="cpu",
            options=CudaOptions(tensor_parallel=parallel),
        )
        tokens, window, shown = random_tokens(7, LENGTH), window_of(spec, 4), []
        for begin, end in cut(LENGTH, SIZES):
            row = Row(0, begin, tokens[begin:end], window, sample=GREEDY, logits="all")
            (result,) = engine.step(StepPlan((row,))).rows
            if result.logits is not None:
                assert result.token_id == int(result.logits[-1].argmax())
                shown.append(result.logits)
        return np.concatenate(shown) if parallel.rank == 0 else engine.max_resident

    got, *agreed = as_ranks(monkeypatch, size, work)
    assert np.abs(got - oracle(family)).max() < 1e-4
    local = spec.slot_bytes * max(1, spec.model.num_kv_heads // size) // spec.model.num_kv_heads
    assert agreed == [3 * spec.slot_bytes // local] * (size - 1)


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
    error = np.abs(np.load(tmp_path / "0.npy") - oracle(family))
    assert error.max() < 1e-4 if weight_format == "float32" else error.mean() < 0.5
    agreed = int(printed[0])
    assert all(int(np.load(tmp_path / f"{n}.npy")[0]) == agreed for n in range(1, size))


def test_another_number_of_ranks_than_the_engine_was_cut_for_is_refused(tmp_path: Path) -> None:
    spec = exported(tmp_path, "llama", 2, "float32")
    with pytest.raises(SpecError, match="tp_size: the engine is cut for 2 ranks, 1 run it"):
        CudaEngine(tmp_path, device="cpu", memory_budget_bytes=spec.slot_bytes)


def test_a_group_is_told_the_capacity_and_what_memory_it_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is free for the asking on a CPU, so the interpreter's ranks share a fixed budget."""
    told: list[RankOptions] = []
    ranks = SimpleNamespace(
        TensorParallelEngine=lambda options, *_: told.append(options), RankTimeouts=dict
    )
    monkeypatch.setitem(sys.modules, "engine.ranks", ranks)
    folder = build_calm(tmp_path, tp_size=2)
    for variable in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", variable)
        open_engine(folder, EngineOptions(capacity=24))
    assert [one.capacity for one in told] == [24, 24]
    assert [one.memory_budget_bytes for one in told] == [CPU_BUDGET_BYTES // 2, None]


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_group_that_was_built_computes_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `build_engine`, `open_engine`, MPI's spawn and gloo, as a replica does it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    alone = build_calm(tmp_path)
    wanted = conversations(open_engine(alone, OPTIONS))
    got = computed(build_calm(tmp_path, tp_size=2), tmp_path)
    assert got.keys() == wanted.keys()
    for name, logits in wanted.items():
        assert np.abs(got[name] - logits).max() < 1e-4, name
    assert (got["sampled"] == wanted["sampled"]).all()


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_verify_passes_a_group_and_refuses_one_with_a_rank_twice(tmp_path: Path) -> None:
    folder = build_calm(tmp_path, tp_size=2)
    command = [sys.executable, "-m", "deployments.cli", "verify", str(folder), "--tokens", "128"]
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPT.parent.parent),
        "TRITON_INTERPRET": "1",
    }

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    first, second = (folder / f"rank{n}" / "weights.safetensors" for n in range(2))
    second.unlink()
    second.write_bytes(first.read_bytes())
    done = run()
    assert done.returncode == 1
    assert "rank1/weights.safetensors" in done.stdout
