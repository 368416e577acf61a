"""Linear layers and the kernels over rows, interpreted, against NumPy; what compiles for a GPU, compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.cuda_step import Layout, pack_decode, pack_mixed
from engine.protocol import Row, StepPlan
from engine.window import SinkWindow
from engine_build.lowering_cuda import quantise_float8
from engine_build.spec import SpecError
from tests.cuda_fixtures import make_cuda_engine, torch
from tests.engine_fixtures import random_tokens

from engine.cuda_kernels.linear import Blocks, Norm, Weights  # isort: skip
from engine.cuda_kernels.rows import rms_norm, swiglu, to_float8  # isort: skip
from engine.cuda_linear import LIBRARY, Choice, LinearLayers, default_choice, key_of  # isort: skip
from tests.sass import read_listing  # isort: skip

Floats = npt.NDArray[np.floating[Any]]
EPSILON = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
LAYERS = LinearLayers({}, num_processors=1, overlap=False)
VECTOR, TILE = Choice("vector", Blocks(32, 32)), Choice("tile", Blocks(32, 64))


def drawn(*size: int) -> Any:
    return torch.from_numpy(np.random.default_rng(sum(size)).standard_normal(size))


def silu(x: Floats) -> Floats:
    result: Floats = x / (1 + np.exp(-x))
    return result


def normed(x: Floats, weight: Floats) -> Floats:
    result: Floats = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON) * weight
    return result


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("choice", "tokens"), [(VECTOR, 1), (TILE, 1), (TILE, 13), (TILE, 20), (LIBRARY, 5)]
)
def test_linear_layers(choice: Choice, tokens: int, gated: bool, float8: bool, dtype: Any) -> None:
    """Norm, product, bias, gate and sum, sizes that no block divides."""
    outputs, inputs = 40, 72
    matrix = drawn(2 * outputs if gated else outputs, inputs) / inputs**0.5
    stored, scale = matrix.to(dtype), None
    exact = stored.double().numpy()
    if float8:
        levels, scales = quantise_float8(matrix.float().numpy())
        stored = torch.from_numpy(levels.view(np.uint8)).view(torch.float8_e4m3fn)
        scale = torch.from_numpy(scales)
        exact = levels.astype(np.float64) * scales[:, None]
    bias, norm = drawn(len(matrix)).to(dtype), 1 + 0.2 * drawn(inputs).float()
    x, before = drawn(tokens, inputs).to(dtype), drawn(tokens, outputs).to(dtype)
    out = before.clone()
    weights = Weights(stored, scale, bias, gated)
    LAYERS.run_as(choice, x, weights, out, Norm(norm, EPSILON), accumulate=not gated)
    wanted = normed(x.double().numpy(), norm.double().numpy()) @ exact.T + bias.double().numpy()
    gate, up = wanted[:, :outputs], wanted[:, outputs:]
    wanted = silu(gate) * up if gated else wanted + before.double().numpy()
    assert np.abs(out.double().numpy() - wanted).max() < TOLERANCE[dtype] * np.abs(wanted).max()


def test_a_wrong_norm_is_told_from_the_right_one() -> None:
    x, matrix, norm = drawn(1, 64), drawn(32, 64) / 8, 1 + 0.2 * drawn(64)
    out = torch.empty(1, 32)
    LAYERS.run_as(VECTOR, x.float(), Weights(matrix.float()), out, Norm(norm.float(), EPSILON))
    right = normed(x.numpy(), norm.numpy()) @ matrix.numpy().T
    wrong = normed(x.numpy(), np.ones(64)) @ matrix.numpy().T
    assert np.abs(out.numpy() - right).max() < 1e-5 < 1e-2 < np.abs(out.numpy() - wrong).max()


def test_rows_normed_gated_and_rounded_to_float8() -> None:
    x, delta, weight = drawn(5, 48).float(), drawn(5, 48).float() / 3, drawn(48).float()
    total, out = x.clone(), torch.empty(5, 48)
    rms_norm(total, weight, EPSILON, out, delta)
    wanted = (x + delta).double().numpy()
    assert np.abs(total.numpy() - wanted).max() < 1e-6
    assert np.abs(out.numpy() - normed(wanted, weight.numpy())).max() < 1e-5
    both = drawn(5, 96).float()
    swiglu(both, out)
    gate, up = np.split(both.double().numpy(), 2, axis=1)
    assert np.abs(out.numpy() - silu(gate) * up).max() < 1e-5
    # Numbers that float8 holds: the interpreter loses the carry when it rounds up to a power of two.
    exact = (100 * drawn(5, 48)).to(torch.float8_e4m3fn)
    exact[:, 7] = -448
    factors = torch.tensor([[1e-3], [0.3], [1.0], [7.0], [1e4]])
    levels, scales = torch.empty(5, 48, dtype=torch.float8_e4m3fn), torch.empty(5, 1)
    to_float8(exact.float() * factors, levels, scales)
    assert (levels.float() == exact.float()).all()
    assert np.abs(scales.numpy() / factors.numpy() - 1).max() < 1e-6


def test_choices_are_text_and_bad_text_is_refused() -> None:
    for text in ("library", "vector:4x1024w4s3", "tile:64x128w8s3"):
        assert str(Choice.parse(text)) == text
    for text in ("", "cublas", "tile:64w8", "vector:2x1024w4", "vector:axb"):
        with pytest.raises(SpecError, match="choices"):
            Choice.parse(text)


def test_a_measured_choice_goes_before_the_default() -> None:
    weights = Weights(drawn(32, 64).float(), gated=True)
    key = key_of(weights, 5)
    assert key == "32x64-float32-gated@8"
    chosen = LinearLayers({key: "tile:16x32w4s1"}, 1, overlap=False)
    x, out, wanted = drawn(5, 64).float(), torch.empty(5, 16), torch.empty(5, 16)
    chosen.run(x, weights, out)
    chosen.run_as(LIBRARY, x, weights, wanted)
    assert np.allclose(out.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_memory_that_was_never_written_does_not_reach_the_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a whole engine, kv_slots and activations: chunks, a decode step padded to its bucket."""
    told: list[Floats] = []
    for fill in (0.0, float("nan")):
        with monkeypatch.context() as patch:
            for owner, name in (
                (torch, "empty"),
                (torch, "empty_like"),
                (torch.Tensor, "new_empty"),
            ):
                patch.setattr(owner, name, filling(getattr(owner, name), fill))
            engine = make_cuda_engine()
            engine.slots.fill_(fill)
            window, results = SinkWindow(4, 36, 55), list[Any]()
            for start, count in ((0, 5), (5, 1), (6, 17), (23, 1)):
                rows = tuple(
                    Row(slot, start, random_tokens(slot + start, count), window, logits="all")
                    for slot in range(3)
                )
                results += [one.logits for one in engine.step(StepPlan(rows)).rows]
        told.append(np.concatenate(results))
    assert np.isfinite(told[0]).all()
    assert np.array_equal(told[0], told[1])


