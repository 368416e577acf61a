"""A benchmark subject in a process of its own, called by one JSON object per line."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Worker:
    """Starts `command`; stderr goes to `log`. Use as a context manager."""

    def __init__(self, command: list[str], log: Path) -> None:
        with log.open("ab") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
            )
        self._log = log

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one operation and wait for its answer. Raises RuntimeError if the process died."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        died = RuntimeError(f"the worker died during {op}, see {self._log}")
        try:
            process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise died from None
        line = process.stdout.readline()
        if not line:
            raise died
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{op}: {answer['error']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
