"""The card and the software in words and numbers; no name of a host."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "clocks_event_reasons.active": "clock_limits",
}
_PACKAGES = ("torch", "triton", "transformers", "numpy", "mpi4py")


def card_state() -> dict[str, float | str]:
    """Clocks, power and temperature right now, by nvidia-smi; empty where it does not answer."""
    fields = list(_STATE)
    # The last field has another name in drivers before 535, which refuse the whole question.
    values = _nvidia_smi(fields) or _nvidia_smi(fields[:-1])
    return {name: _number(value) for name, value in zip(_STATE.values(), values, strict=False)}


def driver_version() -> str | None:
    found = _nvidia_smi(["driver_version"])
    return found[0] if found else None


def versions() -> dict[str, str]:
    """Versions of what the figures depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_device(device: str) -> dict[str, Any]:
    """Name, memory, L2 and software of `device` ("cuda" or "cpu"). Imports torch."""
    import torch

    described: dict[str, Any] = {"name": "cpu", "memory_bytes": 8 << 30, "l2_bytes": 1 << 20}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        described = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": total,
            "free_bytes": free,
            "l2_bytes": getattr(properties, "L2_cache_size", 50 << 20),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
    return {**described, "versions": versions(), "state": card_state()}


def _nvidia_smi(fields: list[str]) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else []


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
