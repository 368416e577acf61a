"""Pack TensorRT-RTX, and the graphs that are built with it, for a GPU machine without network.

    python -m benchmarks.gpu.pack_tensorrt --python 3.12     # the GPU machine's Python; minutes

Downloads the wheels of the release in requirements/accelerators.txt (x86-64; nothing is installed), takes
what building and running plans needs, and writes two xz archives into .gpu-carry/, which git ignores:

    tensorrt-rtx-libs.tar.xz     the library and its ONNX parser, the same for every Python
    tensorrt-rtx-cp312.tar.xz    the bindings of one Python, and graphs of the models that are measured

Bring that folder along in the tree; `benchmarks.gpu.carried` unpacks it there. An archive of the libraries
that is there already is kept (--again packs it anew). The exit status is 1 if all is larger than --most-mib.
Where the tree counts towards that limit as well, the measurement needs only these parts of it:

    git sparse-checkout set engine engine_build benchmarks      # and back: git sparse-checkout disable
"""

from __future__ import annotations

import argparse
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.carried import CARRY, GRAPHS, LIBS, bindings_archive
from benchmarks.gpu.shapes import FULL, MODELS, Grid, cut_shape, spec_for
from benchmarks.gpu.tasks import tasks_for
from engine_build.spec import EngineSpec

_ROOT = Path(__file__).resolve().parents[2]
_PIN = "tensorrt-rtx=="
_PLATFORM = "manylinux_2_28_x86_64"
_LIBRARIES, _BINDINGS = "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"
_MIB = 1 << 20
_BLOCK = 4 * _MIB
_FILTERS = [
    # Calls and jumps of x86 as absolute addresses first: machine code then packs better.
    {"id": lzma.FILTER_X86},
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": 256 * _MIB,
        "lc": 4,
        "pb": 0,
    },
]
_MODULE = """\
from tensorrt_rtx_bindings import *
from tensorrt_rtx_bindings import __version__
"""


class CannotPack(Exception):
    """A wheel could not be had or is not as expected; the message says which."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive."""

    name: str
    data: bytes


def pinned_version(requirements: Path = _ROOT / "requirements" / "accelerators.txt") -> str:
    """The release of TensorRT-RTX that this tree is tested with."""
    for line in requirements.read_text().splitlines():
        if line.startswith(_PIN):
            return line.removeprefix(_PIN).strip()
    raise CannotPack(f"{requirements} pins no tensorrt-rtx")


def download(distribution: str, version: str, python: str, folder: Path) -> Path:
    """The wheel of a distribution for x86-64 Linux and a Python version. Nothing of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--platform", _PLATFORM]
    command += ["--python-version", python, "--dest", str(folder), f"{distribution}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob(f"{distribution.replace('-', '_')}-*.whl"))
    if done.returncode or len(found) != 1:
        raise CannotPack(f"{distribution} {version} for Python {python}: {done.stderr.strip()}")
    return found[0]


def wheel_members(wheel: Path, package: str) -> Iterator[Member]:
    """The files of one package of a wheel, and its licence."""
    with zipfile.ZipFile(wheel) as zipped:
        for name in sorted(zipped.namelist()):
            if name.startswith(f"{package}/") or name.endswith("LICENSE.txt"):
                yield Member(name, zipped.read(name))


def graph_members(grid: Grid = FULL) -> Iterator[Member]:
    """The graph of each plan that the benchmark builds, so that the GPU machine needs no ONNX."""
    from engine_build.graph import graph_of_inputs

    for spec in plan_specs(grid):
        graph = graph_of_inputs(spec).SerializeToString(deterministic=True)
        yield Member(f"{GRAPHS}/{spec.fingerprint}.onnx", graph)


def plan_specs(grid: Grid) -> list[EngineSpec]:
    """The specs of all plans that tasks of this grid need, each once."""
    found: dict[str, EngineSpec] = {}
    for task in tasks_for(grid):
        if task.engine != "tensorrt" or task.model not in MODELS:
            continue
        shape, chunk = MODELS[task.model], grid.max_chunk
        if task.section == "correctness":
            shape, chunk = cut_shape(shape), task.parameters["chunk"]
        given = task.parameters
        spec = spec_for(shape, given["capacity"], chunk, given["format"], "tensorrt-rtx")
        found[spec.fingerprint] = spec
    return list(found.values())


def pack(members: Iterable[Member], archive: Path) -> int:
    """Write an archive whole or not at all; its size in bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_suffix(".part")
    with (
        lzma.open(part, "wb", format=lzma.FORMAT_XZ, filters=_FILTERS) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size, info.mode = len(member.data), 0o644
            tar.addfile(info, _Shown(member))
    part.replace(archive)
    return archive.stat().st_size


class _Shown(io.BytesIO):
    """A member's bytes; shows on stderr how far they were read."""

    def __init__(self, member: Member) -> None:
        super().__init__(member.data)
        self._name, self._size, self._shown = member.name, len(member.data), -1

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        percent = 100 * self.tell() // max(1, self._size)
        if self._size > _BLOCK and percent != self._shown:
            self._shown = percent
            print(f"\r  {self._name} {percent:3} %", end="", file=sys.stderr, flush=True)
            if percent == 100:
                print(file=sys.stderr)
        return data


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        version = pinned_version()
        sizes = _pack_all(version, options.python, options.out, options.again)
    except CannotPack as error:
        print(f"cannot pack: {error}", file=sys.stderr)
        return 1
    for path, size in sizes.items():
        print(f"{size / _MIB:6.1f} MiB  {path}")
    total = sum(sizes.values()) / _MIB
    left = options.most_mib - total
    verdict = f"{left:.1f} MiB are left" if left > 0 else "TOO MUCH"
    print(f"{total:6.1f} MiB  in all, of {options.most_mib:g} MiB: {verdict}")
    print(f"{_tree_bytes() / _MIB:6.1f} MiB  is what the measurement needs of the tree")
    return 0 if left > 0 else 1


def _tree_bytes() -> int:
    """Bytes of the files under the folders that the measurement imports from."""
    folders = [_ROOT / name for name in ("engine", "engine_build", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if "__pycache__" not in path.parts)


def _pack_all(version: str, python: str, out: Path, again: bool) -> dict[Path, int]:
    sizes: dict[Path, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        libs = out / LIBS
        if again or not libs.is_file():
            print(f"download {_LIBRARIES} {version}", file=sys.stderr)
            wheel = download(_LIBRARIES, version, python, Path(folder))
            pack(wheel_members(wheel, "tensorrt_rtx_libs"), libs)
        sizes[libs] = libs.stat().st_size
        print(f"download {_BINDINGS} {version} for Python {python}", file=sys.stderr)
        wheel = download(_BINDINGS, version, python, Path(folder))
        members = [*wheel_members(wheel, "tensorrt_rtx_bindings")]
        members.append(Member("tensorrt_rtx/__init__.py", _MODULE.encode()))
        print("write the graphs", file=sys.stderr)
        members += graph_members()
        bindings = out / bindings_archive(python)
        sizes[bindings] = pack(members, bindings)
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.pack_tensorrt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python (default 3.12)")
    parser.add_argument("--out", type=Path, default=CARRY, help="default: .gpu-carry/")
    parser.add_argument("--again", action="store_true", help="pack the libraries anew")
    parser.add_argument("--most-mib", type=float, default=64.0, help="the largest sum (default 64)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
