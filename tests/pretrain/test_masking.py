"""Which tokens are masked: rates, splits, what is never touched, and independence of the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.masking import SPAN_WORDS, Pieces, mask_rows, most_targets, span_lengths, span_starts
from encoderkit.pretrain.schedule import mask_rate
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


@pytest.mark.parametrize(("select", "spread", "correlated"), [("token", 0.5, 1), ("word", 2.0, 1), ("span", 2.0, 22)])
def test_rate_and_split_are_within_four_sigma_on_240k_tokens(select, spread, correlated):
    ids, pieces = make([126] * 2000, ordinary_only=True)
    masked = mask(ids, pieces, rate=0.15, preset="bert", select=select)
    maskable = int(TOKENS.is_ordinary[ids].sum())
    # The count of each piece is floor(rate n + u), with sigma at most 1/2, and a crossing word, with half its length.
    assert abs(len(masked.targets) - 0.15 * maskable) < 4 * np.sqrt(2000) * spread
    new = masked.input_ids[masked.positions]
    n = len(new)
    for share, hits in (
        (0.8, (new == TOKENS.mask).sum()),
        (0.1, ((new != TOKENS.mask) & (new != masked.targets)).sum()),
    ):
        # Spans are replaced as one: a token goes with E[n^2] / E[n] others, of spans of n words of up to four tokens.
        assert abs(hits - share * n) < 4 * np.sqrt(share * (1 - share) * n * correlated)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([("token", 0.5, 1), ("word", 2.0, 1), ("span", 2.0, 22)]),
    st.floats(0.1, 0.9),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 1000),
)
def test_any_rate_and_split_are_within_five_sigma(how, rate, mask_share, of_rest, seed, epoch):
    """Five, as some of hundreds of draws are beyond four; sigmas as above."""
    select, spread, correlated = how
    random_share = of_rest * (1 - mask_share)
    ids, pieces = make([126] * 50, seed=seed % 1000, epoch=epoch, ordinary_only=True)
    masked = mask(ids, pieces, rate, seed, select=select, mask_share=mask_share, random_share=random_share)
    assert abs(len(masked.targets) - rate * 124 * 50) < 5 * np.sqrt(50) * spread
    new = masked.input_ids[masked.positions]
    n = len(new)
    for share, hits in (
        (mask_share, (new == TOKENS.mask).sum()),
        (random_share, ((new != TOKENS.mask) & (new != masked.targets)).sum()),
    ):
        # A random token is the one that stood there once in 700 times; of few hits the distribution has a long end.
        few = share * n / 700 + 5 * correlated
        assert abs(hits - share * n) < 5 * np.sqrt(share * (1 - share) * n * correlated) + few


@pytest.mark.parametrize("select", ["word", "span"])
def test_a_span_is_replaced_as_one_and_a_word_token_by_token(select):
    ids, pieces = make([126] * 2000, ordinary_only=True)
    starts = np.ones(len(ids), bool)
    starts[2::126] = starts[3::126] = False  # a word of three tokens begins each piece
    split = {"mask_share": 0.4, "random_share": 0.3, "select": select}
    masked = mask_rows(ids, pieces, rate=0.3, seed=0, masking=Masking(**split), tokens=TOKENS, word_starts=starts)
    new = masked.input_ids[masked.positions]
    kind = np.where(new == TOKENS.mask, 0, np.where(new == masked.targets, 2, 1))
    kinds = dict(zip(masked.positions.tolist(), kind.tolist()))
    words = [[kinds[p + i] for i in (1, 2, 3)] for p in range(0, len(ids), 126) if p + 1 in kinds]
    same = np.mean([len(set(word)) == 1 for word in words])
    assert len(words) > 400
    # A random token is the one that stood there once in 700 times.
    expected, tolerance = (1, 0.02) if select == "span" else (0.4**3 + 2 * 0.3**3, 0.07)
    assert same == pytest.approx(expected, abs=tolerance)


def test_neighbouring_spans_are_replaced_each_for_itself():
    ids, pieces = make([126] * 2000, ordinary_only=True)
    starts = np.ones(len(ids), bool)
    split = {"mask_share": 0.5, "random_share": 0.0, "select": "span"}
    masked = mask_rows(ids, pieces, rate=0.9, seed=0, masking=Masking(**split), tokens=TOKENS, word_starts=starts)
    is_mask = masked.input_ids[masked.positions] == TOKENS.mask
    neighbours = np.diff(masked.positions) == 1
    changes = np.mean(is_mask[1:][neighbours] != is_mask[:-1][neighbours])
    # Of neighbours, 1 in 3.8 begins another span, which differs half of the time; pieces cut their last span short.
    assert changes == pytest.approx(0.5 / 3.8, rel=0.1)


def test_a_preset_is_replaced_field_by_field():
    plain, bert = Masking(), Masking(preset="bert")
    assert (plain.start_rate, plain.shares) == (0.3, (1.0, 0.0))
    assert (bert.start_rate, bert.shares) == (0.15, (0.8, 0.1))
    assert Masking(preset="bert", rate=0.3).start_rate == 0.3
    assert Masking(preset="bert", random_share=0.0).shares == (0.8, 0.0)
    with pytest.raises(InputError, match="over 1"):
        Masking(preset="bert", random_share=0.3)
    ids, pieces = make([126] * 20)
    written_out = mask(ids, pieces, rate=0.15, mask_share=0.8, random_share=0.1)
    assert (mask(ids, pieces, rate=mask_rate(bert, 0.5), preset="bert").input_ids == written_out.input_ids).all()


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
