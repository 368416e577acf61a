"""What a kernel's machine code does, read from its disassembly. Loops are where backward branches lead to."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_LOADS = ("LDG", "LDGSTS", "UTMALDG")
_MATRIX = ("HMMA", "HGMMA", "QGMMA", "IMMA")


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop: `instructions` of a warp in one turn, `loads` from global memory by their bits of a
    thread, `matrix` products, accesses to `local` memory, operations on `doubles`."""

    instructions: int
    loads: dict[str, int]
    matrix: int
    local: int
    doubles: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A kernel. `before_wait`: accesses to global memory ahead of the wait for the kernel before, and stores
    among them; -1 where there is no wait."""

    registers: int
    stack: int
    loads: dict[str, int]
    matrix: dict[str, int]
    local: int
    before_wait: int
    stores_before_wait: int
    loops: list[Loop] = field(default_factory=list)


def machine_code(cubin: bytes) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = (int(part) for part in found.groups()) if found else (-1, -1)
    return read_listing(listing, registers, stack)


def read_listing(listing: str, registers: int = 0, stack: int = 0) -> Machine:
    """`listing`: of `nvdisasm -c`, one kernel."""
    code: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := _LINE.match(line):
            target = _TARGET.search(found.group(2))
            if found.group(1).startswith("BRA") and target and target.group(1) in labels:
                jumps.append((labels[target.group(1)], len(code)))
            code.append(found.group(1))
    waits = [place for place, name in enumerate(code) if name.startswith("ACQBULK")]
    early = code[: waits[0]] if waits else []
    return Machine(
        registers,
        stack,
        _loads(code),
        dict(Counter(_root(name) for name in code if _root(name) in _MATRIX)),
        _local(code),
        sum(_is_global(name) for name in early) if waits else -1,
        sum(_root(name) in ("STG", "RED", "REDG", "ATOMG") for name in early),
        [_loop(code[begin : end + 1]) for begin, end in _innermost(jumps)],
    )


def _innermost(jumps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Loops that hold no other, without those that a branch to itself makes behind the code's end."""
    real = sorted({jump for jump in jumps if jump[0] < jump[1]})
    return [
        one
        for one in real
        if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in real)
    ]


def _loop(code: Sequence[str]) -> Loop:
    return Loop(
        len(code),
        _loads(code),
        sum(_root(name) in _MATRIX for name in code),
        _local(code),
        sum(_root(name) in ("DADD", "DMUL", "DFMA", "DSETP") for name in code),
    )


def _loads(code: Sequence[str]) -> dict[str, int]:
    return dict(Counter(_bits(name) for name in code if _root(name) in _LOADS))


def _bits(name: str) -> str:
    for bits in ("128", "64"):
        if f".{bits}" in name:
            return bits
    if ".U16" in name or ".S16" in name:
        return "16"
    return "8" if ".U8" in name or ".S8" in name else "32"


def _local(code: Sequence[str]) -> int:
    return sum(_root(name) in ("LDL", "STL") for name in code)


def _is_global(name: str) -> bool:
    return _root(name) in (*_LOADS, "STG", "RED", "REDG", "ATOMG")


def _root(name: str) -> str:
    return name.partition(".")[0]


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
