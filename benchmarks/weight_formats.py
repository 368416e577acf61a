"""What the number formats of GPU engines cost: their arithmetic, simulated in NumPy, and rounded weights.

    python -m benchmarks.weight_formats                    # the demo model, some minutes; writes JSON
    python -m benchmarks.weight_formats --model CHECKPOINT --tokens 2048 --capacity 1024
    python -m benchmarks.weight_formats --formats int4 float8

Two questions, over one text under a sliding window:

- executor: how far an engine that makes no mistake is from the float reference on its own weights. It rounds
  where the CUDA engine's kernels do, for few tokens (norm and gate inside the product, activations 16-bit)
  and for many (the library: both rounded between; activations of float8 layers are float8 too, a scale
  for each token; 4-bit weights are made 16-bit first). `sinkserve verify` allows three to five times that.
- weights: the reference on rounded weights against the reference on the checkpoint's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks.report import save, table
from benchmarks.text_corpus import KING_JAMES, read_corpus
from engine.float_reference import FloatDecoder, Passage, WeightOf
from engine.protocol import TokenIds
from engine.verify_figures import Figures, Tally
from engine_build.checkpoint import read_checkpoint
from engine_build.demo import fetch_demo_model
from engine_build.files import sinkserve_home
from engine_build.graph import export_graph
from engine_build.lowering_cuda import LARGEST_FLOAT8
from engine_build.spec import EngineSpec, KvDtype, ModelShape, Target, WeightFormat, kv_dtype_for
from engine_build.stored_weights import checkpoint_weights, stored_weights
from engine_build.tensors import Checkpoint

Floats = npt.NDArray[np.float32]

FORMATS: tuple[WeightFormat, ...] = ("bfloat16", "float16", "float8", "int4", "int8")
SINK_TOKENS = 4
_KINDS: dict[KvDtype, npt.DTypeLike] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_QUERIES, _ROWS = 256, 64


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How the CUDA engine computes: the weights' format, and whether for many tokens at once."""

    weight_format: WeightFormat
    many: bool

    def rounded(self, x: npt.NDArray[Any]) -> Floats:
        """As kept between kernels."""
        kind = _KINDS[kv_dtype_for(self.weight_format)]
        result: Floats = x.astype(np.float32).astype(kind).astype(np.float32)
        return result

    def product(self, x: Floats, matrix: Floats) -> Floats:
        """x @ matrix.T, summed in float32; `matrix` is a layer's, as stored."""
        if self.many and self.weight_format == "float8":
            x = _float8(x)
        if self.many and self.weight_format == "int4":
            matrix = self.rounded(matrix)
        result: Floats = x @ matrix.T
        return result


