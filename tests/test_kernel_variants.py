"""The operators as they are compiled for other processors that this one can stand in for."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine.kernels import compile as compiling
from engine.kernels.compile import KernelError, kernel_library
from engine.kernels.self_check import whole_numbers
from engine_build.quantize import ZERO_POINT, quantise
from tests import kernel_models, test_attention_kernel, test_kernels
from tests.kernel_models import Kernel

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Variant:
    """What `-mcpu` is given, on which machines, and what /proc/cpuinfo must name for it to run."""

    processor: str
    machine: str
    needs: frozenset[str]


def variant(processor: str, machine: str, needs: str, *, slow: bool) -> object:
    marks = [pytest.mark.slow] if slow else []
    value = Variant(processor, machine, frozenset(needs.split()))
    return pytest.param(value, id=processor, marks=marks)


V3 = "avx2 fma f16c bmi2 movbe"
VARIANTS = [
    variant("x86_64_v2", "x86_64", "sse4_2 popcnt", slow=True),  # plain C
    variant("x86_64_v3", "x86_64", V3, slow=False),  # AVX2
    variant("x86_64_v4", "x86_64", f"{V3} avx512f avx512bw avx512dq avx512vl", slow=True),
    variant("x86_64_v3+avxvnni", "x86_64", f"{V3} avx_vnni", slow=True),
    variant("generic", "aarch64", "", slow=True),  # plain C
    variant("generic+dotprod", "aarch64", "asimddp", slow=True),
]


def features() -> frozenset[str]:
    try:
        return frozenset(CPUINFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return frozenset()


def skip_unless_it_runs(wanted: Variant) -> None:
    if platform.machine() != wanted.machine or not wanted.needs <= features():
        pytest.skip(f"this processor does not run {wanted.processor}")


@pytest.fixture
def library(
    request: pytest.FixtureRequest, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A variant's library, kept between runs; every `Kernel` of the test is made from it."""
    skip_unless_it_runs(request.param)
    made = kernel_library(cache_folder, processor=request.param.processor)
    monkeypatch.setattr(kernel_models, "kernel_library", lambda home: made)
    return made


@pytest.mark.parametrize("library", VARIANTS, indirect=True)
def test_every_variant_computes_the_same(library: Path) -> None:
    assert library.is_file()
    check_sums_of_whole_numbers()
    for inputs, outputs, threads in [(96, 40, 2), (576, 96, 1), (50, 7, 1)]:
        test_kernels.test_linear_layers(inputs, outputs, threads)
    test_kernels.test_a_token_alone_and_among_others_is_the_same_to_the_bit()
    test_kernels.test_activations_of_zero_and_of_great_range()
    test_kernels.test_activations_that_are_no_numbers_are_not_hidden()
    test_kernels.test_embeddings_are_rows_of_the_table()
    test_kernels.test_swiglu(3, 600)
    test_kernels.test_add_norm(3, 96)
    for kv_bytes in (2, 4):
        test_attention_kernel.test_norms_partial_rotation_and_odd_heads(kv_bytes)
    test_attention_kernel.test_company_does_not_change_a_bit()


def check_sums_of_whole_numbers() -> None:
    """Sums of bytes times bytes are exact, the largest there are among them, at every token count."""
    rng = np.random.default_rng(1)
    levels, scales = quantise(whole_numbers(rng, 70, 576))
    assert (scales == 1).all()
    levels[0, 3, 5] = 0  # -128, which no build of ours writes
    by_row = levels.astype(np.int64).transpose(0, 2, 1, 3).reshape(96, 576)[:70]
    x = whole_numbers(rng, 25, 576)
    kernel = Kernel("BlockLinear", [x, levels, scales], width_in=576, width_out=70)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 25):
        (got,) = kernel(x[:tokens].copy(), levels, scales)
        assert (got == x[:tokens].astype(np.int64) @ (by_row - ZERO_POINT).T).all()


WRONG = {
    # What VNNI multiplies, but VPMADDUBSW saturates at 16 bits.
    "saturates": [
        (
            "_mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(all, weight))",
            "_mm256_maddubs_epi16(stored, all)",
        ),
        ("DOT_BIAS = 0", "DOT_BIAS = -128"),
    ],
    "sign": [("_mm256_sign_epi8(all, weight)", "all")],
    "outputs": [("weights + 4 * LANES * v", "weights")],
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_variant_is_never_used(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_it_runs(Variant("x86_64_v3", "x86_64", frozenset(V3.split())))
    sources = tmp_path / "wrong"
    shutil.copytree(
        compiling.SOURCES, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    for old, new in WRONG[mistake]:
        changed = 0
        for path in sources.iterdir():
            text = path.read_text(encoding="utf-8")
            changed += text.count(old)
            path.write_text(text.replace(old, new), encoding="utf-8")
        assert changed
    monkeypatch.setattr(compiling, "SOURCES", sources)
    with pytest.raises(KernelError, match="BlockLinear of this library is wrong"):
        kernel_library(tmp_path / "home", processor="x86_64_v3")
    assert not list((tmp_path / "home" / "kernels").glob("*.so"))
