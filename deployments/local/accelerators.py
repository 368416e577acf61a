"""What `sinkserve doctor` says about GPUs and the libraries that engines for them need.

None of it keeps the service from working on CPUs, so nothing here is a failure.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from cluster.gpus import MIB, Gpu, gpus_here
from cluster.preflight import Check, Verdict
from engine.cuda_options import INTERPRETER, interpreted
from engine_build.libraries import LIBRARIES, TARGET_LIBRARIES, installed_version
from engine_build.spec import Target

GIB = 1024 * MIB
MIN_CAPABILITY = (8, 0)
_TARGETS: tuple[Target, ...] = ("cuda", "tensorrt", "tensorrt-rtx")


def accelerators() -> list[Check]:
    """GPUs, then each target and what it lacks, then the launcher of tensor-parallel ranks."""
    found = gpus_here()
    return [
        *gpu_checks(found),
        *interpreter_checks(),
        *target_checks(bool(found), installed_version),
        launcher_check(),
    ]


def gpu_checks(found: Sequence[Gpu]) -> list[Check]:
    """One for each GPU, or one that says there is none."""
    if not found:
        return [Check("gpu", "ok", "none (nvidia-smi finds none): engines for cpu run here")]
    checks = []
    for number, gpu in enumerate(found):
        detail = f"{gpu.name}, compute capability {gpu.capability}, driver {gpu.driver}, "
        detail += f"{gpu.free_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB free"
        old = _capability(gpu.capability) < MIN_CAPABILITY
        advice = "Too old for bfloat16: build with --weights float16" if old else ""
        checks.append(Check(f"gpu {number}", "warn" if old else "ok", detail, advice))
    return checks


def interpreter_checks() -> list[Check]:
    """A warning where CUDA engines would not run on a GPU, whether there is one or not."""
    if not interpreted("cuda"):
        return []
    detail = f"TRITON_INTERPRET=1: engines for cuda run in {INTERPRETER}, on the CPU, very slowly"
    return [Check("interpreter", "warn", detail, "Unset TRITON_INTERPRET to use a GPU")]


def target_checks(gpus: bool, version: Callable[[str], str | None]) -> list[Check]:
    """What engines of each target need; a lack is worth a warning where there is a GPU to use it."""
    checks = []
    for target in _TARGETS:
        versions = {name: version(name) for name in TARGET_LIBRARIES[target]}
        missing = [name for name, found in versions.items() if found is None]
        detail = ", ".join(f"{name} {found or 'not installed'}" for name, found in versions.items())
        advice = "; ".join(LIBRARIES[name].install for name in missing) if gpus else ""
        verdict: Verdict = "warn" if missing and gpus and target == "cuda" else "ok"
        checks.append(Check(f"target {target}", verdict, detail, advice))
    return checks


def launcher_check() -> Check:
    """Ranks of an engine built with --tp are started by mpi4py through MPICH's launcher."""
    version, launcher = installed_version("mpi4py"), shutil.which("mpiexec")
    detail = f"mpi4py {version or 'not installed'}, mpiexec {launcher or 'not on PATH'}"
    advice = (
        ""
        if version and launcher
        else f"For --tp: {LIBRARIES['mpi4py'].install}, with its bin on PATH"
    )
    return Check("ranks", "ok", detail, advice)


def _capability(text: str) -> tuple[int, ...]:
    parts = text.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else MIN_CAPABILITY
