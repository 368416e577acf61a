"""The decoder's layers over a step's flat batch of tokens.

    embed -> layers x (norm, qkv | rotate, cache | attend | output | norm, gate, up | down) -> norm -> head

Each | is a kernel at small batch: norms, biases, the gate and the residual sums ride on the linear layers.
A rank of a tensor-parallel group adds its partial sums to the residual stream (rank 0) or puts them in its
place (the others); their all-reduced sum is the new stream, so no launch is spent on the addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_group import RankGroup
from engine.cuda_kernels.attention import Tiling, sink_attention, split_space
from engine.cuda_kernels.linear import Norm, Weights
from engine.cuda_kernels.rotate import rotate_and_cache, rotation_angles
from engine.cuda_linear import LinearLayers
from engine.cuda_step import ROW_FIELDS, Layout
from engine.cuda_weights import DecoderWeights
from engine_build.spec import ModelShape

MOST_SPLIT = 4096
"""Tiles times KV heads of a launch whose rows are split: splits are for few rows."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The parts of a packed step, views of one vector on the device; how attention cuts it up.

    `in_order`: every token wants logits, so none need be picked.
    """

    token_ids: Tensor
    token_rows: Tensor
    rows: Tensor
    tiles: Tensor
    logit_rows: Tensor
    tiling: Tiling
    in_order: bool

    @classmethod
    def of(cls, words: Tensor, layout: Layout, tiling: Tiling, in_order: bool) -> DeviceStep:
        ids, token_rows, rows, tiles, logit_rows = (words[begin:end] for begin, end in layout.spans)
        table = rows.view(-1, ROW_FIELDS)
        return cls(ids, token_rows, table, tiles.view(-1, 2), logit_rows, tiling, in_order)


class CudaDecoder:
    """A rank's layers, of the shape `model`.

    `slots` [max_resident, layers, 2, kv_heads, places, padded head_dim]: keys, then values. One kv_slot
    is one run of memory, so that it can be copied as a whole.
    """

    def __init__(
        self,
        model: ModelShape,
        weights: DecoderWeights,
        slots: Tensor,
        linear: LinearLayers,
        group: RankGroup,
        overlap: bool,
    ) -> None:
        self._model, self._weights, self._slots = model, weights, slots
        self._linear, self._group, self._overlap = linear, group, overlap
        frequencies = torch.from_numpy(model.rope.inverse_frequencies())
        self._frequencies = frequencies.to(slots.device)
        self._arrived = torch.zeros(MOST_SPLIT, dtype=torch.int32, device=slots.device)

    def run(self, step: DeviceStep, logits: Tensor) -> None:
        """Cache the step's tokens; their `logits` float32 [len(logit_rows), vocab]."""
        model, weights = self._model, self._weights
        tokens = len(step.token_ids)
        angles = self._slots.new_empty((tokens, 4, model.rope.rotary_dim // 2), dtype=torch.float32)
        rotation_angles(
            step.rows,
            step.token_rows,
            self._frequencies,
            model.rope.cos_sin_scale(),
            angles,
            overlap=self._overlap,
        )
        x = torch.index_select(weights.embed, 0, step.token_ids)
        for number, layer in enumerate(weights.layers):
            # No name holds a layer's tensors while the next part makes its own (cuda_memory.py).
            self._add(self._attend(number, x, angles, step), layer.output, x)
            self._add(self._linear_layer(x, layer.gate_up, layer.mlp_norm), layer.down, x)
        if len(step.logit_rows):
            wanted = x if step.in_order else torch.index_select(x, 0, step.logit_rows)
            self._head(wanted, logits)

    def _linear_layer(self, x: Tensor, weights: Weights, norm: Norm) -> Tensor:
        out = x.new_empty((len(x), weights.num_outputs))
        self._linear.run(x, weights, out, norm)
        return out

    def _add(self, x: Tensor, weights: Weights, stream: Tensor) -> None:
        self._linear.run(x, weights, stream, accumulate=self._group.rank == 0)
        self._group.all_reduce(stream)

    def _attend(self, number: int, x: Tensor, angles: Tensor, step: DeviceStep) -> Tensor:
        model, cache = self._model, self._slots[:, number]
        layer, tokens = self._weights.layers[number], len(x)
        qkv = self._linear_layer(x, layer.qkv, layer.input_norm)
        q = qkv.new_empty((2, tokens, model.num_heads, model.head_dim))
        rotate_and_cache(
            qkv,
            angles,
            layer.head_norms,
            cache,
            step.rows,
            step.token_rows,
            q,
            overlap=self._overlap,
        )
        out = qkv.new_empty((tokens, model.num_heads, model.head_dim))
        space = split_space(
            step.tiling, len(step.tiles), model.num_kv_heads, model.head_dim, self._arrived
        )
        sink_attention(
            q, cache, out, step.rows, step.tiles, step.tiling, space, overlap=self._overlap
        )
        return out.view(tokens, -1)

    def _head(self, x: Tensor, logits: Tensor) -> None:
        weights = self._weights
        if self._group.size == 1:
            self._linear.run(x, weights.head, logits, weights.norm)
            return
        mine = logits.new_empty((len(x), weights.head.num_outputs))
        self._linear.run(x, weights.head, mine, weights.norm)
        logits.copy_(self._group.gather(mine))
