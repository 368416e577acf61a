"""A process of its own for what may break CUDA, hang or run out of memory; the parent never touches the card.

One JSON object a line each way. The child answers on a copy of its stdout; what libraries print goes to
the log. A call that outlasts its deadline ends the child and everything it started; what its threads were
doing is in the log, and the end of the log in the error, also when the child died by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LAST_WORDS = 1500
"""Characters of the log that an error quotes."""

_STACKS_S = 1.0
"""How long a child may take to write down its stacks before it is killed."""

Answer = dict[str, Any]
Handler = Callable[..., Answer]


class WorkerFailed(Exception):
    """The child could not do it. `alive` says whether it can be asked for something else, `absent` that it
    lacks what the work needs: nothing is wrong, but nothing was measured either."""

    def __init__(self, message: str, alive: bool, absent: bool = False) -> None:
        super().__init__(message)
        self.alive = alive
        self.absent = absent


class WorkerProcess:
    """`python -m MODULE ARGUMENTS`, called from here. Use as a context manager."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as err:
            self._log_begin = err.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                start_new_session=True,
            )
        self._unread = b""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, op: str, timeout_s: float, **arguments: Any) -> Answer:
        """Raises WorkerFailed for an error in the child, its death, or no answer in `timeout_s`."""
        process = self._process
        if process.stdin is None or not self.alive:
            raise WorkerFailed(f"the process is gone: {self._last_words()}", alive=False)
        try:
            process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"the process is gone: {self._last_words()}", alive=False) from None
        line = self._read_line(time.monotonic() + timeout_s)
        if line is None:
            self._ask_for_stacks()
            self.kill()
            problem = f"{op}: no answer within {timeout_s:.0f} s: {self._last_words()}"
            raise WorkerFailed(problem, alive=False)
        if not line:
            code = process.wait()
            self.kill()
            problem = f"{op}: the process ended with code {code}: {self._last_words()}"
            raise WorkerFailed(problem, alive=False)
        answer: Answer = json.loads(line)
        if "error" in answer:
            fatal = bool(answer.get("fatal"))
            if fatal:
                self.kill()
            absent = bool(answer.get("absent"))
            raise WorkerFailed(f"{op}: {answer['error']}", alive=not fatal, absent=absent)
        return answer

    def _ask_for_stacks(self) -> None:
        """Have the child write where each of its threads is; see `serve`."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STACKS_S)

    def _last_words(self) -> str:
        """The end of what this child wrote to the log."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_begin, size - LAST_WORDS))
            said = log.read().decode(errors="replace").strip()
        return f"{self.log.name} ends with: {said}" if said else f"{self.log.name} is empty"

    def _read_line(self, deadline: float) -> bytes | None:
        """A line, b"" at the end of the stream, None when the deadline has passed."""
        stream = self._process.stdout
        if stream is None:
            return b""
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                return None
            part = os.read(stream.fileno(), 1 << 16)
            if not part:
                return b""
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def kill(self) -> None:
        """End the child and its children; idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


class Absent(Exception):
    """Raised by a handler where this machine lacks what it needs; says what, and how to get it."""


def serve(handlers: dict[str, Handler], is_fatal: Callable[[Exception], bool]) -> None:
    """The child's loop: each line names one of `handlers`, until stdin ends.

    `is_fatal` says whether an error leaves the process unusable (CUDA's sticky errors do).
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            answer = handlers[request.pop("op")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {
                "error": describe(error),
                "fatal": is_fatal(error),
                "absent": isinstance(error, Absent),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _die_with_parent() -> None:
    """Whatever ends the parent, SIGKILL too, ends this process: it would go on holding the card."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1
_LONGEST = 8000
_BROKEN = (
    "CUDA error",
    "Triton Error",
    "device-side assert",
    "illegal memory",
    "CUBLAS_STATUS",
    # Usable, but what it still holds would be missing to the next section.
    "out of memory",
)


def breaks_cuda(error: Exception) -> bool:
    """Whether a process is better started anew after this error, as after all but a refused argument."""
    return any(sign in str(error) for sign in _BROKEN)


def describe(error: BaseException) -> str:
    """An error in one line: all of what it says, within reason."""
    text = f"{type(error).__name__}: {error}".strip()
    return " ".join(text.split())[:_LONGEST]
