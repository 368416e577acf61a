"""The CUDA engine behind Ray Serve, in Triton's interpreter: HTTP to kernels, with a kill in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine_contract import maker_of
from tests.product import CAPACITY, build_calm
from tests.ray_fixture import RayService

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]

PATH = "/v1/chat/completions"
INTERPRET = {"TRITON_INTERPRET": "1"}
TURNS = (("hello", 8), ("and then?", 8), ("count", 40))


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def service(
    request: pytest.FixtureRequest, toy_service: RayService, tmp_path: Path
) -> Iterator[RayService]:
    """Two replicas of a verified engine, until the test is over."""
    maker_of("cuda-interpreted")  # skips where it cannot run
    engine = build_calm(tmp_path, tp_size=request.param)
    subprocess.run(
        [sys.executable, "-m", "deployments.cli", "verify", engine, "--tokens", "128"],
        env=os.environ | INTERPRET,
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=600,
    )
    fields = {
        **toy_service.fields,
        "model": str(engine),
        "served_model_name": "tiny",
        "memory_budget_bytes": 1 << 20,
    }
    for fixed in ("capacity", "max_chunk"):
        del fields[fixed]
    service = RayService(toy_service.port, fields, INTERPRET)
    service.deploy()
    try:
        yield service
    finally:
        toy_service.deploy()


@dataclass
class Said:
    """What a conversation was told, and how each turn found its cache."""

    texts: list[str]
    recoveries: list[str]
    tokens: int
    killed: str


def converse(service: RayService, kill_after: int | None = None) -> Said:
    """`TURNS`, streamed. After so many events of the last one the replica that runs it is lost."""
    said, named = Said([], [], 0, ""), dict[str, str]()
    for question, max_tokens in TURNS:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": 5,
            "temperature": 0.7,
            "stream": True,
            "stream_options": {"include_usage": True},
            **named,
        }
        text, last, events = "", dict[str, Any](), 0
        with service.client() as client, client.stream("POST", PATH, json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                last = json.loads(line.removeprefix("data: "))
                assert "error" not in last, last
                text += last["choices"][0]["delta"].get("content", "") if last["choices"] else ""
                events += 1
                if events == kill_after and question == TURNS[-1][0]:
                    said.killed = owner(service)
                    lose(service, said.killed)
        assert last["usage"]["completion_tokens"] == max_tokens
        named = {"conversation": last["conversation"]["id"]}
        said.texts.append(text)
        said.recoveries.append(last["usage"]["sinkserve"]["recovery"])
        said.tokens = last["usage"]["prompt_tokens"] + max_tokens
    return said


def owner(service: RayService) -> str:
    (name,) = (name for name, one in service.replicas().items() if one["running_turns"])
    return name


def lose(service: RayService, replica: str) -> None:
    """SIGKILL: of one of its ranks, or of the replica itself where it has none."""
    ranks = psutil.Process(service.pid(replica)).children(recursive=True)
    ranks = [process for process in ranks if "engine.ranks" in process.cmdline()]
    os.kill(ranks[0].pid if ranks else service.pid(replica), signal.SIGKILL)


def test_a_conversation_outlives_its_replica_past_its_window(service: RayService) -> None:
    names = set(service.replicas())
    due = converse(service)
    assert due.recoveries == ["none"] * len(TURNS)
    assert due.tokens > 2 * CAPACITY
    said = converse(service, kill_after=8)
    assert said.texts == due.texts
    assert said.recoveries[:-1] == ["none"] * (len(TURNS) - 1)
    assert said.recoveries[-1] != "none"
    service.wait(
        lambda: len(service.replicas()) == 2 and said.killed not in service.replicas(), 300.0
    )
    assert names - {said.killed} <= set(service.replicas())
    assert converse(service).texts == due.texts
