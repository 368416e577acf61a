"""Compile every kernel of the CUDA engine for SM 90, as its own launches ask for it, and read what came out.

    python tests/compile_cuda_kernels.py [NAME...]     a line of JSON for each kernel compiled, see `Compiled`

No GPU needed: a launch is caught before it reaches a device, as a compiler wants no more than its arguments'
types, and Triton brings the disassembler. NAMEs choose groups: linear, packed, attention, rows, sampling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from benchmarks.gpu.shapes import MODELS
from engine.cuda_kernels.attention import (
    SplitSpace,
    Tiling,
    decode_tiling,
    prefill_tiling,
    sink_attention,
)
from engine.cuda_kernels.linear import Norm, Weights
from engine.cuda_kernels.packed_linear import PackedWeights, unpack
from engine.cuda_kernels.rotate import HeadNorms, rotate_and_cache, rotation_angles
from engine.cuda_kernels.rows import rms_norm, swiglu, to_float8
from engine.cuda_kernels.sampling import SamplingBuffers, SamplingSizes, launch_sampling
from engine.cuda_linear import Choice, LinearLayers, default_choice
from engine.cuda_tuning import candidates
from engine_build.int4 import num_words
from engine_build.spec import ModelShape
from tests.sass import Machine, machine_code

HOPPER = GPUTarget("cuda", 90, 32)
PROCESSORS = 132
BATCHES = (1, 8, 64, 256)
SERVED = ("llama-2-7b", "llama-3-8b", "qwen2.5-0.5b")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}
Key = tuple[int, ...]
case = [""]
"""What the launches that follow are for."""
seen: set[str] = set()


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel's machine code, `shared` bytes, and how many `blocks` of it are on a processor at once by
    registers, shared memory and threads."""

    kernel: str
    case: str
    warps: int
    shared: int
    blocks: int
    code: Machine

    def line(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def compile_only(self: Any, *args: Any, **named: Any) -> None:
    """In the place of `JITFunction.run`."""
    values = dict(zip(self.arg_names, args, strict=False))
    apart = {"grid", "warmup", *self.arg_names}
    options = {name: value for name, value in named.items() if name not in apart}
    values |= {name: value for name, value in named.items() if name in self.arg_names}
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(self.params):
        value, specialised = values[parameter.name], not parameter.do_not_specialize
        key: Key = (number,)
        one = specialised and isinstance(value, int) and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[key] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[key] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i64" if value >= 2**31 else "i32"
            if specialised and value % 16 == 0:
                attributes[key] = [["tt.divisibility", 16]]
    source = ASTSource(self, signature=signature, constexprs=constants, attrs=attributes)
    kernel = compile(source, target=HOPPER, options=options)
    if kernel.hash in seen:
        return
    seen.add(kernel.hash)
    code = machine_code(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    blocks = resident(code.registers, warps, shared)
    print(Compiled(self.fn.__name__, case[0], warps, shared, blocks, code).line(), flush=True)


def resident(registers: int, warps: int, shared: int) -> int:
    """Blocks on a processor of SM 90: 64 Ki registers (dealt out by 256), 227 KiB, 64 warps, 32 blocks."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, 227 * 1024 // (shared + 1024), 64 // warps, 32)


def empty(*size: int, dtype: Any = torch.bfloat16) -> Any:
    return torch.empty(size, dtype=dtype, device="meta")


def layers(model: ModelShape, matrix: Any) -> Iterator[tuple[str, Weights, Norm | None, bool]]:
    """Name, weights, norm, whether into the residual stream."""
    scaled = matrix == torch.float8_e4m3fn
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    norm = Norm(empty(hidden, dtype=torch.float32), 1e-5)

    def weights(rows: int, columns: int, gated: bool = False, bias: bool = False) -> Weights:
        scale = empty(rows, dtype=torch.float32) if scaled else None
        added = empty(rows, dtype=activations(matrix)) if bias else None
        return Weights(empty(rows, columns, dtype=matrix), scale, added, gated)

    yield "qkv", weights(heads + 2 * kv, hidden, bias=model.qkv_bias), norm, False
    yield "output", weights(hidden, heads), None, True
    yield "gate_up", weights(2 * inner, hidden, gated=True), norm, False
    yield "down", weights(hidden, inner), None, True
    yield "head", Weights(empty(model.vocab_size, hidden, dtype=activations(matrix))), norm, False


def packed_layers(group: int) -> Iterator[tuple[str, PackedWeights, Norm | None, bool]]:
    """Of Llama-3-8B, 4-bit in groups of so many inputs."""
    norm = Norm(empty(4096, dtype=torch.float32), 1e-5)

    def packed(rows: int, columns: int, gated: bool = False) -> PackedWeights:
        words = empty(rows, num_words(columns), dtype=torch.int32)
        return PackedWeights(words, empty(rows, columns // group), None, gated, columns)

    yield "qkv", packed(6144, 4096), norm, False
    yield "gate_up", packed(28672, 4096, gated=True), norm, False
    yield "down", packed(4096, 14336), None, True


def activations(matrix: Any) -> Any:
    return torch.bfloat16 if matrix in (torch.float8_e4m3fn, torch.int32) else matrix


def compile_packed(all_candidates: bool) -> None:
    for overlap in (False, True):
        linear = LinearLayers({}, PROCESSORS, overlap)
        for group in (64, 128):
            for layer, weights, norm, accumulate in packed_layers(group):
                for tokens in BATCHES:
                    choices = {default_choice(weights, tokens, PROCESSORS)}
                    if all_candidates:
                        choices |= set(candidates(weights, tokens))
                    for choice in sorted(choices, key=str):
                        label(f"4 bits by {group}", layer, f"batch {tokens}", choice, overlap)
                        run_linear(linear, choice, weights, tokens, norm, accumulate)
    words, scales = empty(4096, num_words(14336), dtype=torch.int32), empty(4096, 14336 // 128)
    label("4 bits by 128", "for the library", False)
    unpack(PackedWeights(words, scales, inputs=14336), slice(0, 256), empty(256, 14336))


def compile_linear(all_candidates: bool) -> None:
    formats = (torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32)
    for overlap in (False, True):
        linear = LinearLayers({}, PROCESSORS, overlap)
        for name, matrix in ((name, matrix) for name in SERVED for matrix in formats):
            # What is special about the other two is told by one model and format.
            if matrix in (torch.float16, torch.float32) and (name != "llama-3-8b" or overlap):
                continue
            for layer, weights, norm, accumulate in layers(MODELS[name], matrix):
                for tokens in BATCHES:
                    choices = {default_choice(weights, tokens, PROCESSORS)}
                    if all_candidates and name == "llama-3-8b" and layer in ("gate_up", "down"):
                        choices |= set(candidates(weights, tokens))
                    for choice in sorted(choices, key=str):
                        label(name, layer, f"batch {tokens}", choice, matrix, overlap)
                        run_linear(linear, choice, weights, tokens, norm, accumulate)


def run_linear(
    linear: LinearLayers,
    choice: Choice,
    weights: Weights,
    tokens: int,
    norm: Norm | None,
    accumulate: bool,
) -> None:
    if choice.blocks is None:
        return
    kind = activations(weights.matrix.dtype)
    x = empty(tokens, weights.num_inputs, dtype=kind)
    wide = torch.float32 if weights.num_outputs > 30_000 else kind
    out = empty(tokens, weights.num_outputs, dtype=wide)
    linear.run_as(choice, x, weights, out, norm, accumulate=accumulate)


def label(*words: Any) -> None:
    overlap = " overlap" if words[-1] is True else ""
    case[0] = ", ".join(str(word).removeprefix("torch.") for word in words[:-1]) + overlap


ATTENDED = (
    (32, 32, 128),
    (32, 8, 128),
    (14, 2, 64),
    (32, 8, 80),
    (32, 4, 96),
    (16, 16, 64),
    (28, 4, 128),
)
"""Query heads, KV heads, head_dim: of the three models, and groups of 1, 4, 7, 8 at other widths."""


def compile_attention() -> None:
    for overlap in (False, True):
        for heads, kv_heads, dim in ATTENDED:
            group = heads // kv_heads
            tilings: dict[Tiling, str] = {}
            for batch in BATCHES:
                tiling = decode_tiling(2048, batch * kv_heads, group, PROCESSORS)
                tilings.setdefault(tiling, f"decode of {batch}")
            for split in (False, True):
                tilings[prefill_tiling(group, dim, split)] = "prefill" + " split" * split
            kinds = [torch.bfloat16]
            if (heads, kv_heads, overlap) == (32, 8, False) and dim == 128:
                kinds += [torch.float16, torch.float32]
            for kind in kinds:
                attend(tilings, kind, (heads, kv_heads, dim), overlap)


def attend(
    tilings: dict[Tiling, str], kind: Any, shape: tuple[int, int, int], overlap: bool
) -> None:
    heads, kv_heads, dim = shape
    # More than 2**31 elements: strides are passed as 64 bits where they are.
    cache = empty(64, 32, 2, kv_heads, 4096, dim, dtype=kind)[:, 3]
    space = SplitSpace(*(empty(64, dtype=each) for each in (torch.float32,) * 2 + (torch.int32,)))
    rows, tiles = empty(64, 8, dtype=torch.int64), empty(64, 2, dtype=torch.int64)
    q, out = empty(2, 64, heads, dim, dtype=kind), empty(64, heads, dim, dtype=kind)
    for tiling, purpose in tilings.items():
        label(f"{heads}/{kv_heads} heads of {dim}", purpose, kind, overlap)
        sink_attention(q, cache, out, rows, tiles, tiling, space, overlap=overlap)
    half, token_rows = dim // 2, empty(64, dtype=torch.int64)
    angles = empty(64, 4, half, dtype=torch.float32)
    norms = HeadNorms(empty(dim), empty(dim), 1e-5) if dim == 128 else None
    qkv = empty(64, (heads + 2 * kv_heads) * dim, dtype=kind)
    label(f"{heads}/{kv_heads} heads of {dim}", kind, overlap)
    rotate_and_cache(qkv, angles, norms, cache, rows, token_rows, q, overlap=overlap)
    rotation_angles(
        rows, token_rows, empty(half, dtype=torch.float64), 1.0, angles, overlap=overlap
    )


def compile_rows() -> None:
    for name in SERVED:
        model = MODELS[name]
        label(name, "bfloat16", False)
        x, weight = empty(64, model.hidden_size), empty(model.hidden_size, dtype=torch.float32)
        rms_norm(x, weight, 1e-5, x)
        rms_norm(x, weight, 1e-5, x, x)
        inner = model.intermediate_size
        swiglu(empty(64, 2 * inner), empty(64, inner))
        levels = empty(64, inner, dtype=torch.float8_e4m3fn)
        to_float8(empty(64, inner), levels, empty(64, 1, dtype=torch.float32))


def compile_sampling() -> None:
    for name in SERVED:
        vocab = MODELS[name].vocab_size
        label(name, "vocabulary of", vocab, False)
        sizes = SamplingSizes.for_vocab(vocab)
        buffers = SamplingBuffers(256, vocab, 4096, torch.device("meta"), sizes)
        launch_sampling(buffers, empty(64, vocab, dtype=torch.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help="of kernels (default: all)")
    parser.add_argument("--candidates", action="store_true", help="what tuning would try, too")
    asked = parser.parse_args()
    JITFunction.run = compile_only
    run = {
        "linear": lambda: compile_linear(asked.candidates),
        "packed": lambda: compile_packed(asked.candidates),
        "attention": compile_attention,
        "rows": compile_rows,
        "sampling": compile_sampling,
    }
    for group in asked.groups or run:
        run[group]()


if __name__ == "__main__":
    main()
