"""The kernels that draw: by tile, among few tokens, among all. See sampling.py."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.cuda_kernels.sampling_parts import (
    ADJUSTED,
    ALL,
    BY_TILE,
    COLLECTED,
    FEW,
    FLAGS,
    FLOOR,
    HIGHEST,
    LOWEST,
    MIN_P,
    MODE,
    NO_ID,
    SCALE,
    STATE_WORDS,
    TOP_K,
    TOP_P,
    WIDE_WORDS,
    WORDS,
    as_float,
    beyond,
    first_id,
    fixed,
    heaviest,
    key_of,
    kth_largest,
    scores_of,
    share_of,
    uniform,
    value_of,
    weight_of,
)


@triton.jit
def _by_tile(
    logits,
    stride,
    scores,
    row,
    adjusted,
    scale,
    shares,
    u,
    vocab: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """Nothing is cut off: the tile whose share of the weight holds `u`, then the token in it."""
    tile = tl.arange(0, shares.shape[0])
    upto = tl.cumsum(shares, 0)
    total = tl.max(upto, 0)
    goal = u * total
    reached = (upto > goal) | (upto >= total)
    chosen = tl.min(tl.where(reached, tile, NO_ID), 0)
    here = tl.sum(tl.where(tile == chosen, shares, 0.0), 0)
    before = tl.sum(tl.where(tile == chosen, upto, 0.0), 0) - here
    ids = chosen * tile_tokens + tl.arange(0, tile_tokens)
    value = scores_of(logits, stride, scores, row, ids, ids < vocab, adjusted, vocab)
    weights = fixed(weight_of(value, tl.max(value, 0), scale))
    share = tl.maximum((goal - before) / here, 0.0)
    found = tl.cumsum(weights, 0) >= beyond(share, tl.sum(weights, 0))
    return tl.min(tl.where(found, ids, NO_ID), 0)


@triton.jit
def _among_few(
    keys, ids, count, top_k, top_p, min_p, total, floor, highest, scale, u, vocab: tl.constexpr
):
    """The token, or -1 where the collected ones are too few (or were too many) to tell."""
    held = ids < vocab
    weight = tl.where(held, weight_of(value_of(keys), highest, scale), 0.0)
    weights = fixed(weight)
    high = key_of(highest).to(tl.int64)
    last = tl.full((), vocab - 1, tl.int64)
    cut = floor.to(tl.int64)
    kept = held
    enough = count <= keys.shape[0]
    if enough & (top_k > 0):
        cut = kth_largest(keys, top_k, cut, high)
        ties = top_k - tl.sum((keys > cut).to(tl.int32), 0)
        upto = first_id(ids, (keys == cut).to(tl.int32), ties, last)
        kept = held & ((keys > cut) | ((keys == cut) & (ids <= upto)))
        weights = tl.where(kept, weights, 0)
        total = tl.sum(weights, 0)
    if enough & (top_p < 1.0):
        goal = share_of(top_p, total)
        enough = tl.sum(weights, 0) >= goal
        if enough:
            cut = heaviest(keys, weights, goal, cut, high)
            missing = goal - tl.sum(tl.where(keys > cut, weights, 0), 0)
            upto = first_id(ids, tl.where(keys == cut, weights, 0), missing, last)
            kept = kept & ((keys > cut) | ((keys == cut) & (ids <= upto)))
    weights = tl.where(kept & (weight >= min_p), weights, 0)
    token = tl.full((), -1, tl.int32)
    if enough:
        token = first_id(ids, weights, beyond(u, tl.sum(weights, 0)), last).to(tl.int32)
    return token


@triton.jit
def draw(
    logits,
    stride,
    scores,
    words,
    wide,
    tile_max,
    tile_sum,
    state,
    few_keys,
    few_ids,
    tokens,
    rows: tl.constexpr,
    vocab: tl.constexpr,
    tile_tokens: tl.constexpr,
    tiles: tl.constexpr,
    tiles_2: tl.constexpr,
    limit: tl.constexpr,
):
    """Rows in the modes BY_TILE and FEW; what the few cannot tell goes on to ALL."""
    row = tl.program_id(0).to(tl.int64)
    mode = tl.load(state + row * STATE_WORDS + MODE)
    if (mode == FEW) | (mode == BY_TILE):
        u = uniform(wide, row)
        scale = as_float(tl.load(words + row * WORDS + SCALE))
        highest = as_float(tl.load(state + row * STATE_WORDS + HIGHEST))
        adjusted = tl.load(words + row * WORDS + FLAGS) & ADJUSTED
        tile = tl.arange(0, tiles_2)
        plane = tl.where(adjusted != 0, row + rows, row)
        highs = tl.load(tile_max + plane * tiles + tile, tile < tiles, -float("inf"))
        sums = tl.load(tile_sum + plane * tiles + tile, tile < tiles, 0)
        shares = tl.exp(((highs - highest) * scale).to(tl.float64)) * sums.to(tl.float64)
        token = tl.full((), -1, tl.int32)
        if mode == BY_TILE:
            token = _by_tile(
                logits, stride, scores, row, adjusted, scale, shares, u, vocab, tile_tokens
            )
        else:
            count = tl.load(state + row * STATE_WORDS + COLLECTED)
            place = tl.arange(0, limit)
            keys = tl.load(few_keys + row * limit + place, place < count, LOWEST)
            ids = tl.load(few_ids + row * limit + place, place < count, NO_ID)
            top_k = tl.load(words + row * WORDS + TOP_K)
            top_p = as_float(tl.load(wide + row * WIDE_WORDS + TOP_P))
            min_p = as_float(tl.load(words + row * WORDS + MIN_P))
            total = tl.sum(shares, 0).to(tl.int64)
            floor = tl.load(state + row * STATE_WORDS + FLOOR)
            token = _among_few(
                keys, ids, count, top_k, top_p, min_p, total, floor, highest, scale, u, vocab
            )
        if token >= 0:
            tl.store(tokens + row, token)
        else:
            tl.store(state + row * STATE_WORDS + MODE, ALL)


@triton.jit
def _cut_by_rank(
    logits,
    stride,
    scores,
    row,
    adjusted,
    top_k,
    high,
    vocab: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """The key of the `top_k`-th token, and how many of just that key are among the first `top_k`."""
    cut = tl.full((), LOWEST, tl.int64)
    above = tl.full((), 0, tl.int64)
    while cut < high:
        middle = high - (high - cut) // 2
        count = tl.full((), 0, tl.int64)
        for begin in range(0, vocab, tile_tokens):
            ids = begin + tl.arange(0, tile_tokens)
            value = scores_of(logits, stride, scores, row, ids, ids < vocab, adjusted, vocab)
            count += tl.sum(((ids < vocab) & (key_of(value) >= middle)).to(tl.int64), 0)
        # Too few: they are all above the cut.
        above = tl.where(count >= top_k, above, count)
        cut = tl.where(count >= top_k, middle, cut)
        high = tl.where(count >= top_k, high, middle - 1)
    return cut, top_k - above


@triton.jit
def _mass_from(
    logits,
    stride,
    scores,
    row,
    adjusted,
    least,
    highest,
    scale,
    vocab: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """The weight of all tokens with keys of at least `least`."""
    mass = tl.full((), 0, tl.int64)
    for begin in range(0, vocab, tile_tokens):
        ids = begin + tl.arange(0, tile_tokens)
        value = scores_of(logits, stride, scores, row, ids, ids < vocab, adjusted, vocab)
        weights = fixed(weight_of(value, highest, scale))
        mass += tl.sum(tl.where(key_of(value) >= least, weights, 0), 0)
    return mass


@triton.jit
def draw_all(
    logits,
    stride,
    scores,
    words,
    wide,
    state,
    tokens,
    vocab: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """The rules themselves, by bisection over the whole row: slow and rare."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state + row * STATE_WORDS + MODE) == ALL:
        adjusted = tl.load(words + row * WORDS + FLAGS) & ADJUSTED
        scale = as_float(tl.load(words + row * WORDS + SCALE))
        min_p = as_float(tl.load(words + row * WORDS + MIN_P))
        top_k = tl.load(words + row * WORDS + TOP_K)
        top_p = as_float(tl.load(wide + row * WIDE_WORDS + TOP_P))
        highest = as_float(tl.load(state + row * STATE_WORDS + HIGHEST))
        top = key_of(highest).to(tl.int64)
        # Without top-k the cut is below every key.
        cut = tl.full((), LOWEST, tl.int64)
        ties = tl.full((), 0, tl.int64)
        if top_k > 0:
            cut, ties = _cut_by_rank(
                logits, stride, scores, row, adjusted, top_k.to(tl.int64), top, vocab, tile_tokens
            )
        if top_p < 1.0:
            total = _mass_from(
                logits, stride, scores, row, adjusted, cut + 1, highest, scale, vocab, tile_tokens
            )
            if top_k > 0:
                total += ties * fixed(weight_of(value_of(cut.to(tl.int32)), highest, scale))
            goal = share_of(top_p, total)
            high, above = top, tl.full((), 0, tl.int64)
            while cut < high:
                middle = high - (high - cut) // 2
                mass = _mass_from(
                    logits,
                    stride,
                    scores,
                    row,
                    adjusted,
                    middle,
                    highest,
                    scale,
                    vocab,
                    tile_tokens,
                )
                above = tl.where(mass >= goal, above, mass)
                cut = tl.where(mass >= goal, middle, cut)
                high = tl.where(mass >= goal, high, middle - 1)
            one = tl.maximum(fixed(weight_of(value_of(cut.to(tl.int32)), highest, scale)), 1)
            ties = (goal - above + one - 1) // one
        # What is kept is known now: weigh it, then find the token that holds u.
        u = uniform(wide, row)
        sought = tl.full((), 0, tl.int64)
        token = tl.full((), NO_ID, tl.int32)
        for search in range(2):
            equals = tl.full((), 0, tl.int64)
            before = tl.full((), 0, tl.int64)
            for begin in range(0, vocab, tile_tokens):
                ids = begin + tl.arange(0, tile_tokens)
                value = scores_of(logits, stride, scores, row, ids, ids < vocab, adjusted, vocab)
                weight = weight_of(value, highest, scale)
                equal = ((ids < vocab) & (key_of(value) == cut)).to(tl.int64)
                kept = (key_of(value) > cut) | (
                    (equal > 0) & (equals + tl.cumsum(equal, 0) <= ties)
                )
                weights = tl.where(kept & (weight >= min_p), fixed(weight), 0)
                if search == 1:
                    reached = before + tl.cumsum(weights, 0) >= sought
                    token = tl.minimum(token, tl.min(tl.where(reached, ids, NO_ID), 0))
                equals += tl.sum(equal, 0)
                before += tl.sum(weights, 0)
            if search == 0:
                sought = beyond(u, before)
        tl.store(tokens + row, token)
