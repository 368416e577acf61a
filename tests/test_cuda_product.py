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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.memory_store import MemoryStore
from deployments.app import replica_options
from deployments.chat_service import ChatService
from deployments.cli import app
from deployments.config import ConfigError, Tunables, load_config
from deployments.conversation_records import FrontConfig
from deployments.engine_files import EngineFiles, locate_engine, start_engine, warm_up
from deployments.local.accelerators import interpreter_checks
from deployments.openai_sampling import RequestLimits
from deployments.turn_runner import ReplicaParts, TurnRunner
from engine.cuda_options import INTERPRETER
from engine.float_reference import FloatDecoder, Passage
from engine.loop import EngineLoop
from engine.open_engine import EngineOptions, open_engine
from engine.protocol import Engine
from engine.verify_figures import TOLERANCES, Tally
from engine_build.manifest import load_engine_spec, load_manifest
from engine_build.spec import TARGET_FORMATS, WeightFormat
from engine_build.stored_weights import stored_weights
from tests.cuda_fixtures import torch
from tests.cuda_product import CAPACITY, MAX_CHUNK, build_calm, doctored, write_calm_model
from tests.engine_fixtures import feed, random_tokens, row_for, window_of
from tests.fake_turns import HASTE
from tests.test_front_to_engine import OneReplica

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


def verify(engine_dir: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["verify", str(engine_dir), "--tokens", "128", *more])


@pytest.fixture
def copy(verified_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(verified_dir, tmp_path / "copy")


def start(engine_dir: Path, **fields: Any) -> tuple[EngineFiles, Engine]:
    """As a replica does. Raises ConfigError."""
    config = load_config({"model": str(engine_dir), "memory_budget_bytes": 1 << 20, **fields})
    files = locate_engine(config)
    return files, start_engine(config, files, threads=1)


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


@dataclass
class Service:
    """The front, a replica and a store in this process, and what a conversation has been told."""

    engine_dir: Path
    replies: list[str] = field(default_factory=list)
    recoveries: list[str] = field(default_factory=list)

    async def converse(self, questions: list[str], dies_before: int | None = None) -> None:
        """One conversation. Another replica takes the place of its first one before that question."""
        store = MemoryStore()
        service, runner = self.begin(store)
        named: dict[str, str] = {}
        for number, question in enumerate(questions):
            if number == dies_before:
                await runner.close()
                service, runner = self.begin(store)
            message = {"role": "user", "content": question}
            body = {"model": "m", "messages": [message], "seed": 5, "temperature": 0.8, **named}
            reply = await service.chat({**body, "ignore_eos": True}, TENANT)
            named = {"conversation": reply["conversation"]["id"]}
            self.replies.append(reply["choices"][0]["message"]["content"])
            self.recoveries.append(reply["usage"]["sinkserve"]["recovery"])
        record = await store.get(TENANT, named["conversation"])
        assert record.token_count > 2 * CAPACITY
        await runner.close()
        await service.close()

    def begin(self, store: MemoryStore) -> tuple[ChatService, TurnRunner]:
        files, engine = start(self.engine_dir)
        warm_up(engine)
        parts = ReplicaParts(
            "replica", files.spec, files.fingerprint, EngineLoop(engine), store, files.codec
        )
        runner = TurnRunner(parts, Tunables())
        limits = RequestLimits(vocab_size=files.spec.model.vocab_size, default_max_tokens=12)
        front = FrontConfig(("m",), files.fingerprint, CAPACITY, limits, max_input_tokens=500)
        service = ChatService(front, store, files.codec, OneReplica(runner), None, HASTE)
        return service, runner


QUESTIONS = ["hi", "and you?", "go on"]


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
