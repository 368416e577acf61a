"""Two ingresses: the death of one breaks its streams, and the other goes on with them at once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.ray_fixture import APPLICATION, RayService

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

PATH = "/v1/chat/completions"
MAX_TRIES = 12


@pytest.fixture
def service(toy_service: RayService) -> Iterator[RayService]:
    """The shared application with two ingresses, until the test is over."""
    service = RayService(toy_service.port, {**toy_service.fields, "ingress_replicas": 2})
    service.deploy()
    try:
        yield service
    finally:
        toy_service.deploy()


def ingresses() -> dict[str, int]:
    """Process ids of those that live, by actor."""
    from ray._private import state

    prefix = f"SERVE_REPLICA::{APPLICATION}#Ingress#"
    actors = [one for one in state.actors().values() if one["State"] == "ALIVE"]
    return {one["ActorID"]: one["Pid"] for one in actors if one["Name"].startswith(prefix)}


def request(**more: Any) -> dict[str, Any]:
    body = {"model": "toy", "messages": [{"role": "user", "content": "count"}], "seed": 3}
    return {**body, "max_tokens": 2500, "ignore_eos": True, "stream": True, **more}


def take(line: str, seen: list[tuple[str, str]]) -> None:
    """An event's id, then its text."""
    if line.startswith("id: "):
        seen.append((line.removeprefix("id: "), ""))
    elif line.startswith("data: {"):
        chunk = json.loads(line.removeprefix("data: "))
        assert "error" not in chunk, chunk
        choices = chunk["choices"]
        seen[-1] = (seen[-1][0], choices[0]["delta"].get("content", "") if choices else "")


def read(
    client: httpx.Client,
    key: str,
    seen: list[tuple[str, str]],
    came: list[float],
    kill: int = 0,
) -> bool:
    """Whether the stream came to its end; the process `kill` dies in the midst of it. `came` gets the
    time of every line."""
    headers = {"Idempotency-Key": key} | ({"Last-Event-ID": seen[-1][0]} if seen else {})
    try:
        with client.stream("POST", PATH, json=request(), headers=headers) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                came.append(time.monotonic())
                if line == "data: [DONE]":
                    return True
                take(line, seen)
                if kill and len(seen) == 100:
                    os.kill(kill, signal.SIGKILL)
                    kill = 0
    except httpx.TransportError:
        pass
    return False


def test_a_stream_goes_on_through_the_other_ingress(service: RayService) -> None:
    broken = 0
    with service.client() as client:
        whole: list[tuple[str, str]] = []
        assert read(client, "undisturbed", whole, [])
        due = "".join(text for _, text in whole)
        for attempt in range(MAX_TRIES):
            service.wait(lambda: len(ingresses()) == 2)
            victim = next(iter(ingresses().values()))
            seen: list[tuple[str, str]] = []
            if not read(client, f"broken-{attempt}", seen, [], kill=victim):
                broken += 1
                # No pause: the other one is there.
                came: list[float] = []
                known, began_s = len(seen), time.monotonic()
                assert read(client, f"broken-{attempt}", seen, came)
                assert len(seen) > known
                print(f"broken at event {known}; went on after {came[0] - began_s:.2f} s")
            assert "".join(text for _, text in seen) == due
            if broken == 2:
                break
    assert broken