def _float8(x: Floats) -> Floats:
    scales = np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-12) / np.float32(LARGEST_FLOAT8)
    result: Floats = (x / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales
    return result


@dataclass(frozen=True, slots=True)
class Simulation:
    """A decoder that rounds where the CUDA engine does. Models with biases or head norms: not needed here."""

    shape: ModelShape
    weight: WeightOf
    arithmetic: Arithmetic

    def logits(self, passage: Passage) -> Iterator[Floats]:
        """Of all tokens, a few rows at a time."""
        x = self.arithmetic.rounded(self.weight("embed")[passage.token_ids])
        for number in range(self.shape.num_layers):
            x = self._layer(f"layers.{number}.", x, passage)
        normed, factor = self._normed(x, self.weight("norm"))
        head = self.weight("embed" if self.shape.tied_head else "head")
        for begin in range(0, len(x), _ROWS):
            rows = slice(begin, begin + _ROWS)
            yield normed[rows] @ head.T * factor[rows]

    def _layer(self, name: str, x: Floats, passage: Passage) -> Floats:
        numbers, rounded = self.arithmetic, self.arithmetic.rounded
        normed, factor = self._normed(x, self.weight(name + "input_norm"))
        qkv = rounded(numbers.product(normed, self.weight(name + "qkv")) * factor)
        x = self._added(x, self._attended(qkv, passage), self.weight(name + "output"))
        normed, factor = self._normed(x, self.weight(name + "mlp_norm"))
        both = numbers.product(normed, self.weight(name + "gate_up")) * factor
        gate, up = np.split(rounded(both) if numbers.many else both, 2, axis=1)
        return self._added(x, rounded(gate / (1 + np.exp(-gate)) * up), self.weight(name + "down"))

    def _normed(self, x: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """What is multiplied, and what the product is multiplied by: a fused norm divides at the end."""
        square = np.mean(np.square(x), axis=1, keepdims=True)
        factor: Floats = 1 / np.sqrt(square + np.float32(self.shape.rms_norm_eps))
        if self.arithmetic.many:
            return self.arithmetic.rounded(x * factor * weight), np.ones_like(factor)
        return self.arithmetic.rounded(x * weight), factor

    def _added(self, x: Floats, y: Floats, matrix: Floats) -> Floats:
        product = self.arithmetic.product(y, matrix)
        if self.arithmetic.many and self.arithmetic.weight_format == "float8":
            product = self.arithmetic.rounded(product)
        return self.arithmetic.rounded(x + product)

    def _attended(self, qkv: Floats, passage: Passage) -> Floats:
        shape, rounded, indices = self.shape, self.arithmetic.rounded, passage.indices
        group, dim = shape.heads_per_kv_head, shape.head_dim
        heads = qkv.reshape(len(qkv), -1, dim).transpose(1, 0, 2)
        q, k, v = np.split(heads, [shape.num_heads, shape.num_heads + shape.num_kv_heads])
        k = np.repeat(rounded(self._turned(k, indices)), group, axis=0)
        v = np.repeat(v, group, axis=0)
        to_sinks = rounded(self._turned(q, passage.sink_positions))
        to_window = rounded(self._turned(q, indices))
        is_sink = indices < passage.sink_tokens
        out = np.empty_like(q)
        for begin in range(0, len(qkv), _QUERIES):
            rows = slice(begin, begin + _QUERIES)
            ages = indices[rows, None] - indices
            seen = (ages >= 0) & (is_sink | (ages < passage.window_tokens))
            keys = k.transpose(0, 2, 1)
            scores = np.where(is_sink, to_sinks[:, rows] @ keys, to_window[:, rows] @ keys)
            scores = np.where(seen, scores, -np.inf)
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, rows] = rounded(shares) @ v / shares.sum(axis=-1, keepdims=True)
        return rounded(out.transpose(1, 0, 2).reshape(len(qkv), -1))

    def _turned(self, heads: Floats, positions: npt.NDArray[np.int64]) -> Floats:
        """Rotate-half of [heads, n, head_dim]."""
        rope = self.shape.rope
        angles = positions[:, None] * rope.inverse_frequencies()
        cos, sin = ((f(angles) * rope.cos_sin_scale()).astype(np.float32) for f in (np.cos, np.sin))
        half = rope.rotary_dim // 2
        a, b, rest = np.split(heads, [half, 2 * half], axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


@dataclass(frozen=True, slots=True)
class Measured:
    """`figures` of one run against another, and the perplexity of the former on the text."""

    what: str
    weight_format: WeightFormat
    figures: Figures
    perplexity: float

    def record(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "weights": self.weight_format,
            "perplexity": self.perplexity,
            **dataclasses.asdict(self.figures),
        }


def _reference_logits(decoder: FloatDecoder, hidden: npt.NDArray[Any]) -> Iterator[Floats]:
    head = decoder.head()
    for begin in range(0, len(hidden), _ROWS):
        yield head(hidden[begin : begin + _ROWS]).astype(np.float32)


def compare(
    what: str,
    weight_format: WeightFormat,
    got: Iterator[Floats],
    wanted: Iterator[Floats],
    token_ids: TokenIds,
) -> Measured:
    """Logits beside logits; the last token's predict nothing that is known."""
    tally, losses, place = Tally(), [], 1
    for ours, theirs in zip(got, wanted, strict=True):
        tally.add(ours, theirs)
        targets = token_ids[place : place + len(ours)]
        place += len(ours)
        rows = ours[: len(targets)].astype(np.float64)
        top = rows.max(axis=1)
        total = np.log(np.exp(rows - top[:, None]).sum(axis=1)) + top
        losses += (total - rows[np.arange(len(targets)), targets]).tolist()
    return Measured(what, weight_format, tally.figures(), math.exp(float(np.mean(losses))))


def measure_format(
    weight_format: WeightFormat,
    checkpoint: Checkpoint,
    exact: tuple[FloatDecoder, npt.NDArray[Any]],
    passage: Passage,
) -> Iterator[Measured]:
    """The weights' rounding; then the executor, where the format has a CUDA engine."""
    shape = checkpoint.shape
    target: Target = "cpu" if weight_format == "int8" else "cuda"
    spec = EngineSpec(shape, 512, 64, weight_format, kv_dtype_for(weight_format), target)
    with tempfile.TemporaryDirectory() as folder:
        export_graph(spec, checkpoint.tensors, Path(folder), lambda fraction: None)
        decoder = FloatDecoder(shape, stored_weights(Path(folder), spec))
        hidden = decoder.hidden(passage)
        logits = _reference_logits(decoder, hidden)
        wanted = _reference_logits(*exact)
        yield compare("weights rounded", weight_format, logits, wanted, passage.token_ids)
        if target == "cpu":
            return
        for many in (False, True):
            simulation = Simulation(shape, decoder.weight, Arithmetic(weight_format, many))
            what = "executor, many tokens" if many else "executor, few tokens"
            logits = simulation.logits(passage)
            wanted = _reference_logits(decoder, hidden)
            yield compare(what, weight_format, logits, wanted, passage.token_ids)


def show(measured: list[Measured]) -> str:
    """All of it as a table."""
    rows = [["weights", "what", "logits off by", "KL mean", "same likeliest", "perplexity"]]
    for one in measured:
        figures = one.figures
        row = [one.weight_format, one.what, f"{figures.relative_error:.2%}"]
        row += [f"{figures.kl_mean:.1e}", f"{figures.top1:.1%}", f"{one.perplexity:.2f}"]
        rows.append(row)
    return table(rows)


def main() -> int:
    """Measure and write the JSON; 1 for a model that the simulation does not cover."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint (default: the demo model)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", type=int, default=1536, help="length of text (default 1536)")
    parser.add_argument("--capacity", type=int, default=512)
    options = parser.parse_args()
    home = sinkserve_home()
    checkpoint = read_checkpoint(options.model or fetch_demo_model(home))
    shape = checkpoint.shape
    if shape.qkv_bias or shape.output_bias or shape.qk_norm:
        print("The simulation has no biases and no head norms: take a Llama or Mistral model")
        return 1
    text = read_corpus(home)[: options.tokens * 12]
    ids = checkpoint.text.tokenizer.encode(text, add_special_tokens=False).ids
    token_ids = np.asarray(ids[: options.tokens], np.int32)
    window = options.capacity - SINK_TOKENS
    passage = Passage(token_ids, np.arange(len(token_ids)), SINK_TOKENS, window)
    decoder = FloatDecoder(
        shape, checkpoint_weights(options.model or fetch_demo_model(home), shape)
    )
    exact = decoder, decoder.hidden(passage)
    logits, again = _reference_logits(*exact), _reference_logits(*exact)
    measured = [compare("nothing rounded", "float32", logits, again, token_ids)]
    for weight_format in options.formats:
        for one in measure_format(weight_format, checkpoint, exact, passage):
            measured.append(one)
            print(one.record(), file=sys.stderr, flush=True)
    print(show(measured))
    document = {
        "model": checkpoint.name,
        "corpus": dataclasses.asdict(KING_JAMES),
        "tokens": len(token_ids),
        "capacity": options.capacity,
        "sink_tokens": SINK_TOKENS,
        "results": [one.record() for one in measured],
    }
    print(f"\nwritten: {save('weight_formats', document)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