def filling(make: Any, fill: float) -> Any:
    """Memory as a GPU gives it out: it may hold anything."""

    def filled(*args: Any, **options: Any) -> Any:
        made = make(*args, **options)
        return made.fill_(fill) if made.is_floating_point() else made

    return filled


@pytest.mark.parametrize("tokens", [1, 2, 16, 32, 64, 300])
def test_defaults_on_a_gpu_fill_its_processors(tokens: int) -> None:
    for outputs, inputs in ((6144, 4096), (4096, 14336), (1152, 896), (128256, 4096)):
        weights = Weights(torch.empty(outputs, inputs, dtype=torch.bfloat16, device="meta"))
        choice = default_choice(weights, tokens, 132)
        assert choice.kind == ("vector" if tokens == 1 else "tile" if tokens <= 32 else "library")
        if choice.blocks:
            programs = outputs // choice.blocks.outputs
            assert programs >= 132 or choice.blocks.outputs == 16


def test_a_decode_step_is_padded_to_its_bucket() -> None:
    window = SinkWindow(4, 36, 55)
    rows = [Row(slot, 100 + slot, random_tokens(slot, 1), window, 7) for slot in (5, 2, 9)]
    packed = pack_decode(rows, 4)
    assert packed.layout == Layout(4, 4, 4, 4)
    assert packed.logits_of == ((0, 1), (1, 2), (2, 3))
    ids, token_rows, table, tiles, logits = (packed.words[b:e] for b, e in packed.layout.spans)
    assert ids.tolist() == [int(row.tokens[0]) for row in rows] + [0]
    assert token_rows.tolist() == logits.tolist() == [0, 1, 2, 3]
    assert tiles.reshape(-1, 2).tolist() == [[n, 0] for n in range(4)]
    assert table.reshape(-1, 8).tolist() == [
        [5, 1, 105, 4, 36, 55, 7, 0],
        [2, 1, 102, 4, 36, 55, 7, 1],
        [9, 1, 109, 4, 36, 55, 7, 2],
        [0, 0, 0, 0, 0, 0, 0, 3],
    ]


