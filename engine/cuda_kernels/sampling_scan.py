"""The kernels around the draw: scan, adjust, plan, collect before it, report behind. See sampling.py."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.cuda_kernels.sampling_parts import (
    ADJUSTED,
    ALL,
    BY_TILE,
    COLLECTED,
    COUNT,
    DONE,
    FEW,
    FIRST,
    FLAGS,
    FLOOR,
    FREQUENCY,
    GREEDY,
    HIGHEST,
    LOGPROBS,
    LOWEST,
    MAX_TOP,
    MIN_LOGPROB,
    MIN_P,
    MODE,
    NO_ID,
    NUM_TOP,
    PRESENCE,
    REPETITION,
    SCALE,
    STATE_WORDS,
    TOP_K,
    TOP_P,
    UNIT,
    WIDE_WORDS,
    WORDS,
    as_float,
    fixed,
    key_of,
    kth_largest,
    scores_of,
    value_of,
    weight_of,
)


@triton.jit
def scan(
    logits,
    stride,
    scores,
    words,
    tile_max,
    tile_first,
    tile_sum,
    tile_sum_raw,
    group_max,
    rows: tl.constexpr,
    vocab: tl.constexpr,
    tiles: tl.constexpr,
    groups: tl.constexpr,
    group: tl.constexpr,
    again: tl.constexpr,
):
    """`groups` of `group` tokens are a tile. `again`: adjusted rows only, from their adjusted scores,
    into the second half of each array."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    flags = tl.load(words + row * WORDS + FLAGS)
    adjusted = flags & ADJUSTED
    wanted = adjusted if again else flags
    if wanted != 0:
        source = adjusted if again else flags * 0
        plane = row + rows if again else row
        of_tile = tl.arange(0, groups)
        ids = (tile * groups + of_tile[:, None]) * group + tl.arange(0, group)[None, :]
        value = scores_of(logits, stride, scores, row, ids, ids < vocab, source, vocab)
        maxima = tl.max(value, 1)
        highest = tl.max(maxima, 0)
        first = tl.min(tl.min(tl.where(value == highest, ids, NO_ID), 1), 0)
        tl.store(group_max + (plane * tiles + tile) * groups + of_tile, maxima)
        tl.store(tile_max + plane * tiles + tile, highest)
        tl.store(tile_first + plane * tiles + tile, first)
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        if (flags & GREEDY) == 0:
            scale = as_float(tl.load(words + row * WORDS + SCALE))
            weights = fixed(weight_of(value, finite, scale))
            tl.store(tile_sum + plane * tiles + tile, tl.sum(tl.sum(weights, 1), 0))
        if not again:
            if (flags & LOGPROBS) != 0:
                raw = fixed(weight_of(value, finite, 1.0))
                tl.store(tile_sum_raw + row * tiles + tile, tl.sum(tl.sum(raw, 1), 0))
            if adjusted != 0:
                tl.store(scores + row * vocab + ids, value, ids < vocab)


@triton.jit
def adjust(
    logits,
    stride,
    scores,
    words,
    pool,
    vocab: tl.constexpr,
    parts: tl.constexpr,
    block: tl.constexpr,
):
    """`pool` int32 [n, 4]: token id, how often it was seen, float32 bits of DRY's and the bias' share."""
    row = tl.program_id(0).to(tl.int64)
    if (tl.load(words + row * WORDS + FLAGS) & ADJUSTED) != 0:
        repetition = as_float(tl.load(words + row * WORDS + REPETITION))
        frequency = as_float(tl.load(words + row * WORDS + FREQUENCY))
        presence = as_float(tl.load(words + row * WORDS + PRESENCE))
        count = tl.load(words + row * WORDS + COUNT)
        entries = pool + tl.load(words + row * WORDS + FIRST).to(tl.int64) * 4
        for begin in range(tl.program_id(1) * block, count, parts * block):
            entry = begin + tl.arange(0, block)
            inside = entry < count
            ids = tl.load(entries + entry * 4, inside, 0)
            times = tl.load(entries + entry * 4 + 1, inside, 0)
            dry = as_float(tl.load(entries + entry * 4 + 2, inside, 0))
            bias = as_float(tl.load(entries + entry * 4 + 3, inside, 0))
            value = tl.load(logits + row * stride + ids, inside, 0.0).to(tl.float32)
            seen = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
            seen = seen - frequency * times.to(tl.float32) - presence
            value = tl.where(times > 0, seen, value) - dry + bias
            tl.store(scores + row * vocab + ids, value, inside)


