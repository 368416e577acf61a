"""Triton kernels that draw tokens, launched in this order by `launch_sampling`.

    scan     row x tile  maxima of tiles and of groups of tokens, sums of weights; copies rows to adjust
    adjust   row x part  penalties, DRY and bias, into the copies; `scan` again for those rows
    plan     row         is it finite, is it greedy, and at which floor do the tokens worth a look begin
    collect  row x tile  those tokens, reading only groups that have one
    draw     row         among the few collected ones, or by tile where nothing is cut off
    draw_all row         the same among all tokens, where the few were not enough: slow and rare
    report   row         log-probabilities

`scan` reads a row's logits once, `collect` a fraction of them, `draw` at most a tile. What a row does
not need, its programs skip: the sequence of launches is always the same, so a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from engine.cuda_kernels.sampling_draw import draw, draw_all
from engine.cuda_kernels.sampling_parts import MAX_TOP, STATE_WORDS, WIDE_WORDS
from engine.cuda_kernels.sampling_scan import adjust, collect, plan, report, scan


@dataclass(frozen=True, slots=True)
class SamplingSizes:
    """How a row is cut up: tiles of `tile_tokens`, groups of `group_tokens`, powers of two.

    A nucleus is looked for among the likeliest `sure_tokens` or more; `few_tokens` at most are looked at
    closely, a power of two.
    """

    tile_tokens: int
    group_tokens: int
    sure_tokens: int = 512
    few_tokens: int = 2048

    @classmethod
    def for_vocab(cls, vocab_size: int) -> SamplingSizes:
        """Tiles of 4096 tokens; as small groups as leave at most 2048 of them, at least 16 tokens."""
        tile = max(16, min(4096, triton.next_power_of_2(vocab_size)))
        padded = triton.cdiv(vocab_size, tile) * tile
        return cls(tile, min(tile, max(16, triton.next_power_of_2(triton.cdiv(padded, 2048)))))


class SamplingBuffers:
    """Static device memory of a sampler; what graphs were captured with stays where it is.

    `words` int32 [rows, 18] and `wide` int64 [rows, 9] are two views of the rows' requests, `pool` int32
    [pool_size, 4] their adjustments. Results: `tokens` int32 [rows], -1 where a row is not finite;
    `logprobs` float32 [rows]; `top_ids` int32 and `top_logprobs` float32 [rows, 20].
    """

    def __init__(
        self,
        rows: int,
        vocab_size: int,
        pool_size: int,
        device: torch.device,
        sizes: SamplingSizes,
    ) -> None:
        self.rows, self.vocab_size, self.sizes = rows, vocab_size, sizes
        self.tiles = triton.cdiv(vocab_size, sizes.tile_tokens)
        self.num_groups = self.tiles * sizes.tile_tokens // sizes.group_tokens

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.wide = empty(torch.int64, rows, WIDE_WORDS.value)
        self.words = self.wide.view(torch.int32)
        self.pool = empty(torch.int32, pool_size, 4)
        self.scores = empty(torch.float32, rows, vocab_size)
        self.tile_max = empty(torch.float32, 2, rows, self.tiles)
        self.tile_first = empty(torch.int32, 2, rows, self.tiles)
        self.tile_sum = empty(torch.int64, 2, rows, self.tiles)
        self.tile_sum_raw = empty(torch.int64, rows, self.tiles)
        self.group_max = empty(torch.float32, 2, rows, self.num_groups)
        self.state = empty(torch.int32, rows, STATE_WORDS.value)
        self.few_keys = empty(torch.int32, rows, sizes.few_tokens)
        self.few_ids = empty(torch.int32, rows, sizes.few_tokens)
        self.tokens = empty(torch.int32, rows)
        self.logprobs = empty(torch.float32, rows)
        self.top_ids = empty(torch.int32, rows, MAX_TOP.value)
        self.top_logprobs = empty(torch.float32, rows, MAX_TOP.value)

    @property
    def nbytes(self) -> int:
        held = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        return sum(value.nbytes for value in held if value is not self.words)


_ADJUST_PARTS = 4
_ADJUST_BLOCK = 256


def launch_sampling(buffers: SamplingBuffers, logits: torch.Tensor) -> None:
    """Draw from `logits` [n, vocab_size], n <= rows, what `buffers.words` asks for."""
    b, sizes, vocab = buffers, buffers.sizes, buffers.vocab_size
    source = (logits, logits.stride(0), b.scores)
    count, tile_tokens, limit = len(logits), sizes.tile_tokens, sizes.few_tokens
    tiles_2 = triton.next_power_of_2(b.tiles)
    groups_2 = triton.next_power_of_2(b.num_groups)
    groups = tile_tokens // sizes.group_tokens
    stats = (b.tile_max, b.tile_first, b.tile_sum, b.tile_sum_raw, b.group_max)
    cut_up = (b.rows, vocab, b.tiles, groups, sizes.group_tokens)
    by_tile, by_row = (count, b.tiles), (count,)
    scan[by_tile](*source, b.words, *stats, *cut_up, again=False, num_warps=8)
    # Without contraction to fused multiply-adds: engine.sampling rounds each operation.
    adjust[(count, _ADJUST_PARTS)](
        *source, b.words, b.pool, vocab, _ADJUST_PARTS, _ADJUST_BLOCK, enable_fp_fusion=False
    )
    scan[by_tile](*source, b.words, *stats, *cut_up, again=True, num_warps=8)
    plan[by_row](
        b.words,
        b.wide,
        b.tile_max,
        b.tile_first,
        b.group_max,
        b.state,
        b.tokens,
        b.rows,
        vocab,
        b.tiles,
        tiles_2,
        b.num_groups,
        groups_2,
        sizes.sure_tokens,
        limit,
    )
    few = (b.state, b.few_keys, b.few_ids)
    collect[by_tile](
        *source,
        b.words,
        b.group_max,
        *few,
        b.rows,
        vocab,
        tile_tokens,
        sizes.group_tokens,
        b.num_groups,
        limit,
        num_warps=8,
    )
    draw[by_row](
        *source,
        b.words,
        b.wide,
        b.tile_max,
        b.tile_sum,
        *few,
        b.tokens,
        b.rows,
        vocab,
        tile_tokens,
        b.tiles,
        tiles_2,
        limit,
        num_warps=8,
    )
    draw_all[by_row](*source, b.words, b.wide, b.state, b.tokens, vocab, tile_tokens, num_warps=8)
    report[by_row](
        logits,
        logits.stride(0),
        b.words,
        b.tile_max,
        b.tile_sum_raw,
        b.group_max,
        b.tokens,
        b.logprobs,
        b.top_ids,
        b.top_logprobs,
        vocab,
        b.tiles,
        tiles_2,
        b.num_groups,
        groups_2,
        sizes.group_tokens,
    )
