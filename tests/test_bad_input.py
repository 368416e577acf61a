"""Every bad request gets its documented status and code, over HTTP and on the handle's methods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.conversation import NewConversation
from deployments.errors import TABLE, ServiceError
from tests.bad_requests import (
    CASES,
    CHAT,
    ODD_CASES,
    USER,
    Case,
    Context,
    ask,
    send_handle,
    send_http,
)
from tests.fake_turns import CAPACITY, FINGERPRINT, MODEL, Front, Script, make_front

FOREIGN = "conv_" + "f" * 32


@dataclass(slots=True)
class Rig:
    front: Front
    http: httpx.AsyncClient
    context: Context


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    front = make_front(max_body_bytes=1 << 20)
    foreign = NewConversation(FOREIGN, "someone-else", FINGERPRINT, 4, CAPACITY - 4, 4)
    await front.store.create(foreign)
    reply = await front.service.chat({"model": MODEL, "messages": [USER]})
    context = Context(
        model=MODEL,
        conversation=reply["conversation"]["id"],
        foreign=FOREIGN,
        long_text="a " * 2001,
        huge_text="x" * (1 << 20),
        long_system="a " * CAPACITY,
    )
    transport = httpx.ASGITransport(front.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
        yield Rig(front, http, context)


def test_the_table_is_as_large_as_promised() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.status != 500 for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_http_refuses(rig: Rig, case: Case) -> None:
    before = len(rig.front.engine.calls)
    answer = await send_http(rig.http, case, rig.context)
    assert (answer.status, answer.code) == (case.status, case.code), answer
    assert answer.param == case.param
    assert answer.message.endswith((".", "?")) or "ETag" in answer.message
    assert len(rig.front.engine.calls) == before, "a bad request reached a replica"


@pytest.mark.parametrize("case", [case for case in CASES if case.on_handle], ids=lambda c: c.name)
async def test_handles_refuse_the_same(rig: Rig, case: Case) -> None:
    answer = await send_handle(rig.front.service, case, rig.context)
    assert (answer.status, answer.code, answer.param) == (case.status, case.code, case.param)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({1: "x"}, "invalid_type", None),
        (ask(messages=({"role": "user", "content": "Hi"},)), "invalid_type", "messages"),
        (ask(messages=[{"role": "user", "content": b"Hi"}]), "invalid_type", "messages[0].content"),
        (ask(temperature=1 + 2j), "invalid_type", "temperature"),
        (None, "invalid_type", None),
    ],
)
async def test_handles_refuse_what_json_lacks(
    rig: Rig, body: object, code: str, param: str | None
) -> None:
    case = Case("", code, body, param)
    answer = await send_handle(rig.front.service, case, rig.context)
    assert (answer.code, answer.param) == (code, param)


@pytest.mark.parametrize("name", ODD_CASES)
async def test_odd_but_good(rig: Rig, name: str) -> None:
    case = Case(name, "invalid_json", ODD_CASES[name])
    assert (await send_http(rig.http, case, rig.context)).status == 200
    assert (await send_handle(rig.front.service, case, rig.context)).status == 200


async def test_special_tokens_in_text_stay_text(rig: Rig) -> None:
    await rig.front.service.chat(
        ask(model=MODEL, messages=[{"role": "user", "content": "<|eos|>"}])
    )
    sent = bytes(token for token in rig.front.engine.calls[-1].input_ids.tolist() if token < 256)
    assert b"<|eos|>" in sent


async def test_the_service_is_well_after_all_of_them(rig: Rig) -> None:
    for case in CASES:
        await send_http(rig.http, case, rig.context)
    good = await rig.http.post(CHAT, json={"model": MODEL, "messages": [USER]})
    assert good.status_code == 200
    metrics = (await rig.http.get("/metrics")).text
    assert 'sinkserve_running_turns{ingress="0"} 0.0' in metrics
    assert 'code="internal_error"' not in metrics


async def test_overlapping_turns(rig: Rig) -> None:
    gate = asyncio.Event()
    script = Script(gate=gate)
    rig.front.engine.scripts.append(script)
    body = ask(model=MODEL, conversation=rig.context.conversation)
    first = asyncio.create_task(rig.front.service.chat(body))
    await script.at_gate.wait()
    for _ in range(3):
        answer = await rig.http.post(CHAT, json=body)
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "conversation_busy"
        assert int(answer.headers["retry-after"]) >= 1
        with pytest.raises(ServiceError, match="conversation_busy"):
            await rig.front.service.chat(body)
    gate.set()
    assert (await first)["conversation"]["turn"] == 2
    assert (await rig.http.post(CHAT, json=body)).json()["conversation"]["turn"] == 3


def test_the_documented_codes_are_the_table() -> None:
    rows = {}
    for line in (Path(__file__).parent.parent / "docs" / "errors.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`")] = (cells[1], cells[2].strip("`"), cells[3])
    expected = {
        code: (
            str(kind.status),
            kind.type,
            "no" if kind.retry_after_s is None else f"after {kind.retry_after_s:g} s",
        )
        for code, kind in TABLE.items()
    }
    assert rows == expected