@triton.jit
def _floor(maxima, highest, top_k, sure: tl.constexpr, num_groups: tl.constexpr):
    """A key that `top_k` tokens reach, or `sure` ones without top-k: as many groups have a maximum of
    at least that."""
    wanted = tl.minimum(tl.where(top_k > 0, top_k, sure), num_groups // 2)
    keys = key_of(maxima)
    low = tl.min(keys, 0).to(tl.int64)
    return kth_largest(keys, wanted, low, key_of(highest).to(tl.int64)).to(tl.int32)


@triton.jit
def plan(
    words,
    wide,
    tile_max,
    tile_first,
    group_max,
    state,
    tokens,
    rows: tl.constexpr,
    vocab: tl.constexpr,
    tiles: tl.constexpr,
    tiles_2: tl.constexpr,
    num_groups: tl.constexpr,
    groups_2: tl.constexpr,
    sure: tl.constexpr,
    limit: tl.constexpr,
):
    """`_2`: rounded up to a power of two. `sure`: among how many tokens a nucleus is looked for;
    `limit`: how many `collect` has room for."""
    row = tl.program_id(0).to(tl.int64)
    flags = tl.load(words + row * WORDS + FLAGS)
    mode = tl.full((), DONE, tl.int32)
    token = tl.full((), -1, tl.int32)
    if flags != 0:
        tile = tl.arange(0, tiles_2)
        raw = tl.load(tile_max + row * tiles + tile, tile < tiles, -float("inf"))
        raw_highest = tl.max(raw, 0)
        plane = tl.where((flags & ADJUSTED) != 0, row + rows, row)
        highs = tl.load(tile_max + plane * tiles + tile, tile < tiles, -float("inf"))
        highest = tl.max(highs, 0)
        floor = tl.full((), LOWEST, tl.int32)
        if (raw_highest > -float("inf")) & (raw_highest < float("inf")):
            firsts = tl.load(tile_first + plane * tiles + tile, tile < tiles, NO_ID)
            token = tl.min(tl.where(highs == highest, firsts, NO_ID), 0)
            if (flags & GREEDY) == 0:
                top_k = tl.load(words + row * WORDS + TOP_K)
                min_p = as_float(tl.load(words + row * WORDS + MIN_P))
                cuts = (top_k > 0) | (as_float(tl.load(wide + row * WIDE_WORDS + TOP_P)) < 1.0)
                mode = tl.where(cuts | (min_p > 0.0), FEW, BY_TILE)
                if vocab > limit:
                    if cuts:
                        # More than half of the groups would be read, and too many tokens found.
                        mode = tl.where(top_k > num_groups // 2, ALL, FEW)
                        group = tl.arange(0, groups_2)
                        maxima = tl.load(
                            group_max + plane * num_groups + group,
                            group < num_groups,
                            -float("inf"),
                        )
                        floor = _floor(maxima, highest, top_k, sure, num_groups)
                    elif min_p > 0.0:
                        # A little lower than exact: `draw` decides.
                        scale = as_float(tl.load(words + row * WORDS + SCALE))
                        floor = key_of(highest + (tl.log(min_p) - 1e-3) / scale)
        tl.store(state + row * STATE_WORDS + FLOOR, floor)
        tl.store(state + row * STATE_WORDS + HIGHEST, highest.to(tl.int32, bitcast=True))
        tl.store(state + row * STATE_WORDS + COLLECTED, 0)
    tl.store(state + row * STATE_WORDS + MODE, mode)
    tl.store(tokens + row, token)


@triton.jit
def collect(
    logits,
    stride,
    scores,
    words,
    group_max,
    state,
    few_keys,
    few_ids,
    rows: tl.constexpr,
    vocab: tl.constexpr,
    tile_tokens: tl.constexpr,
    group: tl.constexpr,
    num_groups: tl.constexpr,
    limit: tl.constexpr,
):
    """Tokens whose key is at least the row's floor, in no order; COLLECTED counts all of them."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(state + row * STATE_WORDS + MODE) == FEW:
        adjusted = tl.load(words + row * WORDS + FLAGS) & ADJUSTED
        floor = tl.load(state + row * STATE_WORDS + FLOOR)
        plane = tl.where(adjusted != 0, row + rows, row)
        ids = tile * tile_tokens + tl.arange(0, tile_tokens)
        maxima = tl.load(group_max + plane * num_groups + ids // group)
        wanted = (key_of(maxima) >= floor) & (ids < vocab)
        key = key_of(scores_of(logits, stride, scores, row, ids, wanted, adjusted, vocab))
        taken = (wanted & (key >= floor)).to(tl.int32)
        count = tl.sum(taken, 0)
        if count > 0:
            begin = tl.atomic_add(state + row * STATE_WORDS + COLLECTED, count)
            place = begin + tl.cumsum(taken, 0) - 1
            fits = (taken != 0) & (place < limit)
            tl.store(few_keys + row * limit + place, key, fits)
            tl.store(few_ids + row * limit + place, ids, fits)


@triton.jit
def report(
    logits,
    stride,
    words,
    tile_max,
    tile_sum_raw,
    group_max,
    tokens,
    logprobs,
    top_ids,
    top_logprobs,
    vocab: tl.constexpr,
    tiles: tl.constexpr,
    tiles_2: tl.constexpr,
    num_groups: tl.constexpr,
    groups_2: tl.constexpr,
    group: tl.constexpr,
):
    """Of the drawn token and of the likeliest ones, by what the model itself said."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    if ((tl.load(words + row * WORDS + FLAGS) & LOGPROBS) != 0) & (token >= 0):
        tile = tl.arange(0, tiles_2)
        highs = tl.load(tile_max + row * tiles + tile, tile < tiles, -float("inf"))
        sums = tl.load(tile_sum_raw + row * tiles + tile, tile < tiles, 0).to(tl.float64)
        highest = tl.max(highs, 0)
        total = tl.sum(sums * tl.exp((highs - highest).to(tl.float64)), 0) / UNIT
        log_sum = highest.to(tl.float64) + tl.log(total)
        own = tl.load(logits + row * stride + token).to(tl.float32).to(tl.float64)
        tl.store(logprobs + row, tl.maximum(own - log_sum, MIN_LOGPROB).to(tl.float32))
        # The largest of the groups' maxima is the next one; its group then offers its own next.
        place = tl.arange(0, groups_2)
        maxima = tl.load(group_max + row * num_groups + place, place < num_groups, -float("inf"))
        offers = tl.where(place < num_groups, key_of(maxima), LOWEST)
        last = tl.full((), NO_ID, tl.int32)
        last_id = tl.full((), -1, tl.int32)
        for number in range(tl.load(words + row * WORDS + NUM_TOP)):
            best = tl.max(offers, 0)
            here = tl.min(tl.where(offers == best, place, groups_2), 0)
            ids = here * group + tl.arange(0, group)
            value = tl.load(logits + row * stride + ids, ids < vocab, -float("inf")).to(tl.float32)
            keys = tl.where(ids < vocab, key_of(value), LOWEST)
            untold = (keys < last) | ((keys == last) & (ids > last_id))
            chosen = tl.min(tl.where(untold & (keys == best), ids, NO_ID), 0)
            rest = (keys < best) | ((keys == best) & (ids > chosen))
            following = tl.max(tl.where(rest, keys, LOWEST), 0)
            offers = tl.where(place == here, following, offers)
            last = best
            last_id = chosen
            logprob = tl.maximum(value_of(best).to(tl.float64) - log_sum, MIN_LOGPROB)
            tl.store(top_ids + row * MAX_TOP + number, chosen)
            tl.store(top_logprobs + row * MAX_TOP + number, logprob.to(tl.float32))
