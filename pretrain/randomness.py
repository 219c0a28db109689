"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A number is a pure function of a key (seed, purpose) and a counter (which epoch, document, token), so it is the same
whatever process asks for it and in whatever order. Vectorised over counters; no generator is built or stored.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import ArrayLike

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
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
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(word, dtype=np.uint64)) for word in counter))
    evens = np.stack([c0, c2]) & _LOW  # the two words that are multiplied
    odds = np.stack([c3, c1]) & _LOW  # the two words that the other product is mixed into
    k0, k1 = (int(word) & 0xFFFFFFFF for word in key)
    product = np.empty_like(evens)
    for _ in range(10):
        np.multiply(evens, _MULTIPLIERS, out=product)
        high = product >> _32
        # c0' = high(M1 c2) ^ c1 ^ k0; c1' = low(M1 c2); c2' = high(M0 c0) ^ c3 ^ k1; c3' = low(M0 c0)
        evens[0] = high[1] ^ odds[1] ^ np.uint64(k0)
        evens[1] = high[0] ^ odds[0] ^ np.uint64(k1)
        np.bitwise_and(product, _LOW, out=odds)
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([evens[0], odds[1], evens[1], odds[0]])


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from words of 32 bits."""
    return words * 2.0**-32