def test_a_step_without_rows_is_all_padding() -> None:
    """What graphs are captured with."""
    packed = pack_decode((), 4)
    begin, end = packed.layout.spans[2]
    assert packed.words[begin:end].reshape(-1, 8).tolist() == [[0] * 7 + [n] for n in range(4)]


def test_a_mixed_step_is_cut_into_tiles() -> None:
    window = SinkWindow(4, 36, 55)
    rows = [
        Row(0, 10, random_tokens(0, 7), window, logits="all"),
        Row(1, 20, random_tokens(1, 1), window),
        Row(2, 30, random_tokens(2, 3), window, logits="last"),
    ]
    packed = pack_mixed(rows, queries=4)
    spans = packed.layout.spans
    assert all(begin % 2 == 0 for begin, _ in spans)
    ids, token_rows, table, tiles, logits = (packed.words[b:e] for b, e in spans)
    assert ids.tolist() == np.concatenate([row.tokens for row in rows]).tolist()
    assert token_rows.tolist() == [0] * 7 + [1] + [2] * 3
    assert table.reshape(-1, 8)[:, 7].tolist() == [0, 7, 8]
    assert tiles.reshape(-1, 2).tolist() == [[0, 0], [0, 4], [1, 0], [2, 0]]
    assert logits.tolist() == [0, 1, 2, 3, 4, 5, 6, 10]
    assert packed.logits_of == ((0, 7), (7, 7), (7, 8))


KERNELS = {
    "linear": {"_vector_linear", "_tile_linear", "_rms_norm"},
    "packed": {"_vector_packed", "_tile_packed", "_unpack", "_rms_norm"},
    "attention": {"_sink_attention", "_rotate_and_cache", "_rotation_angles"},
    "rows": {"_rms_norm", "_swiglu", "_to_float8"},
    "sampling": {
        *("scan", "adjust", "plan", "collect"),
        *("draw", "draw_all", "report"),
    },
}
READ_BEFORE_WAIT = {"_sink_attention": 10, "_vector_packed": 8}
"""Accesses to memory ahead of the wait for the kernel before: the tables of the step, the first 4-bit
weights, none of which a kernel writes. Linear layers ask for their weights there, by a prefetch."""

