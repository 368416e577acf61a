"""Compiles the operators with the C compiler that `ziglang` (a wheel) brings, once per machine.

The library is kept under SINKSERVE_HOME by a name that stands for sources, flags, compiler, processor and
ONNX Runtime, so whatever changes, the right one is found or made. It is used only after a process of its
own has loaded it and got the right answer from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine_build.files import locked

SOURCES = Path(__file__).resolve().parent
FLAGS = (
    "-std=c11",
    "-O3",
    "-mprefer-vector-width=512",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-sanitize=undefined",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-s",
    "-shared",
    "-fPIC",
)
STEP = "compile the CPU kernels"
_COMPILE_TIMEOUT_S = 300.0
_CHECK_TIMEOUT_S = 60.0
KEPT_LIBRARIES = 8
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FIELDS = ("model name", "flags", "Features", "CPU part")


class KernelError(RuntimeError):
    """The operators could not be compiled or do not work here; the message says what to do."""


def kernel_library(
    home: Path,
    progress: Callable[[str, float], None] = lambda step, fraction: None,
    processor: str = "native",
) -> Path:
    """The compiled library under `home`/kernels, made if it is not there yet (about ten seconds). Then
    the ones that were not asked for for longest go, but for `KEPT_LIBRARIES`.

    `processor` is what the compiler takes for -mcpu; this machine must be able to run it. Processes that
    ask at the same time wait for one of them. Raises KernelError.
    """
    folder = home / "kernels"
    library = folder / f"sinkserve-{_key(processor)}.so"
    if library.is_file():
        # Asked for now: not among those that go. A home that cannot be written to loses none.
        with contextlib.suppress(OSError):
            os.utime(library)
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        if not library.is_file():
            progress(STEP, 0.0)
            with tempfile.TemporaryDirectory(prefix=".compiling-", dir=folder) as scratch:
                fresh = Path(scratch) / library.name
                _compile(fresh, Path(scratch), processor)
                progress(STEP, 0.8)
                _check(fresh)
                fresh.replace(library)
            _prune(folder)
            progress(STEP, 1.0)
    return library


def _prune(folder: Path) -> None:
    """Under the lock. Who has mapped a library keeps it, whether it has a name or not."""
    libraries = sorted(folder.glob("sinkserve-*.so"), key=_asked_for, reverse=True)
    for library in libraries[KEPT_LIBRARIES:]:
        library.unlink(missing_ok=True)
    # Of a compiler that was killed.
    for scratch in folder.glob(".compiling-*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _asked_for(library: Path) -> float:
    return library.stat().st_mtime


def _compile(library: Path, scratch: Path, processor: str) -> None:
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    caches = {
        "ZIG_GLOBAL_CACHE_DIR": str(scratch / "global"),
        "ZIG_LOCAL_CACHE_DIR": str(scratch / "local"),
    }
    compiler = [sys.executable, "-m", "ziglang", "cc", *FLAGS, f"-mcpu={processor}"]
    command = [*compiler, "-o", str(library), *sources, "-lm"]
    _run(command, {**os.environ, **caches}, _COMPILE_TIMEOUT_S, "could not be compiled")


def _check(library: Path) -> None:
    command = [sys.executable, "-m", "engine.kernels.self_check", str(library)]
    paths = [str(SOURCES.parent.parent), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    _run(command, environ, _CHECK_TIMEOUT_S, "do not work with this ONNX Runtime")


def _run(command: list[str], environ: dict[str, str], timeout_s: float, problem: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environ,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(_advice(problem, str(error))) from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise KernelError(_advice(problem, "\n".join([*said[-12:], f"(ended with {how})"])))


def _advice(problem: str, said: str) -> str:
    return (
        f"The CPU kernels {problem}:\n{said}\n"
        "Install the pinned packages again (`scripts/up` does), see that SINKSERVE_HOME can be written "
        "to, and start again."
    )


def _key(processor: str = "native") -> str:
    parts = [*FLAGS, processor, platform.machine(), *_processor()]
    for package in ("ziglang", "onnxruntime"):
        try:
            parts.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError as error:
            raise KernelError(_advice("need a package", f"{package} is not installed")) from error
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> list[str]:
    """What `-mcpu=native` depends on: the first processor's model and features."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    return [line for line in lines if line.split(":")[0].strip() in _CPU_FIELDS]
