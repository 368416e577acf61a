"""A tensor-parallel replica behind Ray Serve: the death of one rank is the death of a replica."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine_build.build import BuildOptions, build_engine
from tests.ray_fixture import RayService
from tests.tiny_models import write_hf_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]

PATH = "/v1/chat/completions"
MAX_TOKENS = 1500


@pytest.fixture
def service(toy_service: RayService, tmp_path: Path) -> Iterator[RayService]:
    """The shared application with two replicas of two ranks each, until the test is over."""
    model = write_hf_folder(tmp_path / "model")
    options = BuildOptions(capacity=64, max_chunk=16, weight_format="float32", tp_size=2)
    engine = build_engine(model, tmp_path / "tiny", options)
    fields = {
        **toy_service.fields,
        "model": str(engine),
        "memory_budget_bytes": 4 << 20,
        "threads_per_replica": 2,
    }
    for fixed in ("capacity", "max_chunk"):
        del fields[fixed]
    service = RayService(toy_service.port, fields)
    service.deploy()
    try:
        yield service
    finally:
        toy_service.deploy()


def ranks_of(service: RayService, replica: str) -> list[psutil.Process]:
    started = psutil.Process(service.pid(replica)).children(recursive=True)
    return [process for process in started if "engine.ranks" in process.cmdline()]


def owner(service: RayService) -> str | None:
    running = [name for name, one in service.replicas().items() if one["running_turns"]]
    return running[0] if running else None


def body_of(text: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "seed": 5,
        "temperature": 0.7,
    }


def stream(service: RayService, kill_after: int | None = None) -> tuple[str, dict[str, Any], Any]:
    """The second reply of a conversation: its text, its last event, and name and process of the replica
    that lost a rank after so many events."""
    with service.client() as client:
        opened = client.post(PATH, json=body_of("hello", max_tokens=8)).json()
    body = {
        **body_of("count", max_tokens=MAX_TOKENS),
        "conversation": opened["conversation"]["id"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, last, killed, events = "", {}, None, 0
    with service.client() as client, client.stream("POST", PATH, json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            last = json.loads(line.removeprefix("data: "))
            assert "error" not in last, last
            text += last["choices"][0]["delta"].get("content", "") if last["choices"] else ""
            events += 1
            if events == kill_after and (name := owner(service)):
                (rank,) = ranks_of(service, name)
                killed = (name, service.pid(name))
                os.kill(rank.pid, signal.SIGKILL)
    return text, last, killed


def test_a_stream_outlives_a_rank_of_its_replica(service: RayService) -> None:
    names = set(service.replicas())
    assert [len(ranks_of(service, name)) for name in names] == [1, 1]
    due, end, _ = stream(service)
    assert end["usage"]["completion_tokens"] == MAX_TOKENS
    text, last, killed = stream(service, kill_after=20)
    assert killed is not None, "the reply was over before a rank could be killed"
    name, pid = killed
    assert text == due
    assert last["usage"]["completion_tokens"] == MAX_TOKENS
    assert last["usage"]["sinkserve"]["recovery"] != "none"
    service.wait(lambda: name not in service.replicas() and len(service.replicas()) == 2)
    assert not psutil.pid_exists(pid)
    (other,) = names - {name}
    assert other in service.replicas(), (
        "the launcher took a replica with it that was none of its own"
    )
    assert [len(ranks_of(service, one)) for one in service.replicas()] == [1, 1]
