"""A replica that Serve takes away in the middle of a reply hands its turn over."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ray_fixture import RayService

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

PATH = "/v1/chat/completions"


@pytest.fixture
def draining_service(toy_service: RayService) -> Iterator[RayService]:
    """The shared application with replicas that wait for two seconds only, until the test is over."""
    service = RayService(toy_service.port, {**toy_service.fields, "drain_s": 2.0})
    service.deploy()
    try:
        yield service
    finally:
        toy_service.deploy()


def stream(service: RayService, texts: dict[int, str], number: int) -> None:
    body: dict[str, Any] = {
        "model": "toy",
        "messages": [{"role": "user", "content": "count"}],
        "stream": True,
        "max_tokens": 3000,
        "ignore_eos": True,
        "seed": 1,
    }
    with service.client() as client, client.stream("POST", PATH, json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
                texts[number] = texts.get(number, "") + delta.get("content", "")


def test_scaling_in_moves_running_turns_and_no_client_notices(
    draining_service: RayService,
) -> None:
    service = draining_service
    texts: dict[int, str] = {}
    threads = [threading.Thread(target=stream, args=(service, texts, n)) for n in range(4)]
    for thread in threads:
        thread.start()

    def all_run() -> bool:
        figures = service.replicas().values()
        return [one["running_turns"] > 0 for one in figures] == [True, True]

    service.wait(all_run)
    service.deploy(1)
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    # The same request four times: the same answer, moved or not.
    assert len(texts) == 4
    assert len(set(texts.values())) == 1
    # End tokens are no text, and do not end this turn.
    assert len(texts[0]) > 2000
    (figures,) = service.replicas().values()
    assert figures["resumed_turns"] >= 1
    assert figures["committed_turns"] == 4
