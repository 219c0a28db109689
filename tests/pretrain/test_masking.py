"""Which tokens are masked: rates, splits, what is never touched, and independence of the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.pretrain.masking import SPAN_WORDS, Pieces, mask_rows, most_targets, span_lengths, span_starts
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
    masking, starts = Masking(**split), word_starts(ids)
    return mask_rows(ids, pieces, rate=rate, seed=seed, masking=masking, tokens=TOKENS, word_starts=starts)


def word_starts(ids):
    """Words of one to four tokens, by the ids alone, so that a token is the same in any batch."""
    return (ids % 5 < 3) | (ids < 5) | np.append(True, ids[:-1] < 5)


def words_of(ids):
    """(T,) the word of each token; special and unknown ids stand alone."""
    return np.cumsum(word_starts(ids))


@pytest.mark.parametrize(("select", "spread"), [("token", 0.5), ("word", 2.0), ("span", 2.0)])
def test_rate_and_split_are_within_four_sigma_on_240k_tokens(select, spread):
    ids, pieces = make([126] * 2000, ordinary_only=True)
    masked = mask(ids, pieces, rate=0.15, mask_share=0.8, random_share=0.1, select=select)
    maskable = int(TOKENS.is_ordinary[ids].sum())
    # The count of each piece is floor(rate n + u), with sigma at most 1/2, and a crossing word, with half its length.
    assert abs(len(masked.targets) - 0.15 * maskable) < 4 * np.sqrt(2000) * spread
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
    st.sampled_from(["token", "word", "span"]),
)
def test_special_ids_are_never_selected_nor_inserted_and_each_piece_has_a_target(lengths, rate, seed, epoch, select):
    ids, pieces = make(lengths, seed=seed % 1000, epoch=epoch)
    masked = mask(ids, pieces, rate=rate, seed=seed, mask_share=0.3, random_share=0.6, select=select)
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
        assert bool(count) == bool(available)
        if select == "token":
            assert count in (0 if not available else max(1, int(rate * available)), int(rate * available) + 1)
        start += length


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=30),
    st.floats(0.01, 0.9),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["word", "span"]),
)
def test_words_are_masked_whole(lengths, rate, seed, select):
    ids, pieces = make(lengths, seed=seed % 1000, ordinary_only=True)
    masked = mask(ids, pieces, rate=rate, seed=seed, select=select)
    word = words_of(ids)
    assert np.isin(word, word[masked.positions]).sum() == len(masked.positions)


def test_a_word_longer_than_the_bound_is_masked_in_parts():
    ids = np.concatenate([[2], np.full(100, 9), [3]]).astype(np.int64)  # one word of 100 tokens
    pieces = Pieces(np.array([102]), np.array([0]), np.array([0]), np.array([0]))
    starts = np.ones(102, bool)
    starts[2:101] = False
    masking = Masking(select="word")
    masked = mask_rows(ids, pieces, rate=0.3, seed=0, masking=masking, tokens=TOKENS, word_starts=starts)
    assert 0 < len(masked.targets) <= most_targets(0.3, 102, 1, "word") < 60


def test_spans_are_geometric_of_at_most_ten_words():
    lengths = span_lengths(np.random.default_rng(0).random(100_000))
    shares = 0.8 ** np.arange(SPAN_WORDS)
    shares /= shares.sum()
    found = np.bincount(lengths, minlength=SPAN_WORDS + 1)[1:]
    assert len(found) == SPAN_WORDS
    assert (np.abs(found - 1e5 * shares) < 4 * np.sqrt(1e5 * shares * (1 - shares))).all()
    assert abs(lengths.mean() - 3.8) < 0.05  # Joshi et al. 2020
    # The words of each piece are cut into spans of these lengths, the last one of a piece into what is left.
    starts = np.flatnonzero(span_starts(lengths, np.array([400, 0, 99_600])))
    assert 400 in starts
    cut = np.diff(starts[starts < 400])
    assert (cut == lengths[: len(cut)]).all()
    cut = np.diff(starts[starts >= 400])
    assert (cut == lengths[400 : 400 + len(cut)]).all()


def test_spans_are_masked_in_runs():
    ids, pieces = make([1026] * 40, ordinary_only=True)  # long pieces, of which few spans are cut
    runs = {}
    for select in ("word", "span"):
        words = np.unique(words_of(ids)[mask(ids, pieces, rate=0.15, select=select).positions])
        runs[select] = len(words) / (1 + (np.diff(words) > 1).sum())
    # A span is followed by another with the rate's probability.
    assert runs["word"] == pytest.approx(1 / 0.85, rel=0.1)
    assert runs["span"] == pytest.approx(3.8 / 0.85, rel=0.15)


def test_selecting_words_asks_for_their_starts():
    ids, pieces = make([10])
    with pytest.raises(ValueError, match="needs word_starts"):
        mask_rows(ids, pieces, rate=0.3, seed=0, masking=Masking(select="word"), tokens=TOKENS)


@pytest.mark.parametrize("select", ["token", "word", "span"])
def test_a_piece_is_masked_the_same_in_any_batch(select):
    lengths = [30, 128, 3, 77, 64]
    ids, pieces = make(lengths)
    together = mask(ids, pieces, mask_share=0.8, random_share=0.1, select=select)
    start = 0
    for i, length in enumerate(lengths):
        one = Pieces(*(part[i : i + 1] for part in (pieces.lengths, pieces.epoch, pieces.document, pieces.start)))
        alone = mask(ids[start : start + length], one, mask_share=0.8, random_share=0.1, select=select)
        assert (alone.input_ids == together.input_ids[start : start + length]).all()
        start += length


@pytest.mark.parametrize("select", ["token", "word", "span"])
@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_give_other_masks(change, select):
    ids, pieces = make([128] * 20)
    _, other = make([128] * 20, epoch=change.get("epoch", 0))
    first = set(mask(ids, pieces, select=select).positions.tolist())
    second = set(mask(ids, other, seed=change.get("seed", 0), select=select).positions.tolist())
    assert len(first & second) < 0.5 * len(first)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(3, 40), min_size=1, max_size=30),
    st.floats(0.01, 0.9),
    st.integers(0, 10),
    st.sampled_from(["token", "word", "span"]),
)
def test_a_row_never_has_more_targets_than_its_bound(lengths, rate, seed, select):
    ids, pieces = make(lengths, ordinary_only=True)
    found = len(mask(ids, pieces, rate=rate, seed=seed, select=select).targets)
    assert found <= most_targets(rate, sum(lengths), len(lengths), select)
