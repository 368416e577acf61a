"""Philox4x32-10: random numbers as a pure function of (key, counter), the same on every machine.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3; constants
and known answers from the authors' Random123 library.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Four 32-bit words from a 128-bit counter and a 64-bit key, each as 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, turn: int, k: int) -> float:
    """The random number of output token `k` of turn `turn`, 0 <= u < 1 with 53 random bits.

    `seed`, `turn` and `k` are taken modulo 2**64. Counter words: k low, k high, turn low, turn high.
    """
    counter = (k & _MASK, k >> 32 & _MASK, turn & _MASK, turn >> 32 & _MASK)
    high, low, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    return ((high << 32 | low) >> 11) * 2.0**-53
