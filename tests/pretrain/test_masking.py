"""Which tokens are masked: rates, splits, what is never touched, and independence of the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.pretrain.masking import Pieces, mask_rows, most_targets
from encoderkit.pretrain.settings import Masking
from encoderkit.pretrain.tokenizer import TokenIds

VOCAB = 1000
TOKENS = TokenIds(VOCAB, 0, 2, 3, 4, np.setdiff1d(np.arange(5, VOCAB), [700, 701]))  # 700, 701: unused; 1: unknown


def make(lengths, *, seed=0, epoch=0, ordinary_only=False):
    """Pieces [CLS] ... [SEP] of random ids, unknown and unused ones among them."""
    rng = np.random.default_rng(seed)
    parts = []
    for length in lengths:
        low = 5 if ordinary_only else 1
        inside = rng.choice(np.setdiff1d(np.arange(low, 700), [2, 3, 4]) if low == 1 else TOKENS.ordinary, length - 2)
        parts.append([2, *inside, 3])
    n = len(lengths)
    pieces = Pieces(np.array(lengths), np.full(n, epoch), np.arange(n) // 3, (np.arange(n) % 3) * 126)
    return np.concatenate(parts).astype(np.int64), pieces


def mask(ids, pieces, rate=0.3, seed=0, **split):
    return mask_rows(ids, pieces, rate=rate, seed=seed, masking=Masking(**split), tokens=TOKENS)


def test_rate_and_split_are_within_four_sigma_on_240k_tokens():
    ids, pieces = make([126] * 2000, ordinary_only=True)
    masked = mask(ids, pieces, rate=0.15, mask_share=0.8, random_share=0.1)
    maskable = int(TOKENS.is_ordinary[ids].sum())
    # The count of each piece is floor(rate n + u): its spread is below 1/2, so sigma is at most sqrt(pieces) / 2.
    assert abs(len(masked.targets) - 0.15 * maskable) < 4 * np.sqrt(2000) / 2
    new = masked.input_ids[masked.positions]
    n = len(new)
    for share, hits in (
        (0.8, (new == TOKENS.mask).sum()),
        (0.1, ((new != TOKENS.mask) & (new != masked.targets)).sum()),
    ):
        assert abs(hits - share * n) < 4 * np.sqrt(share * (1 - share) * n)


def test_positions_are_selected_evenly():
    ids, pieces = make([66] * 3000, ordinary_only=True)
    hits = np.bincount(mask(ids, pieces).positions % 66, minlength=66)[1:65]
    # Each of 64 places is hit 900 times, sigma at most 25; 5 sigma over 64 places.
    assert np.abs(hits - 900).max() < 125


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=30),
    st.floats(0.01, 0.9),
    st.integers(0, 2**32 - 1),
    st.integers(0, 1000),
)
def test_special_ids_are_never_selected_nor_inserted_and_each_piece_has_a_target(lengths, rate, seed, epoch):
    ids, pieces = make(lengths, seed=seed % 1000, epoch=epoch)
    masked = mask(ids, pieces, rate=rate, seed=seed, mask_share=0.3, random_share=0.6)
    assert TOKENS.is_ordinary[masked.targets].all()
    assert (masked.targets == ids[masked.positions]).all()
    inserted = masked.input_ids[masked.positions]
    assert (TOKENS.is_ordinary[inserted] | (inserted == TOKENS.mask)).all()
    untouched = np.ones(len(ids), bool)
    untouched[masked.positions] = False
    assert (masked.input_ids[untouched] == ids[untouched]).all()
    assert (np.diff(masked.positions) > 0).all()
    start = 0
    for length, count in zip(lengths, masked.counts):
        available = int(TOKENS.is_ordinary[ids[start : start + length]].sum())
        assert ((masked.positions >= start) & (masked.positions < start + length)).sum() == count
        assert count in (0 if not available else max(1, int(rate * available)), int(rate * available) + 1)
        start += length


def test_a_piece_is_masked_the_same_in_any_batch():
    lengths = [30, 128, 3, 77, 64]
    ids, pieces = make(lengths)
    together = mask(ids, pieces, mask_share=0.8, random_share=0.1)
    start = 0
    for i, length in enumerate(lengths):
        one = Pieces(*(part[i : i + 1] for part in (pieces.lengths, pieces.epoch, pieces.document, pieces.start)))
        alone = mask(ids[start : start + length], one, mask_share=0.8, random_share=0.1)
        assert (alone.input_ids == together.input_ids[start : start + length]).all()
        start += length


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_give_other_masks(change):
    ids, pieces = make([128] * 20)
    _, other = make([128] * 20, epoch=change.get("epoch", 0))
    first = set(mask(ids, pieces).positions.tolist())
    second = set(mask(ids, other, seed=change.get("seed", 0)).positions.tolist())
    assert len(first & second) < 0.5 * len(first)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=30), st.floats(0.01, 0.9), st.integers(0, 10))
def test_a_row_never_has_more_targets_than_its_bound(lengths, rate, seed):
    ids, pieces = make(lengths, ordinary_only=True)
    found = len(mask(ids, pieces, rate=rate, seed=seed).targets)
    assert found <= most_targets(rate, sum(lengths), len(lengths))
