"""The other operators against NumPy, and the library that holds them."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.kernels import compile as compiling
from engine.kernels.compile import KernelError, kernel_library
from engine_build.quantize import dequantise, quantise
from tests.kernel_models import Array, Kernel, run_kernel

Floats = npt.NDArray[np.float32]
RNG = np.random.default_rng(0)


def draw(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def rounded(x: Floats) -> npt.NDArray[np.float64]:
    """Activations as the operator sees them: 8 bits, a scale for every 32."""
    tokens, width = x.shape
    halves = -(-width // 32)
    grouped = np.pad(x, ((0, 0), (0, halves * 32 - width))).reshape(tokens, halves, 32)
    largest = np.abs(grouped).max(axis=-1, keepdims=True)
    scales = largest / 127
    largest[largest == 0] = 1
    # The operator's own float32 arithmetic: a value halfway between two levels goes the same way.
    levels = np.rint(grouped * (np.float32(127) / largest))
    flat = (levels * scales.astype(np.float64)).reshape(tokens, halves * 32)
    result: npt.NDArray[np.float64] = flat[:, :width]
    return result


@pytest.mark.parametrize(
    ("inputs", "outputs", "threads"),
    [(64, 32, 1), (96, 40, 2), (576, 960, 2), (576, 96, 1), (50, 7, 1), (1536, 33, 1)],
)
def test_linear_layers(inputs: int, outputs: int, threads: int) -> None:
    weights, bias = draw(outputs, inputs), draw(outputs)
    levels, scales = quantise(weights)
    given: list[Array] = [draw(1, inputs), levels, scales]
    options: dict[str, Any] = {"width_in": inputs, "width_out": outputs, "threads": threads}
    plain = Kernel("BlockLinear", given, **options)
    biased = Kernel("BlockLinear", [*given, bias], **options)
    exact = dequantise(levels, scales, outputs, inputs).astype(np.float64).T
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 23):
        x = draw(tokens, inputs)
        wanted = rounded(x) @ exact
        (got,) = plain(x, levels, scales)
        assert got.shape == (tokens, outputs)
        assert np.abs(got - wanted).max(initial=0) < 2e-7 * inputs
        assert np.allclose(biased(x, levels, scales, bias)[0], got + bias, atol=1e-5)


def test_a_token_alone_and_among_others_is_the_same_to_the_bit() -> None:
    x, (levels, scales) = draw(21, 576), quantise(draw(96, 576))
    kernel = Kernel("BlockLinear", [x, levels, scales], width_in=576, width_out=96)
    (together,) = kernel(x, levels, scales)
    for n in range(21):
        assert (kernel(x[n : n + 1].copy(), levels, scales)[0] == together[n]).all()


def test_activations_of_zero_and_of_great_range() -> None:
    x = np.zeros((4, 128), np.float32)
    x[1], x[3] = 1e-30, 1e-38
    x[2, 0], x[2, 32:] = 1e30, 1e-10
    levels, scales = quantise(np.ones((32, 128), np.float32))
    (got,) = run_kernel("BlockLinear", [x, levels, scales], width_in=128, width_out=32)
    assert (got[[0, 3]] == 0).all()
    assert np.allclose(got[1], 128e-30, rtol=0.01, atol=0)
    assert np.allclose(got[2], 1e30, rtol=0.01)
    assert np.isfinite(got).all()


def test_activations_that_are_no_numbers_are_not_hidden() -> None:
    levels, scales = quantise(np.ones((32, 64), np.float32))
    for bad in (np.nan, np.inf):
        x = np.ones((1, 64), np.float32)
        x[0, 3] = bad
        (got,) = run_kernel("BlockLinear", [x, levels, scales], width_in=64, width_out=32)
        assert not np.isfinite(got).any()


def test_embeddings_are_rows_of_the_table() -> None:
    table = draw(71, 100)
    levels, scales = quantise(table)
    ids = np.array([0, 70, 33, 31, 32, 33], np.int64)
    kernel = Kernel("BlockEmbedding", [ids, levels, scales], width_in=100, width_out=71)
    (got,) = kernel(ids, levels, scales)
    assert (got == dequantise(levels, scales, 71, 100)[ids]).all()
    for bad in (-1, 71, 2**40):
        with pytest.raises(Exception, match="no such token id"):
            kernel(np.array([bad], np.int64), levels, scales)


@pytest.mark.parametrize("width", [5, 16, 96, 600, 1536])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_swiglu(tokens: int, width: int) -> None:
    x = draw(tokens, 2 * width) * 20
    gate, up = x[:, :width].astype(np.float64), x[:, width:]
    (got,) = run_kernel("SwiGLU", [x], threads=2)
    with np.errstate(over="ignore"):
        wanted = gate / (1 + np.exp(-gate)) * up
    assert np.allclose(got, wanted, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("width", [5, 16, 96, 576])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_add_norm(tokens: int, width: int) -> None:
    x, delta, weight = draw(tokens, width) * 3, draw(tokens, width), draw(width)
    normed, total = run_kernel("AddNorm", [x, delta, weight], outputs=2, threads=2, epsilon=1e-5)
    assert (total == x + delta).all()
    exact = total.astype(np.float64)
    wanted = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    assert np.allclose(normed, wanted, rtol=2e-6, atol=1e-7)


def test_the_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, float]] = []

    def fake(command: list[str], *rest: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text("library")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    library = kernel_library(tmp_path, lambda step, fraction: said.append((step, fraction)))
    assert library.read_text() == "library"
    assert [fraction for _, fraction in said] == sorted(fraction for _, fraction in said)
    assert said[-1] == (compiling.STEP, 1.0)
    monkeypatch.setattr(subprocess, "run", None)
    assert kernel_library(tmp_path) == library
    assert [path.name for path in library.parent.iterdir() if path.name != ".lock"] == [
        library.name
    ]


def test_old_libraries_go_and_one_in_use_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(command: list[str], *rest: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text("library")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    in_use = kernel_library(tmp_path, processor="in use")
    (tmp_path / "kernels" / ".compiling-killed").mkdir()
    keep = compiling.KEPT_LIBRARIES
    for number in range(keep + 3):
        # Each a minute older than the one that is made now.
        for library in (tmp_path / "kernels").glob("*.so"):
            os.utime(library, (library.stat().st_atime, library.stat().st_mtime - 60))
        assert kernel_library(tmp_path, processor="in use") == in_use
        last = kernel_library(tmp_path, processor=str(number))
        assert {in_use, last} <= set((tmp_path / "kernels").iterdir())
    names = [path.name for path in (tmp_path / "kernels").iterdir() if path.name != ".lock"]
    assert len(names) == keep
    assert all(name.startswith("sinkserve-") for name in names)
    gone = kernel_library(tmp_path, processor="0")
    assert gone.read_text() == "library"


def test_another_source_flag_or_package_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {compiling._key(), compiling._key("x86_64_v3")}
    monkeypatch.setattr(compiling, "FLAGS", ("-O0",))
    keys.add(compiling._key())
    monkeypatch.setattr(compiling, "_CPUINFO", tmp_path / "nothing")
    keys.add(compiling._key())
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0")
    keys.add(compiling._key())
    shutil.copy(compiling.SOURCES / "simd.h", tmp_path)
    monkeypatch.setattr(compiling, "SOURCES", tmp_path)
    keys.add(compiling._key())
    assert len(keys) == 6


def bad_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bad.c").write_text("int f( {")
    monkeypatch.setattr(compiling, "SOURCES", tmp_path)


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def hidden_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library without the entry point that ONNX Runtime looks for."""
    folder = tmp_path / "engine" / "kernels"
    folder.mkdir(parents=True)
    (folder / "empty.c").write_text("int nothing;")
    for name in (
        "engine/kernels/self_check.py",
        "engine/kernels/__init__.py",
        "engine/__init__.py",
    ):
        shutil.copy(compiling.SOURCES.parent.parent / name, tmp_path / name)
    shutil.copytree(compiling.SOURCES.parent.parent / "engine_build", tmp_path / "engine_build")
    monkeypatch.setattr(compiling, "SOURCES", folder)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (bad_source, "could not be compiled"),
        (no_compiler, "could not be compiled"),
        (hidden_entry, "do not work with this ONNX Runtime"),
    ],
)
def test_a_library_that_does_not_work_is_never_kept(
    damage: Callable[[pytest.MonkeyPatch, Path], None],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(monkeypatch, tmp_path)
    with pytest.raises(KernelError, match=problem) as refused:
        kernel_library(tmp_path / "home")
    assert "start again" in str(refused.value)
    assert not list((tmp_path / "home" / "kernels").glob("*.so"))
