"""Philox4x32-10: 128 random bits from a counter and a key, in any order and all at once.

source      Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3
checked by  tests/unit/test_noise.py (the paper's own known answers, from its Random123)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # each below 2^32; in 64 bits, so that a product keeps its upper half

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85  # what the key grows by in each round
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> list[Words]:
    """Four words for each counter.

    counter     four arrays, lowest word first, that broadcast against each other
    key         two words of 32 bits, lowest first
    """
    a, b, c, d = counter
    for turn in range(ROUNDS):
        low, high = (np.uint64((k + turn * w) & int(LOW)) for k, w in zip(key, WEYL, strict=True))
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b = (second >> HALF) ^ b ^ low, second & LOW
        c, d = (first >> HALF) ^ d ^ high, first & LOW
    return [a, b, c, d]
