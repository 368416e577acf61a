"""From a checkpoint to answers, `--target cuda` in Triton's interpreter: build, verify, refuse, serve."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.app import replica_options
from deployments.config import ConfigError, load_config
from deployments.engine_files import locate_engine
from deployments.local.accelerators import interpreter_checks
from engine.cuda_options import INTERPRETER
from engine.float_reference import FloatDecoder, Passage
from engine.open_engine import EngineOptions, open_engine
from engine.protocol import Engine, num_host_slots
from engine.verify_figures import TOLERANCES, Tally
from engine_build.manifest import load_engine_spec, load_manifest
from engine_build.spec import TARGET_FORMATS, WeightFormat
from engine_build.stored_weights import stored_weights
from tests.cuda_fixtures import torch
from tests.engine_fixtures import feed, random_tokens, row_for, window_of
from tests.product import CAPACITY, MAX_CHUNK, build_calm, doctored, write_calm_model
from tests.product_service import QUESTIONS, Service, start, verify

from engine.cuda_engine import CudaEngine  # isort: skip

LENGTH, SINKS = 60, 4
TENANT = "default"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch.cuda.is_available()
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("product")


def opened(engine_dir: Path) -> Engine:
    return open_engine(engine_dir, EngineOptions(memory_budget_bytes=1 << 20))


def off_by(engine: Engine, engine_dir: Path, wrong: bool = False) -> list[str]:
    """What the limits of `sinkserve verify` find in a conversation past two windows, `wrong`: held to the
    weights of the engine with one layer's keys shifted by a head."""
    spec = engine.spec
    weights = stored_weights(engine_dir, spec)

    def load(name: str) -> Any:
        values = weights(name)
        return np.roll(values, spec.model.head_dim, axis=0) if wrong and "0.qkv" in name else values

    tokens, indices = random_tokens(7, LENGTH), np.arange(LENGTH, dtype=np.int64)
    got = feed(engine, tokens, row_for(window_of(spec, SINKS)), (MAX_CHUNK, 1, 7))
    decoder = FloatDecoder(spec.model, load, np.float64)
    wanted = decoder.head()(decoder.hidden(Passage(tokens, indices, SINKS, CAPACITY - SINKS)))
    tally = Tally()
    tally.add(got, wanted)
    figures, limits = tally.figures(), TOLERANCES[spec.weight_format]
    found = {
        "relative_error": figures.relative_error > limits.relative_error,
        "kl_mean": figures.kl_mean > limits.kl_mean,
        "top1": figures.top1 < limits.top1 - 2 / LENGTH,  # two ties among so few tokens
    }
    return [name for name, bad in found.items() if bad]


@pytest.mark.parametrize("weight_format", TARGET_FORMATS["cuda"])
def test_a_built_engine_computes_what_its_weights_say(
    folder: Path, weight_format: WeightFormat
) -> None:
    engine_dir = build_calm(folder, weight_format=weight_format)
    engine = opened(engine_dir)
    assert engine.spec.weight_format == weight_format
    assert engine.max_resident == (1 << 20) // engine.spec.slot_bytes
    assert off_by(engine, engine_dir) == []
    assert "relative_error" in off_by(engine, engine_dir, wrong=True)
    engine.close()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_so_does_one_of_every_family(folder: Path, family: str) -> None:
    """Biases and a tied head; norms of heads; heads of an odd width."""
    engine_dir = build_calm(folder, family=family)
    engine = opened(engine_dir)
    assert off_by(engine, engine_dir) == []
    engine.close()


def test_what_the_service_is_told_reaches_the_engine(folder: Path) -> None:
    engine_dir = build_calm(folder)
    slot_bytes = load_engine_spec(engine_dir, 24).slot_bytes
    options = EngineOptions(5 * slot_bytes, 1, 24, 3, host_memory_bytes=2 * slot_bytes)
    engine = open_engine(engine_dir, options)
    assert (engine.spec.capacity, engine.max_resident, num_host_slots(engine)) == (24, 5, 2)
    assert isinstance(engine, CudaEngine)
    assert engine._options.max_running == 3
    engine.close()


# Verify and refuse.


