"""Which kernel serves a linear layer: ours for few tokens, the vendor's library for many.

A choice is written as text, so that what a start measured can be kept as JSON:

    vector:4x1024w4s3    outputs x inputs of a program, warps, pipeline stages; one token only
    tile:64x128w4s4      the same; up to 256 tokens
    library              cuBLAS, with the norm and the gate as kernels of their own; 4-bit weights are
                         made 16-bit for it, a piece at a time
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.cuda_kernels.common import WORD, interpreted, power_of_two
from engine.cuda_kernels.linear import Blocks, Norm, Weights, tile_linear, vector_linear
from engine.cuda_kernels.packed_linear import PackedWeights, tile_packed, unpack, vector_packed
from engine.cuda_kernels.rows import rms_norm, swiglu, to_float8
from engine_build.int4 import BLOCK
from engine_build.spec import SpecError

MOST_TILED = 256
"""Tokens; above, the library always."""

_FUSED_NORM = 16
"""Above so many tokens each program would spend more on the norm than a launch costs."""

_UNPACKED_BYTES = 32 << 20
"""Of 4-bit weights that are 16-bit for a while: enough rows for the library, little beside the weights."""

_TEXT = re.compile(r"(vector|tile):(\d+)x(\d+)w(\d+)s(\d+)")


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to compute a layer."""

    kind: Literal["vector", "tile", "library"]
    blocks: Blocks | None = None

    def __str__(self) -> str:
        if self.blocks is None:
            return self.kind
        blocks = self.blocks
        shape = f"{blocks.outputs}x{blocks.inputs}"
        return f"{self.kind}:{shape}w{blocks.num_warps}s{blocks.num_stages}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Inverse of `str`. Raises SpecError."""
        if text == "library":
            return LIBRARY
        match = _TEXT.fullmatch(text)
        if match is None:
            raise SpecError("choices", f"{text!r} names no kernel", "Measure again with tune=True")
        kind, outputs, inputs, warps, stages = match.groups()
        blocks = Blocks(int(outputs), int(inputs), int(warps), int(stages))
        return cls("vector" if kind == "vector" else "tile", blocks)


LIBRARY = Choice("library")


def bucket_of(tokens: int) -> int:
    """Layers of 33 to 64 tokens share a choice, and so on."""
    return power_of_two(tokens)


def key_of(weights: Weights, tokens: int) -> str:
    """What a choice depends on, as text: shape, format, tokens."""
    outputs, inputs = len(weights.matrix), weights.num_inputs
    kind = str(weights.matrix.dtype).removeprefix("torch.")
    if isinstance(weights, PackedWeights):
        kind = f"int4by{BLOCK // weights.parts}"
    return f"{outputs}x{inputs}-{kind}{'-gated' if weights.gated else ''}@{bucket_of(tokens)}"


def default_choice(weights: Weights, tokens: int, num_processors: int) -> Choice:
    """Before anything was measured: enough programs to keep the memory busy, tiles that stay in registers."""
    inputs = power_of_two(weights.num_inputs)
    if interpreted(weights.matrix.device):
        outputs = min(power_of_two(weights.num_outputs), 512)
        blocks = Blocks(outputs, min(inputs, 256), num_stages=1)
        if tokens > _FUSED_NORM:
            return LIBRARY
        return Choice("vector" if tokens == 1 else "tile", blocks)
    if isinstance(weights, PackedWeights):
        return _packed_default(weights, tokens, num_processors)
    float8 = weights.scale is not None
    if tokens == 1:
        # Float8 takes more arithmetic a byte: more outputs share the work on x.
        outputs = 8 if float8 and not weights.gated else 4
        while outputs > 2 and weights.num_outputs < outputs * 2 * num_processors:
            outputs //= 2
        return Choice("vector", Blocks(outputs, min(inputs, 1024), 4, 3))
    if tokens <= (64 if float8 else 32):
        # Each program norms x anew, so 16 outputs are too few unless processors would idle.
        outputs = 64
        while outputs > 16 and weights.num_outputs < outputs * num_processors * outputs // 32:
            outputs //= 2
        if float8:
            # A warp turns 16 outputs to bfloat16; more than two warps would do it over again.
            # Few outputs need the warps all the same, and the sums of many gated tokens their registers.
            four = tokens > 32 if weights.gated else outputs == 16 and tokens <= WORD
            return Choice("tile", Blocks(32, 128, 4 if four else 2, 4))
        stages = 3 if weights.gated else 4 if outputs > 16 else 6
        return Choice("tile", Blocks(outputs, 128, 4, stages))
    return LIBRARY


