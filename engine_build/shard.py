"""Tensor parallelism: which part of each weight a rank holds.

    qkv         rows, by key/value head    a rank attends with its own heads alone
    output      columns                    partial sums, all-reduced
    gate_up     rows, gate and up each     a rank's own part of the MLP
    down        columns                    partial sums, all-reduced
    head        rows                       a rank's own part of the logits
    the rest    whole on every rank

So a layer needs two all-reduces, as in Megatron-LM (arXiv 1909.08053, section 3). A bias of `output`
is kept by rank 0 and zero on the others: it is added once. A head tied to the embedding becomes a
weight of its own. Where there are more ranks than key/value heads, neighbouring ranks hold the same one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from engine_build.spec import EngineSpec, ModelShape, SpecError
from engine_build.weights import Floats, MergedWeight, Tensors, merged_weights

HEAD = "head"
_COLUMNS = ("output", "down")


def check_tp_size(model: ModelShape, tp_size: int) -> None:
    """Raises SpecError("tp_size", ...) for a number of ranks that the model cannot be cut into."""
    if tp_size < 1:
        raise SpecError("tp_size", f"{tp_size} is not positive", "Use 1 to the number of GPUs")
    heads, kv_heads = model.num_heads, model.num_kv_heads
    counts = {
        "attention heads": heads,
        "intermediate size": model.intermediate_size,
        "vocabulary": model.vocab_size,
    }
    for what, count in counts.items():
        if count % tp_size:
            raise SpecError(
                "tp_size",
                f"the {what} of this model, {count}, cannot be cut into {tp_size} equal parts",
                f"Use one of {_fitting(model)}",
            )
    if kv_heads % tp_size and tp_size % kv_heads:
        raise SpecError(
            "tp_size",
            f"{kv_heads} key/value heads can neither be dealt out to {tp_size} ranks nor repeated on them",
            f"Use one of {_fitting(model)}",
        )


def _fitting(model: ModelShape) -> str:
    heads, kv_heads = model.num_heads, model.num_kv_heads
    return ", ".join(
        str(size)
        for size in range(1, heads + 1)
        if not heads % size
        and not model.intermediate_size % size
        and not model.vocab_size % size
        and not (kv_heads % size and size % kv_heads)
    )


def shard_shape(model: ModelShape, tp_size: int) -> ModelShape:
    """The decoder that one rank runs: its heads, its part of the MLP.

    `vocab_size` stays whole, for token ids do; the head of a rank has `head_rows` rows. The result is
    never tied, except for `tp_size` 1, where it is `model` itself. Raises SpecError as `check_tp_size`.
    """
    check_tp_size(model, tp_size)
    if tp_size == 1:
        return model
    return dataclasses.replace(
        model,
        num_heads=model.num_heads // tp_size,
        num_kv_heads=max(1, model.num_kv_heads // tp_size),
        intermediate_size=model.intermediate_size // tp_size,
        tied_head=False,
    )


def rank_spec(spec: EngineSpec) -> EngineSpec:
    """The spec of one rank: its `slot_bytes` are the rank's share of a kv_slot."""
    return dataclasses.replace(spec, model=shard_shape(spec.model, spec.tp_size))


def rank_folder(engine_dir: Path, rank: int, tp_size: int) -> Path:
    """Where an engine directory keeps a rank's graph and weights: `rank0`, ...; itself for one rank."""
    return engine_dir if tp_size == 1 else engine_dir / f"rank{rank}"


def head_rows(model: ModelShape, tp_size: int) -> int:
    """Logits per token on one rank: token ids rank * head_rows up to (rank + 1) * head_rows."""
    return model.vocab_size // tp_size


def whole_weights(model: ModelShape, tp_size: int) -> list[MergedWeight]:
    """The weights that `shard_values` cuts: those of the model, with a head of its own if tied."""
    weights = merged_weights(model)
    if tp_size > 1 and model.tied_head:
        embed = weights[0]
        weights.append(MergedWeight(HEAD, embed.shape, embed.load))
    return weights


def rank_weights(model: ModelShape, rank: int, tp_size: int) -> list[MergedWeight]:
    """Every weight of one rank, in order of use; for `tp_size` 1 those of the model.

    Each loads the whole weight and keeps its part: to write all ranks, cut `whole_weights` instead.
    """
    if tp_size == 1:
        return merged_weights(model)
    return [
        dataclasses.replace(
            weight,
            shape=shard_size(weight, model, tp_size),
            load=_Part(weight, model, rank, tp_size),
        )
        for weight in whole_weights(model, tp_size)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    weight: MergedWeight
    model: ModelShape
    rank: int
    tp_size: int

    def __call__(self, tensors: Tensors) -> Floats:
        values = self.weight.load(tensors)
        return shard_values(self.weight, values, self.model, self.rank, self.tp_size)


def shard_size(weight: MergedWeight, model: ModelShape, tp_size: int) -> tuple[int, ...]:
    """Shape of a rank's part of `weight`, the same on every rank."""
    kind = _kind(weight)
    if kind in ("qkv", "qkv.bias"):
        local = shard_shape(model, tp_size)
        rows = (local.num_heads + 2 * local.num_kv_heads) * model.head_dim
        return (rows, *weight.shape[1:])
    if kind in (HEAD, "gate_up"):
        return (weight.shape[0] // tp_size, *weight.shape[1:])
    if kind in _COLUMNS:
        return (weight.shape[0], weight.shape[1] // tp_size)
    return weight.shape


def shard_values(
    weight: MergedWeight, values: Floats, model: ModelShape, rank: int, tp_size: int
) -> Floats:
    """The part of `values`, float32 of `weight.shape`, that `rank` holds: C-contiguous.

    Raises SpecError as `check_tp_size`.
    """
    check_tp_size(model, tp_size)
    if tp_size == 1:
        return values
    kind = _kind(weight)
    if kind in ("qkv", "qkv.bias"):
        part = _heads(values, model, rank, tp_size)
    elif kind == "gate_up":
        gate, up = np.split(values, 2)
        part = np.concatenate([_piece(gate, 0, rank, tp_size), _piece(up, 0, rank, tp_size)])
    elif kind == HEAD:
        part = _piece(values, 0, rank, tp_size)
    elif kind in _COLUMNS:
        part = _piece(values, 1, rank, tp_size)
    elif kind == "output.bias" and rank:
        part = np.zeros_like(values)
    else:
        part = values
    return np.ascontiguousarray(part)


def _kind(weight: MergedWeight) -> str:
    """`qkv.bias` of `layers.7.qkv.bias`, `head` of `head`."""
    return weight.name.split(".", 2)[2] if weight.name.startswith("layers.") else weight.name


def _heads(values: Floats, model: ModelShape, rank: int, tp_size: int) -> Floats:
    """The rank's query heads with the key/value heads that they use, from [q | k | v] rows."""
    dim, kv_size = model.head_dim, model.num_kv_heads * model.head_dim
    q_size = model.num_heads * dim
    q, k, v = np.split(values, [q_size, q_size + kv_size])
    local = shard_shape(model, tp_size)
    first = rank * local.num_heads // model.heads_per_kv_head * dim
    kv = slice(first, first + local.num_kv_heads * dim)
    return np.concatenate([_piece(q, 0, rank, tp_size), k[kv], v[kv]])


def _piece(values: Floats, axis: int, rank: int, tp_size: int) -> Floats:
    """The rank's of `tp_size` equal pieces along `axis`."""
    size = values.shape[axis] // tp_size
    piece = slice(rank * size, (rank + 1) * size)
    return values[piece] if axis == 0 else values[:, piece]