@pytest.fixture(scope="module")
def verified_dir(folder: Path) -> Iterator[Path]:
    """A float32 engine that `sinkserve verify` has passed."""
    engine_dir = build_calm(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        done = verify(engine_dir)
    assert done.exit_code == 0, done.output
    assert "passed" in done.output
    yield engine_dir
    (engine_dir / "verify.json").unlink()


@pytest.fixture
def copy(verified_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(verified_dir, tmp_path / "copy")


def test_it_serves_only_what_was_verified_and_as_it_was(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        files, engine = start(copy)
    assert files.spec.target == "cuda"
    assert INTERPRETER in caplog.text
    engine.close()
    with pytest.raises(ConfigError, match=r"another capacity.*sinkserve verify .*--capacity 24"):
        start(copy, capacity=24)
    with monkeypatch.context() as patch:
        patch.setattr(
            "engine_build.libraries.installed_version", lambda name: f"{name}-from-tomorrow"
        )
        locate_engine(load_config({"model": str(copy)}))  # the driver may be another machine
        with pytest.raises(ConfigError, match="this machine has torch-from-tomorrow"):
            start(copy)
    report = (copy / "verify.json").read_bytes()
    for changes, problem in (
        ({"libraries": {}}, r"torch \(none\), this machine has"),
        ({"gpus": ["NVIDIA H100"]}, f"NVIDIA H100, this machine has {INTERPRETER}"),
        ({"manifest_sha256": "0"}, "another build"),
    ):
        doctored(copy, **changes)
        with pytest.raises(ConfigError, match=problem):
            start(copy)
        (copy / "verify.json").write_bytes(report)
    start(copy)[1].close()
    (copy / "verify.json").unlink()
    with pytest.raises(ConfigError, match=r"no verify.json.*Run: sinkserve verify"):
        start(copy)


def test_a_build_of_another_format_is_another_engine(copy: Path, folder: Path) -> None:
    """A report of the one does not count for the other, nor do the tokens of its conversations."""
    formats = [build_calm(folder, weight_format=one) for one in TARGET_FORMATS["cuda"]]
    prints = {load_manifest(one).fingerprint(load_engine_spec(one)) for one in formats}
    assert len(prints) == len(formats)
    for file in formats[0].iterdir():
        shutil.copyfile(file, copy / file.name)
    with pytest.raises(ConfigError, match="another build"):
        start(copy)


def test_what_the_interpreter_verified_does_not_count_on_a_gpu(
    verified_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=f"is of {INTERPRETER}, this machine has none"):
        start(verified_dir)


def test_a_weight_that_changed_after_the_build_is_no_engine(copy: Path) -> None:
    with (copy / "weights.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 64)
    with pytest.raises(ConfigError, match=r"weights\.safetensors"):
        start(copy)


def test_the_interpreter_asks_for_no_gpu_and_says_so(
    verified_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config({"model": str(verified_dir)})
    spec = locate_engine(config).spec
    for variable, gpus, warnings in (("1", 0, ["interpreter"]), ("0", 1, [])):
        monkeypatch.setenv("TRITON_INTERPRET", variable)
        assert replica_options(config, spec)["ray_actor_options"]["num_gpus"] == gpus
        assert [check.name for check in interpreter_checks()] == warnings


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", [f for f in TARGET_FORMATS["cuda"] if f != "float32"])
def test_verify_passes_every_format(folder: Path, weight_format: WeightFormat) -> None:
    engine_dir = build_calm(folder, weight_format=weight_format)
    done = verify(engine_dir, "--model", str(folder / "model-llama"), "--layers")
    assert done.exit_code == 0, done.output
    assert "weights rounded" in done.output
    start(engine_dir)[1].close()


# Serve.


def test_a_service_answers_as_the_cpu_engine_does_and_goes_on_after_a_replay(
    verified_dir: Path, folder: Path
) -> None:
    """Same seeds, so the same tokens, from kernels that share nothing; past the window, in three turns."""
    on_cpu = build_calm(folder, "cpu")
    said = []
    for engine_dir, dies_before in ((on_cpu, None), (verified_dir, None), (verified_dir, 2)):
        service = Service(engine_dir)
        asyncio.run(service.converse(QUESTIONS, dies_before))
        said.append(service.replies)
        recovered = "none" if dies_before is None else "exact"
        assert service.recoveries == ["none", "none", recovered]
    assert said[0] == said[1] == said[2]
    assert len(set(said[0])) == len(QUESTIONS)


@pytest.mark.slow
@pytest.mark.ray
def test_the_commands_build_verify_and_serve_it_on_one_machine(tmp_path: Path) -> None:
    """Without TRITON_INTERPRET there is no GPU to serve it on, which is said, not waited for."""
    model, engine = write_calm_model(tmp_path / "model"), str(tmp_path / "engine")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    home = tempfile.mkdtemp(prefix="ss-", dir="/tmp")  # pytest's are too long for a unix socket

    def sinkserve(*arguments: str, interpret: str = "1", text: str = "") -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "deployments.cli", *arguments],
            env=os.environ | {"SINKSERVE_HOME": home, "TRITON_INTERPRET": interpret},
            input=text,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    up = ("up", "--detach", "--model", engine, "--port", port, "--replicas", "1")
    try:
        window = ("--capacity", str(CAPACITY), "--max-chunk", str(MAX_CHUNK))
        target = ("--target", "cuda", "--weights", "float32")
        assert sinkserve("build", str(model), "--out", engine, *target, *window)[0] == 0
        code, said = sinkserve(*up)
        assert code == 1
        assert "no verify.json" in said
        assert sinkserve("verify", engine, "--tokens", "128")[0] == 0
        code, said = sinkserve(*up, interpret="0")
        assert code == 1
        assert "replicas: 1 of 1 GPU each, but Ray finds 0 on this machine" in said
        code, said = sinkserve(*up)
        assert code == 0, said
        code, said = sinkserve("chat", text="one\ntwo\n")
        assert code == 0, said
        assert "turn 2" in said
        assert "interpreter: TRITON_INTERPRET=1" in sinkserve("doctor")[1]
        assert sinkserve("down")[0] == 0
    finally:
        sinkserve("down")
        shutil.rmtree(home, ignore_errors=True)
