"""Philox against the known answers of the Random123 library (tests/kat_vectors), and as a stream of random bits."""

import numpy as np
import pytest

from encoderkit.pretrain.randomness import philox4x32, uniform

ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert [f"{int(word):08x}" for word in philox4x32(counter, key)[:, 0]] == answer.split()


def test_arrays_give_what_single_counters_give():
    places = np.arange(100)
    together = philox4x32((places, 7, places * 3, 1), (5, 2))
    for place in (0, 41, 99):
        alone = philox4x32((place, 7, place * 3, 1), (5, 2))
        assert (together[:, place] == alone[:, 0]).all()


def test_words_are_uniform_and_keys_independent():
    # 200,000 words: mean 1/2 within 4 sigma (sigma = 1 / sqrt(12 n)), and two keys agree no more than chance.
    places = np.arange(50_000)
    values = uniform(philox4x32((places, 0, 0, 0), (1, 1)))
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 4 / np.sqrt(12 * values.size)
    other = uniform(philox4x32((places, 0, 0, 0), (2, 1)))
    assert abs(np.corrcoef(values.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(values.size)
