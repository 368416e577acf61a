"""What Ray Serve offers by itself: sessions stick to replicas by hash, and live in their memory alone.

Deployed by `benchmarks.failover` beside SinkServe, to be killed in the same way. `ConsistentHashRouter`
reads the session from the header `x-session-id`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from starlette.requests import Request
from starlette.responses import StreamingResponse

from benchmarks.chaos.client import SseReader
from benchmarks.chaos.rig import NotHappened, is_alive, kill

Json = dict[str, Any]

NAME = "stock"
NUM_TOKENS = 100
CUT_AT = 4
PATIENCE_S = 60.0
TOKEN_S = 0.02
SESSION_HEADER = "x-session-id"
DONE = "[DONE]"
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class StockReplica:
    """Streams NUM_TOKENS numbers a turn, after one event with its pid and the turns it knows of."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    async def __call__(self, request: Request) -> StreamingResponse:
        session = request.headers[SESSION_HEADER]
        turn = self._turns[session] = self._turns.get(session, 0) + 1
        return StreamingResponse(_events(turn), media_type="text/event-stream")


async def _events(turn: int) -> AsyncIterator[str]:
    yield _event(json.dumps({"pid": os.getpid(), "turn": turn}))
    for number in range(NUM_TOKENS):
        await asyncio.sleep(TOKEN_S)
        yield _event(json.dumps({"token": number}))
    yield _event(DONE)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def build(num_replicas: int) -> Application:
    """The application, with Serve's defaults but for the router and the CPUs."""
    # Ray types what `serve.deployment` returns as a decorator.
    deployment: Any = serve.deployment(StockReplica)
    router: Json = {"request_router_class": _ROUTER}
    options = deployment.options(
        num_replicas=num_replicas,
        request_router_config=RequestRouterConfig(**router),
        ray_actor_options={"num_cpus": 0.1},
    )
    application: Application = options.bind()
    return application


def _turn(url: str, session: str, kills: bool) -> Json:
    """One streamed turn, its replica killed after CUT_AT tokens if asked to: what the client sees."""
    seen: Json = {"status": 0, "pid": 0, "turn": 0, "tokens": 0, "done": False, "error": ""}
    reader, killed_s = SseReader(), 0.0
    headers = {SESSION_HEADER: session}
    try:
        with httpx.stream("POST", f"{url}/{NAME}", headers=headers, timeout=30.0) as response:
            seen["status"] = response.status_code
            for piece in response.iter_raw():
                for _, data in reader.push(piece):
                    seen |= {"done": True} if data == DONE else _seen(data, seen["tokens"])
                if kills and not killed_s and seen["tokens"] >= CUT_AT:
                    killed_s = time.monotonic()
                    kill(seen["pid"])
    except httpx.HTTPError as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    if killed_s:
        seen["over_after_s"] = round(time.monotonic() - killed_s, 3)
    return seen


def _seen(data: str, tokens: int) -> Json:
    event: Json = json.loads(data)
    return {"tokens": tokens + 1} if "token" in event else event


def cut_turn(url: str, session: str) -> Json:
    """A whole turn, one that is cut, and the next one, sent until it is answered. Raises NotHappened."""
    first = _turn(url, session, kills=False)
    cut = _turn(url, session, kills=True)
    if not first["done"] or cut["turn"] != 2 or is_alive(int(cut["pid"])):
        raise NotHappened(f"the second turn was not cut at its replica: {first}, {cut}")
    statuses, deadline_s = [], time.monotonic() + PATIENCE_S
    while True:
        following = _turn(url, session, kills=False)
        statuses.append(following["status"])
        if following["done"]:
            break
        if time.monotonic() > deadline_s:
            raise NotHappened(f"no answer after the kill: {statuses}")
        time.sleep(0.2)
    return {
        **{name: cut[name] for name in ("status", "tokens", "done", "error", "over_after_s")},
        "tokens_due": NUM_TOKENS,
        "next_statuses": statuses,
        "turns_remembered": following["turn"] - 1,
        "turns_had": 2,
    }