def _packed_default(weights: PackedWeights, tokens: int, num_processors: int) -> Choice:
    """Each thread of the vector kernel has several outputs, to share what it works out of the inputs."""
    if tokens == 1:
        outputs = 32 if weights.gated else 64  # gate and up of 64 do not fit the registers
        while outputs > 16 and weights.num_outputs < outputs * num_processors:
            outputs //= 2
        return Choice("vector", Blocks(outputs, 512, 4, 1))
    if tokens <= 64:
        full = weights.num_outputs >= 64 * num_processors
        return Choice("tile", Blocks(64, BLOCK, 4, 4) if full else Blocks(32, BLOCK, 2, 4))
    return LIBRARY


class LinearLayers:
    """Runs linear layers, each in the way chosen for its shape and number of tokens."""

    def __init__(self, chosen: Mapping[str, str], num_processors: int, overlap: bool) -> None:
        self.chosen = {key: Choice.parse(text) for key, text in chosen.items()}
        self._num_processors = num_processors
        self._overlap = overlap

    def run(
        self,
        x: Tensor,
        weights: Weights,
        out: Tensor,
        norm: Norm | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        """x [tokens, inputs], normed if `norm`, into out [tokens, outputs], or added to it."""
        choice = self.chosen.get(key_of(weights, len(x))) or default_choice(
            weights, len(x), self._num_processors
        )
        self.run_as(choice, x, weights, out, norm, accumulate=accumulate)

    def run_as(
        self,
        choice: Choice,
        x: Tensor,
        weights: Weights,
        out: Tensor,
        norm: Norm | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        """`run` in a given way."""
        if norm is not None and not _fuses_norm(choice, weights, len(x)):
            normed = torch.empty_like(x)
            rms_norm(x, norm.weight, norm.epsilon, normed, overlap=self._overlap)
            x, norm = normed, None
        if choice.blocks is None:
            _library(x, weights, out, accumulate)
            return
        options = {"accumulate": accumulate, "overlap": self._overlap}
        if isinstance(weights, PackedWeights):
            packed = vector_packed if choice.kind == "vector" else tile_packed
            packed(x, weights, out, choice.blocks, norm, **options)
        else:
            launch = vector_linear if choice.kind == "vector" else tile_linear
            launch(x, weights, out, choice.blocks, norm, **options)


def _fuses_norm(choice: Choice, weights: Weights, tokens: int) -> bool:
    """Tiles of float8 weights have no arithmetic to spare for it."""
    if choice.blocks is None or tokens > _FUSED_NORM:
        return False
    float8 = weights.scale is not None and not isinstance(weights, PackedWeights)
    return choice.kind == "vector" or not float8


def _library(x: Tensor, weights: Weights, out: Tensor, accumulate: bool) -> None:
    if weights.gated:
        both = torch.empty((len(x), 2 * weights.num_outputs), dtype=out.dtype, device=out.device)
        _library(x, dataclasses.replace(weights, gated=False), both, False)
        swiglu(both, out)
        return
    if isinstance(weights, PackedWeights):
        _packed_product(x, weights, out, accumulate)
    elif weights.scale is not None:
        product = _float8_product(x, weights.matrix, weights.scale)
        if accumulate:
            out.add_(product)
        else:
            out.copy_(product)
    elif accumulate:
        out.addmm_(x, weights.matrix.t())
    elif out.dtype == x.dtype:
        torch.mm(x, weights.matrix.t(), out=out)
    elif interpreted(x.device):
        torch.mm(x.to(out.dtype), weights.matrix.to(out.dtype).t(), out=out)
    else:
        # Logits stay what the sums were, not rounded to 16 bits on the way.
        torch.mm(x, weights.matrix.t(), out_dtype=out.dtype, out=out)
    if weights.bias is not None:
        out.add_(weights.bias)


def _packed_product(x: Tensor, weights: PackedWeights, out: Tensor, accumulate: bool) -> None:
    """A piece of the matrix after the other, made 16-bit in the same memory."""
    outputs, inputs = len(weights.matrix), weights.num_inputs
    rows = min(outputs, max(256, _UNPACKED_BYTES // (inputs * x.element_size()) // 256 * 256))
    space = x.new_empty((rows, inputs))
    for begin in range(0, outputs, rows):
        piece = slice(begin, min(begin + rows, outputs))
        matrix, columns = space[: piece.stop - begin], out[:, piece]
        unpack(weights, piece, matrix)
        if accumulate:
            columns.addmm_(x, matrix.t())
        else:
            columns.copy_(x @ matrix.t())


def _float8_product(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """Both operands float8, a scale for each token and each output; not on a CPU, which has no such unit."""
    if interpreted(x.device):
        return (x.float() @ (matrix.float() * scale[:, None]).t()).to(x.dtype)
    levels = torch.empty(x.shape, dtype=matrix.dtype, device=x.device)
    scales = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    to_float8(x, levels, scales)
    product: Tensor = torch._scaled_mm(
        levels, matrix.t(), scale_a=scales, scale_b=scale[None, :], out_dtype=x.dtype
    )
    return product
