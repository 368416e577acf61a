"""Compile every kernel of the CUDA engine for SM 90, as its own launches ask for it: no GPU needed.

    python tests/compile_cuda_kernels.py        prints a line for each: name, bytes of stack, of shared memory

A launch is caught before it reaches a device: a compiler wants no more than its arguments' types.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine.cuda_kernels.attention import (
    SplitSpace,
    decode_tiling,
    prefill_tiling,
    sink_attention,
)
from engine.cuda_kernels.linear import Norm, Weights
from engine.cuda_kernels.packed_linear import PackedWeights, unpack
from engine.cuda_kernels.rotate import HeadNorms, rotate_and_cache, rotation_angles
from engine.cuda_kernels.rows import rms_norm, swiglu, to_float8
from engine.cuda_linear import LinearLayers, default_choice
from engine.cuda_tuning import candidates
from engine_build.int4 import num_words

HOPPER = GPUTarget("cuda", 90, 32)
PROCESSORS = 132
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}
Key = tuple[int, ...]


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
    kernel = triton.compile(source, target=HOPPER, options=options)
    print(self.fn.__name__, stack_bytes(kernel.asm["cubin"]), kernel.metadata.shared)


def stack_bytes(cubin: bytes) -> int:
    """Of each thread: what did not fit its registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = [str(tool), "-res-usage", file.name]
        report = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", report)
    return int(found.group(1)) if found else -1


def empty(*size: int, dtype: Any = torch.bfloat16) -> Any:
    return torch.empty(size, dtype=dtype, device="meta")


def layers() -> Iterator[tuple[Weights, Norm | None, bool]]:
    """Of Llama-3-8B: shapes, with norm, into the residual stream."""
    norm = Norm(empty(4096, dtype=torch.float32), 1e-5)
    for matrix, kind in ((torch.bfloat16, None), (torch.float8_e4m3fn, torch.float32)):

        def weights(
            rows: int, columns: int, gated: bool = False, matrix: Any = matrix, kind: Any = kind
        ) -> Weights:
            scale = None if kind is None else empty(rows, dtype=kind)
            return Weights(empty(rows, columns, dtype=matrix), scale, None, gated)

        yield weights(6144, 4096), norm, False
        yield weights(28672, 4096, gated=True), norm, False
        yield weights(4096, 14336), None, True
    for group in (64, 128):

        def packed(
            rows: int, columns: int, gated: bool = False, group: int = group
        ) -> PackedWeights:
            words = empty(rows, num_words(columns), dtype=torch.int32)
            return PackedWeights(words, empty(rows, columns // group), None, gated, columns)

        yield packed(6144, 4096), norm, False
        yield packed(28672, 4096, gated=True), norm, False
        yield packed(4096, 14336), None, True


def compile_linear(overlap: bool) -> None:
    linear = LinearLayers({}, PROCESSORS, overlap)
    for weights, norm, accumulate in layers():
        for tokens in (1, 8, 64, 256):
            choices = {default_choice(weights, tokens, PROCESSORS)}
            if not overlap:
                choices |= set(candidates(weights, tokens))
            for choice in sorted(choices, key=str):
                if choice.blocks is not None:
                    x, out = empty(tokens, weights.num_inputs), empty(tokens, weights.num_outputs)
                    linear.run_as(choice, x, weights, out, norm, accumulate=accumulate)


def compile_unpacking() -> None:
    words, scales = empty(4096, num_words(14336), dtype=torch.int32), empty(4096, 14336 // 128)
    weights = PackedWeights(words, scales, inputs=14336)
    unpack(weights, slice(0, 256), empty(256, 14336))


def compile_attention(heads: int, kv_heads: int, dim: int, overlap: bool) -> None:
    cache, group = empty(64, 32, 2, kv_heads, 4096, dim)[:, 3], heads // kv_heads
    space = SplitSpace(*(empty(64, dtype=kind) for kind in (torch.float32,) * 2 + (torch.int32,)))
    rows, tiles = empty(64, 8, dtype=torch.int64), empty(64, 2, dtype=torch.int64)
    for tiling in (
        decode_tiling(2048, kv_heads, group, PROCESSORS),
        decode_tiling(2048, 64 * kv_heads, group, PROCESSORS),
        prefill_tiling(group, dim, split=False),
        prefill_tiling(group, dim, split=True),
    ):
        q, out = empty(2, 64, heads, dim), empty(64, heads, dim)
        sink_attention(q, cache, out, rows, tiles, tiling, space, overlap=overlap)
    half, token_rows = dim // 2, empty(64, dtype=torch.int64)
    angles = empty(64, 4, half, dtype=torch.float32)
    norms = HeadNorms(empty(dim), empty(dim), 1e-5) if dim == 128 else None
    qkv, q = empty(64, (heads + 2 * kv_heads) * dim), empty(2, 64, heads, dim)
    rotate_and_cache(qkv, angles, norms, cache, rows, token_rows, q, overlap=overlap)
    frequencies = empty(half, dtype=torch.float64)
    rotation_angles(rows, token_rows, frequencies, 1.0, angles, overlap=overlap)


def main() -> None:
    JITFunction.run = compile_only
    for overlap in (False, True):
        compile_linear(overlap)
        for heads, kv_heads, dim in ((32, 8, 128), (32, 32, 128), (14, 2, 64), (32, 8, 80)):
            compile_attention(heads, kv_heads, dim, overlap)
    compile_unpacking()
    x, weight = empty(64, 4096), empty(4096)
    rms_norm(x, weight, 1e-5, x)
    rms_norm(x, weight, 1e-5, x, x)
    swiglu(empty(64, 28672), empty(64, 14336))
    levels = empty(64, 14336, dtype=torch.float8_e4m3fn)
    to_float8(empty(64, 14336), levels, empty(64, 1, dtype=torch.float32))


if __name__ == "__main__":
    main()