FEW_SPILLED = {"_vector_packed": 40, "_tile_packed": 32}
"""Bytes."""


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code of a kernel (a line of tests/compile_cuda_kernels.py)."""
    name, code = found["kernel"], found["code"]
    plain = "float32" not in found["case"]
    told = []
    if found["shared"] > 227 * 1024:
        told.append(f"{found['shared']} bytes of shared memory")
    # Sine and cosine keep a few words for angles too large to be ours; where parts of a split are put
    # together, a few are spilled, once. float32 is for exactness alone: no tensor cores, and it spills.
    # Kernels of 4-bit weights spill a few words in a loop of hundreds of instructions.
    allowed = {"_rotation_angles": 32, "_sink_attention": 224, **FEW_SPILLED}.get(name, 0)
    if plain and code["stack"] > allowed:
        told.append(f"{code['stack']} bytes on the stack")
    loading = [loop for loop in code["loops"] if loop["loads"] and name in WIDE and plain]
    if name in WIDE and plain and not loading:
        told.append("no loop that loads")
    for loop in loading:
        if loop["local"] > FEW_SPILLED.get(name, 0) // 4 or loop["doubles"]:
            told.append("local memory or doubles in a loop")
        if "128" not in loop["loads"] or set(loop["loads"]) - {"128"} - WIDE[name]:
            told.append(f"loads of {loop['loads']} bits")
        if name in MULTIPLIED and not loop["matrix"]:
            told.append("a loop without tensor cores")
    if "overlap" in found["case"]:
        if code["before_wait"] < 0:
            told.append("does not wait for the kernel before")
        if code["before_wait"] > READ_BEFORE_WAIT.get(name, 0) or code["stores_before_wait"]:
            told.append("touches memory before it waits")
    return told


WIDE: dict[str, set[str]] = {
    "_sink_attention": set(),
    "_vector_linear": {"64", "32"},
    "_tile_linear": {"64", "32", "16"},
    "_vector_packed": {"64", "32", "16"},
    "_tile_packed": {"64", "32", "16"},
}
"""Kernels that must read at 128 bits, and what the few loads of activations and norms may be besides."""

MULTIPLIED = {"_sink_attention", "_tile_linear", "_tile_packed"}


@pytest.mark.slow
@pytest.mark.parametrize("group", KERNELS)
def test_kernels_compile_for_hopper_into_what_they_should(group: str) -> None:
    """In a process of its own, where nothing is interpreted; needs no GPU, only Triton's assembler."""
    script = Path(__file__).with_name("compile_cuda_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # In front: another Triton than the installed one may have been asked for.
    path = [environment.get("PYTHONPATH", ""), str(script.parent.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, str(script), group],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in compiled} == KERNELS[group]
    assert [(one["case"], *told) for one in compiled if (told := faults(one))] == []


def test_what_is_wrong_with_a_kernel_is_noticed() -> None:
    loop: dict[str, Any] = {
        "instructions": 90,
        "loads": {"128": 4},
        "matrix": 8,
        "local": 0,
        "doubles": 0,
    }
    code: dict[str, Any] = {"stack": 0, "loops": [loop], "before_wait": 0, "stores_before_wait": 0}
    good: dict[str, Any] = {
        "kernel": "_tile_linear",
        "case": "bfloat16 overlap",
        "shared": 1024,
        "code": code,
    }
    assert faults(good) == []
    changes: list[dict[str, Any]] = [{"stack": 8}, {"before_wait": -1}, {"before_wait": 1}]
    for change in changes:
        assert faults({**good, "code": {**code, **change}}) != []
    for change in ({"loads": {"16": 64}}, {"matrix": 0}, {"local": 2}, {"doubles": 1}):
        assert faults({**good, "code": {**code, "loops": [{**loop, **change}]}}) != []
    assert faults({**good, "shared": 2**18}) != []


def test_a_listing_is_read() -> None:
    """Two loops, one inside the other, and a branch to itself behind the end."""
    listing = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/                   ACQBULK ;
.L_x_1:
        /*0020*/                   LDG.E.EF.128 R4, desc[UR4][R8.64] ;
.L_x_0:
        /*0030*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   STL [R1], R2 ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""
    code = read_listing(listing, 40, 8)
    assert (code.registers, code.stack, code.local, code.before_wait) == (40, 8, 1, 1)
    assert code.stores_before_wait == 0
    assert code.loads == {"64": 1, "128": 2}
    (inner,) = code.loops
    assert (inner.instructions, inner.loads, inner.matrix) == (3, {"128": 1}, 1)
    assert (inner.local, inner.doubles) == (0, 0)
