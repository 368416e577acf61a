"""What nvidia-smi says, read into GPUs."""

from __future__ import annotations

import pytest

from cluster.gpus import Gpu, gpu_names, gpus_here, parse_gpus

SAID = """\
NVIDIA H100 80GB HBM3, 81559, 80994, 9.0, 570.86.15
NVIDIA GB10, [N/A], [N/A], 12.1, 580.95.05
No devices were found
"""


def test_lines_become_gpus() -> None:
    first, second = parse_gpus(SAID)
    assert first == Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 80994 << 20, "9.0", "570.86.15")
    assert (second.name, second.memory_bytes) == ("NVIDIA GB10", 0)
    assert gpu_names((second, first, first)) == ("NVIDIA GB10", "NVIDIA H100 80GB HBM3")


def test_a_machine_without_the_tool_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpus_here() == ()
