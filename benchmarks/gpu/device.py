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
    "pstate": "performance_state",
    "temperature.gpu": "temperature_c",
    "clocks_event_reasons.active": "clock_limits",
}
_SETTINGS = {
    "driver_version": "driver",
    "clocks.max.sm": "most_sm_mhz",
    "clocks.max.mem": "most_memory_mhz",
    "ecc.mode.current": "ecc",
    "mig.mode.current": "mig",
    "persistence_mode": "persistence",
    "vbios_version": "vbios",
}
_PACKAGES = ("torch", "triton", "transformers", "numpy", "mpi4py")


def card_state() -> dict[str, float | str]:
    """Clocks, power and temperature right now, by nvidia-smi; empty where it does not answer."""
    fields = list(_STATE)
    # The last field has another name in drivers before 535, which refuse the whole question.
    values = _nvidia_smi(fields) or _nvidia_smi(fields[:-1])
    return {name: _number(value) for name, value in zip(_STATE.values(), values, strict=False)}


def card_settings() -> dict[str, float | str]:
    """Driver, highest clocks and modes, by nvidia-smi, as far as it answers."""
    fields = list(_SETTINGS)
    # One field that a driver does not know spoils the whole question.
    values = _nvidia_smi(fields) or [(_nvidia_smi([one]) or [""])[0] for one in fields]
    named = zip(_SETTINGS.values(), values, strict=False)
    return {n: _number(v) if n.endswith("_mhz") else v for n, v in named if v}


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
            **card_settings(),
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
