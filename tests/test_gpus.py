"""What nvidia-smi says, read into GPUs, and what `sinkserve doctor` makes of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cluster.gpus import Gpu, gpu_names, gpus_here, parse_gpus
from deployments.config import load_config
from deployments.local.accelerators import accelerators, gpu_checks, target_checks
from deployments.local.service import gpu_problem

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


def test_the_doctor_tells_of_each_gpu_and_warns_of_old_ones() -> None:
    new, old = Gpu("H100", 80 << 30, 79 << 30, "9.0", "570"), Gpu("T4", 16 << 30, 0, "7.5", "570")
    checks = gpu_checks([new, old])
    assert [(check.name, check.verdict) for check in checks] == [("gpu 0", "ok"), ("gpu 1", "warn")]
    assert "79.0 of 80.0 GiB free" in checks[0].detail
    assert "--weights float16" in checks[1].advice
    (none,) = gpu_checks([])
    assert none.verdict == "ok"


def test_the_doctor_says_what_to_install_where_there_is_a_gpu() -> None:
    def version(name: str) -> str | None:
        return "2.13.0" if name == "torch" else None

    cuda, tensorrt, rtx = target_checks(True, version)
    assert (cuda.verdict, cuda.detail) == ("warn", "torch 2.13.0, triton not installed")
    assert "pip install triton" in cuda.advice
    assert tensorrt.verdict == rtx.verdict == "ok"
    assert not any(check.advice for check in target_checks(False, version))
    assert all(check.ok for check in accelerators())


@pytest.mark.parametrize(
    ("fields", "each", "gpus", "problem"),
    [
        ({}, 0.0, 0.0, ""),
        ({"replicas": 2}, 1.0, 2.0, ""),
        ({"replicas": 3}, 1.0, 2.0, "replicas: 3 of 1 GPU each, but Ray finds 2 .*Use 2 at most"),
        ({"replicas": 2}, 4.0, 8.0, ""),
        ({"replicas": 2}, 4.0, 7.0, "Use 1 at most"),
        ({"replicas": 1}, 2.0, 1.0, "Ray finds 1 .*doctor.*--target cpu"),
        ({"replicas": 1}, 1.0, 0.0, "Ray finds 0"),
        ({"replicas": 10}, 0.1, 1.0, ""),
        ({"replicas": 3}, 0.6, 2.0, "Use 2 at most"),
        ({"autoscaling": {"min_replicas": 1, "max_replicas": 9}}, 1.0, 1.0, ""),
        ({"autoscaling": {"min_replicas": 2, "max_replicas": 9}}, 1.0, 1.0, "min_replicas: 2"),
    ],
)
def test_replicas_that_would_wait_for_gpus_for_ever_are_refused(
    fields: dict[str, Any], each: float, gpus: float, problem: str
) -> None:
    said = gpu_problem(load_config(fields), each, gpus)
    assert bool(said) == bool(problem)
    assert re.search(problem, said)
