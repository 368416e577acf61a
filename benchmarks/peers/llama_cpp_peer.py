"""Builds llama.cpp from the llama-cpp-python sdist in an environment of its own, and drives it.

Needs a C++ compiler (`g++`). The build takes some minutes once; it is kept under
`$SINKSERVE_HOME/peers` and reused.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.worker import Worker

VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """`python` imports llama_cpp; `server` is the llama-server program of the same sources."""

    python: Path
    server: Path
    log: Path

    def worker(self) -> Worker:
        """A process that runs llama.cpp in-process (see llama_cpp_worker.py)."""
        return Worker([str(self.python), str(WORKER)], self.log)

    def quantise(self, source: Path) -> Path:
        """The weights of the GGUF file `source` as q8_0, beside the build; made once."""
        out = self.log.parent / f"{source.stem}.q8_0.gguf"
        if not out.exists():
            partial = out.with_suffix(".partial")
            with self.worker() as worker:
                worker.call("quantise", source=str(source), out=str(partial))
            partial.rename(out)
        return out


def ensure_llama_cpp(home: Path) -> LlamaCpp:
    """Build on first use. Raises RuntimeError with the log's path when a step fails."""
    root = home / "peers" / f"llama-cpp-{VERSION}"
    built = LlamaCpp(root / "venv/bin/python", root / "build/bin/llama-server", root / "peer.log")
    stamp = root / "complete"
    if stamp.exists():
        return built
    if shutil.which("g++") is None:
        raise RuntimeError("llama.cpp is built from source: install a C++ compiler (g++) first")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    python = str(built.python)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _run("creating its environment", [sys.executable, "-m", "venv", str(root / "venv")], root)
    _run("installing cmake", [*pip, "cmake==4.4.4", "ninja==1.13.2"], root)
    download = [python, "-m", "pip", "download", "-q", "--no-deps", "-d", str(root)]
    download += ["--no-binary=llama-cpp-python", f"llama-cpp-python=={VERSION}"]
    _run("downloading the sdist", download, root)
    sdist = root / f"llama_cpp_python-{VERSION}.tar.gz"
    if hashlib.sha256(sdist.read_bytes()).hexdigest() != SDIST_SHA256:
        raise RuntimeError(f"{sdist} does not have the pinned checksum; delete it and try again")
    _run("compiling llama-cpp-python (minutes)", [*pip, str(sdist)], root)
    with tarfile.open(sdist) as archive:
        archive.extractall(root, filter="data")
    sources = root / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    cmake = str(root / "venv/bin/cmake")
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF"]
    options += ["LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF"]
    configure = [cmake, "-S", str(sources), "-B", str(root / "build")]
    _run("configuring llama-server", configure + [f"-D{option}" for option in options], root)
    compile_server = [cmake, "--build", str(root / "build"), "-j2", "--target", "llama-server"]
    _run("compiling llama-server (minutes)", compile_server, root)
    stamp.touch()
    return built


def _run(step: str, command: list[str], root: Path) -> None:
    print(f"llama.cpp: {step} ...", file=sys.stderr, flush=True)
    log = root / "peer.log"
    with log.open("ab") as out:
        status = subprocess.run(command, stdout=out, stderr=out, check=False).returncode
    if status:
        raise RuntimeError(f"llama.cpp: {step} failed with status {status}, see {log}")
