"""The libraries that targets are built and run with: which are here, and how to install one that is not.

Only asks what is installed: nothing here imports any of them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from engine_build.spec import SpecError, Target


@dataclass(frozen=True, slots=True)
class Library:
    """`distributions` are the names that package indexes and system packages give it, first found wins.
    `install` completes the sentence "Install it: "."""

    distributions: tuple[str, ...]
    install: str


LIBRARIES: Mapping[str, Library] = {
    "onnxruntime": Library(("onnxruntime",), "pip install onnxruntime"),
    "torch": Library(("torch",), "pip install torch, built for this machine's CUDA"),
    "triton": Library(("triton",), "pip install triton (torch for CUDA on Linux brings it)"),
    "tensorrt": Library(
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "pip install tensorrt, 10.16 or newer (its wheels come from NVIDIA's own index)",
    ),
    "tensorrt_rtx": Library(("tensorrt-rtx",), "pip install tensorrt-rtx"),
    "mpi4py": Library(("mpi4py",), "pip install mpi4py mpich"),
}
"""By the name of the module that is imported."""

TARGET_LIBRARIES: Mapping[Target, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "cuda": ("torch", "triton"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
}
"""What an engine of a target computes with: another version may give other numbers."""


def installed_version(module: str) -> str | None:
    """The version of a library of `LIBRARIES`, None if it is not installed."""
    for distribution in LIBRARIES[module].distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def target_versions(target: Target) -> dict[str, str]:
    """Versions of what an engine of this target computes with; "" for what is not installed."""
    return {name: installed_version(name) or "" for name in TARGET_LIBRARIES[target]}


def missing_library(target: str, error: ModuleNotFoundError) -> SpecError | None:
    """What to tell the user about a failed import; None when it is not one of these libraries."""
    name = (error.name or "").partition(".")[0]
    if name not in LIBRARIES:
        return None
    return SpecError(
        "target",
        f"{target} needs {name}, which is not installed here",
        f"Install it: {LIBRARIES[name].install}",
    )
