"""What the sampling kernels share: the words of a row, keys, weights, bisection.

Floats are compared as int32 keys of the same order. Weights are exp((score - highest) / temperature),
as integers in units of 2**-44: their sums do not depend on the order in which they are added.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row's request: 9 words of 64 bits, seen as 18 of 32 bits from the ninth on.
TOP_P, SEED, TURN, K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SCALE, MIN_P = tl.constexpr(8), tl.constexpr(9)
REPETITION, FREQUENCY, PRESENCE = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
FLAGS, TOP_K, NUM_TOP = tl.constexpr(13), tl.constexpr(14), tl.constexpr(15)
FIRST, COUNT = tl.constexpr(16), tl.constexpr(17)
WIDE_WORDS, WORDS = tl.constexpr(9), tl.constexpr(18)

# Bits of FLAGS; 0 is a row to leave alone.
ACTIVE, GREEDY, ADJUSTED, LOGPROBS = (
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(4),
    tl.constexpr(8),
)

# A row's state, int32, and its modes: what is left to do.
MODE, FLOOR, HIGHEST, COLLECTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
STATE_WORDS = tl.constexpr(4)
DONE, BY_TILE, FEW, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

MAX_TOP = tl.constexpr(20)
UNIT = tl.constexpr(2.0**44)
LOWEST = tl.constexpr(-(2**31))
NO_ID = tl.constexpr(2**31 - 1)
MIN_LOGPROB = tl.constexpr(-9999.0)


@triton.jit
def as_float(word):
    """The float of 32 or 64 bits that an integer holds."""
    if word.dtype == tl.int64:
        return word.to(tl.float64, bitcast=True)
    else:
        return word.to(tl.float32, bitcast=True)


@triton.jit
def key_of(value):
    """int32 in the order of float32 `value`; both zeros are one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(value, highest, scale):
    """float32, 1 for the highest."""
    return tl.exp((value - highest) * scale)


@triton.jit
def fixed(weight):
    """int64 in units of 2**-44. A sum over 2**18 of them fits."""
    return (weight * UNIT).to(tl.int64)


@triton.jit
def scores_of(logits, stride, scores, row, ids, wanted, adjusted, vocab: tl.constexpr):
    """float32 scores of `ids`, -inf where not `wanted`; NaN reads as +inf."""
    plain = tl.load(logits + row * stride + ids, wanted & (adjusted == 0), -float("inf"))
    changed = tl.load(scores + row * vocab + ids, wanted & (adjusted != 0), -float("inf"))
    value = tl.where(adjusted != 0, changed, plain.to(tl.float32))
    return tl.where(value == value, value, float("inf"))


@triton.jit
def kth_largest(keys, k, low, high):
    """The largest t in low..high (int64) that at least `k` keys reach; `low` must be one."""
    while low < high:
        middle = high - (high - low) // 2
        enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def heaviest(keys, weights, goal, low, high):
    """The largest t in low..high such that keys of at least t weigh `goal`; `low` must be one."""
    while low < high:
        middle = high - (high - low) // 2
        enough = tl.sum(tl.where(keys >= middle, weights, 0), 0) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def first_id(ids, weights, goal, high):
    """The lowest id up to which `weights` reach `goal`; those up to `high` (int64) must."""
    low = high * 0
    while low < high:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(ids <= middle, weights, 0), 0) >= goal
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


@triton.jit
def share_of(share, total):
    """`share` (float64) of `total` (int64), rounded up, at least 1 and at most all."""
    goal = tl.ceil(share * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(goal, 1), total)


@triton.jit
def beyond(u, total):
    """The least integer that is more than `u` (float64, below 1) of `total` (int64)."""
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1) + 1


@triton.jit
def uniform(wide, row):
    """Philox(seed, turn, k) as in engine.philox: float64 below 1, 53 random bits."""
    seed = tl.load(wide + row * WIDE_WORDS + SEED)
    turn = tl.load(wide + row * WIDE_WORDS + TURN)
    k = tl.load(wide + row * WIDE_WORDS + K)
    high, low, _, _ = tl.philox(
        seed,
        k.to(tl.uint32),
        (k >> 32).to(tl.uint32),
        turn.to(tl.uint32),
        (turn >> 32).to(tl.uint32),
    )
    bits = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * (2.0**-53)
