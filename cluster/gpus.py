"""The GPUs of this machine, as NVIDIA's own tool tells: no library of ours has to be there for it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

MIB = 1 << 20
_TIMEOUT_S = 20.0
_FIELDS = "name,memory.total,memory.free,compute_cap,driver_version"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `capability` is its compute capability, such as "9.0"."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: str
    driver: str


def gpus_here() -> tuple[Gpu, ...]:
    """In the order of their numbers; none where there is no nvidia-smi or it finds none."""
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(answer.stdout)


def gpu_names(gpus: tuple[Gpu, ...]) -> tuple[str, ...]:
    """Each name once, sorted."""
    return tuple(sorted({gpu.name for gpu in gpus}))


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Lines of `name, MiB, MiB, capability, driver`; others, and figures that are "[N/A]", count as none."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.rsplit(",", maxsplit=4)]
        if len(parts) == 5:
            name, memory, free, capability, driver = parts
            found.append(Gpu(name, _bytes(memory), _bytes(free), capability, driver))
    return tuple(found)


def _bytes(mebibytes: str) -> int:
    return int(mebibytes) * MIB if mebibytes.isdigit() else 0
