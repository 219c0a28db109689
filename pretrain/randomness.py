"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A number is a pure function of a key (seed, purpose) and a counter (which epoch, document, token), so it is the same
whatever process asks for it and in whatever order. Vectorised over counters; no generator is built or stored.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import ArrayLike

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Purpose(enum.IntEnum):
    """Second word of the key: streams of different purposes are independent."""

    PIECE_ORDER = 1
    MASK_CHOICE = 2
    MASK_REPLACEMENT = 3
    PROBE = 4
    SPAN_LENGTH = 5
    PAIRS = 6


def philox4x32(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> np.ndarray:
    """Four random words for each counter.

    counter: four words of 32 bits, arrays that broadcast to (N,). key: two words. Returns (4, N) uint64 holding words
    of 32 bits, bit for bit those of the Random123 library.
    """
    words = np.broadcast_arrays(*(np.atleast_1d(np.asarray(word, dtype=np.uint64)) for word in counter))
    c0, c1, c2, c3 = (word & _LOW for word in words)
    k0, k1 = (int(word) & 0xFFFFFFFF for word in key)
    product0, product2 = np.empty_like(c0), np.empty_like(c2)
    for _ in range(10):
        np.multiply(c0, _MULTIPLIERS[0], out=product0)
        np.multiply(c2, _MULTIPLIERS[1], out=product2)
        np.right_shift(product2, _32, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.bitwise_and(product2, _LOW, out=c1)
        np.right_shift(product0, _32, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(product0, _LOW, out=c3)
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from words of 32 bits."""
    return words * 2.0**-32
