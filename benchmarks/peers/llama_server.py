"""llama-server fed a truncated history with `--cache-reuse`: the strong stateless baseline for TTFT."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx


class LlamaServer:
    """One conversation whose client resends what fits: a fixed head and the newest whole turns."""

    def __init__(self, program: Path, gguf: Path, threads: int, capacity: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(program), "-m", str(gguf), "-c", str(capacity), "--parallel", "1"]
        command += ["-t", str(threads), "-tb", str(threads), "--cache-reuse", "16"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self._log = log
        self._capacity = capacity
        self._turns: list[list[int]] = []
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server stopped, see {self._log}")
            try:
                if self._client.get("/health").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"llama-server did not become ready, see {self._log}")

    def turn(self, head: list[int], tokens: list[int], generate: int) -> float:
        """TTFT in seconds of a turn of `tokens`; the reply's tokens join the history."""
        room = self._capacity - generate - len(head) - len(tokens)
        while sum(map(len, self._turns)) > room:
            self._turns.pop(0)
        prompt = head + [token for turn in self._turns for token in turn] + tokens
        body = {"prompt": prompt, "n_predict": generate, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "cache_prompt": True, "return_tokens": True}
        reply: list[int] = []
        first = 0.0
        started = time.perf_counter()
        with self._client.stream("POST", "/completion", json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("tokens") and not reply:
                    first = time.perf_counter() - started
                reply.extend(event.get("tokens", []))
        if not reply:
            raise RuntimeError(f"llama-server answered without tokens, see {self._log}")
        self._turns.append(tokens + reply)
        return first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait()
