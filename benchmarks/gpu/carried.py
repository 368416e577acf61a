"""What `pack_tensorrt` packed, on a machine that has neither network nor TensorRT-RTX.

The archives are unpacked once, into a folder of this machine's temporary files that is named by their
contents; plans that are built there stay in it too, for the next process. Nothing is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.gpu.process import Absent

CARRY = Path(__file__).resolve().parents[2] / ".gpu-carry"
LIBRARY_VARIABLE = "SINKSERVE_TENSORRT_RTX"
"""A folder of unpacked wheels: taken instead of the archives."""

LIBS = "tensorrt-rtx-libs.tar.xz"
GRAPHS = "graphs"
_BLOCK = 1 << 20


class NotCarried(Absent):
    """TensorRT-RTX, or a graph for it, is not on this machine; the message says how to bring it."""


def bindings_archive(python: str) -> str:
    """The archive that fits a Python version such as "3.12": bindings are made for one each."""
    return f"tensorrt-rtx-cp{python.replace('.', '')}.tar.xz"


def this_python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def ensure_library(carry: Path = CARRY) -> str:
    """Make `import tensorrt_rtx` work in this process; returns where it comes from.

    Taken first: what is installed, then the folder of `LIBRARY_VARIABLE`, then the archives. The library
    loads its own shared objects by path, so the module search path is all that is set.
    """
    _preload_compiler()
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        return "installed"
    named = os.environ.get(LIBRARY_VARIABLE)
    folder = Path(named) if named else unpacked(carry)
    if not (folder / "tensorrt_rtx").is_dir() and not (folder / "tensorrt_rtx_bindings").is_dir():
        raise NotCarried(f"{folder} holds no tensorrt_rtx")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return str(folder) if named else "carried"


def unpacked(carry: Path = CARRY, python: str | None = None) -> Path:
    """The folder with the archives' contents, unpacked by the first that asks.

    Raises NotCarried where an archive is missing or damaged.
    """
    python = python or this_python()
    archives = [carry / LIBS, carry / bindings_archive(python)]
    missing = [archive.name for archive in archives if not archive.is_file()]
    if missing:
        raise NotCarried(
            f"TensorRT-RTX is not installed, and {carry.name}/ has no {' and no '.join(missing)}: run "
            f"`python -m benchmarks.gpu.pack_tensorrt --python {python}` on a machine with network, and "
            f"bring {carry.name}/ along"
        )
    digest = hashlib.sha256()
    for archive in archives:
        digest.update(archive.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"sinkserve-tensorrt-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        try:
            for archive in archives:
                _extract(archive, part)
            part.replace(folder)
        except (OSError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
            shutil.rmtree(part, ignore_errors=True)
            if not folder.is_dir():  # else another process was first
                raise NotCarried(
                    f"{carry.name}/ cannot be unpacked ({error}): pack again"
                ) from error
    return folder


def _extract(archive: Path, folder: Path) -> None:
    """All of an archive, read to its end: the sum that xz wrote there is checked."""
    with lzma.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(folder, filter="data")
        while stream.read(_BLOCK):
            pass


def _preload_compiler() -> None:
    """Load CUDA's runtime compiler from torch's packages, where no search path leads: the library looks for
    one by its bare name, and finds what a process has loaded already."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found and found.submodule_search_locations) or ():
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def carried_graph(fingerprint: str, carry: Path = CARRY) -> Path | None:
    """The graph of an `EngineSpec` by its fingerprint, if it was packed for this Python."""
    try:
        path = unpacked(carry) / GRAPHS / f"{fingerprint}.onnx"
    except NotCarried:
        return None
    return path if path.is_file() else None


def plans_folder(carry: Path = CARRY) -> Path:
    """Where plans that were built here are kept for as long as this machine keeps its temporary files."""
    try:
        folder = unpacked(carry) / "plans"
    except NotCarried:
        folder = Path(tempfile.gettempdir()) / f"sinkserve-plans-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
