"""The order of rows: nothing lost, nothing twice, and a pure function of seed and row number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.order import Order, padded_length

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=60).filter(any)
SIZES = st.tuples(st.integers(3, 64), st.integers(0, 100)).map(lambda pair: (pair[0], pair[0] + pair[1]))


GOLDEN = [[(4, 0), (0, 0), (2, 8)], [(3, 0), (2, 0)], [(4, 16), (4, 8)], [(0, 0), (2, 0), (2, 8)]]


def tokens_of(rows):
    """Every (document, token) of some rows."""
    return [
        (int(d), token)
        for row in rows
        for d, start, stop in zip(row.document, row.start, row.stop)
        for token in range(start, stop)
    ]


@settings(max_examples=500, deadline=None)
@given(LENGTHS, SIZES, st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_every_token_is_in_exactly_one_row_of_an_epoch(lengths, sizes, seed, epoch):
    max_tokens, row_tokens = sizes
    order = Order(lengths, seed=seed, max_tokens=max_tokens, row_tokens=row_tokens)
    before = sum(len(order.epoch(e)) for e in range(epoch))
    rows = order.rows(before, len(order.epoch(epoch)))
    assert {row.epoch for row in rows} == {epoch}
    assert sorted(tokens_of(rows)) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    for row in rows:
        assert 0 < row.num_tokens <= row_tokens
        assert 0 < len(row.document) <= order.max_pieces
        assert (row.stop - row.start + 2 <= max_tokens).all()


@settings(max_examples=500, deadline=None)
@given(LENGTHS, st.integers(8, 64), st.integers(3, 64), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_rows_cut_again_keep_every_token_and_have_room(lengths, max_tokens, shortest, more, seed):
    shortest = min(shortest, max_tokens)
    row_tokens = 3 * max_tokens + more
    order = Order(lengths, seed=seed, max_tokens=max_tokens, row_tokens=row_tokens, shortest=shortest)
    for row in order.rows(0, len(order.epoch(0))):
        for length in {shortest, (shortest + max_tokens) // 2, max_tokens}:
            cut = row.cut(length)
            assert tokens_of([cut]) == tokens_of([row])
            assert (cut.lengths <= length).all()
            assert (cut.lengths > 2).all()
            assert cut.num_tokens <= row_tokens
    assert sorted(tokens_of(order.rows(0, len(order.epoch(0))))) == [
        (d, t) for d, n in enumerate(lengths) for t in range(n)
    ]


def test_cut_again_in_equal_parts():
    order = Order([500], seed=0, max_tokens=512, row_tokens=1024, shortest=128)
    assert order.rows(0, 1)[0].cut(128).lengths.tolist() == [127] * 4
    assert order.rows(0, 1)[0].cut(112).lengths.tolist() == [102] * 5


def test_long_documents_fill_rows_that_are_cut_again():
    """Pieces with room for the special tokens of the shortest sequences are no longer than max_tokens."""
    order = Order([100_000], seed=0, max_tokens=512, row_tokens=1024, shortest=128)
    assert len(order.epoch(0)) == 100
    assert order.rows(0, 1)[0].cut(128).num_tokens == 1024


@settings(max_examples=500, deadline=None)
@given(LENGTHS, SIZES, st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_padded_rows_hold_every_token_once_and_one_length(lengths, sizes, seed, epoch):
    max_tokens, row_tokens = sizes
    order = Order(lengths, seed=seed, max_tokens=max_tokens, row_tokens=row_tokens, layout="padded")
    before = sum(len(order.epoch(e)) for e in range(epoch))
    rows = order.rows(before, len(order.epoch(epoch)))
    assert sorted(tokens_of(rows)) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    unfilled = set()
    for row in rows:
        (padded,) = set(padded_length(row.lengths, max_tokens).tolist())
        assert 0 < len(row.start) <= row_tokens // padded <= order.max_pieces
        if len(row.start) < row_tokens // padded:
            assert padded not in unfilled
            unfilled.add(padded)


def test_padded_rows_of_all_lengths_are_mixed():
    lengths = np.random.default_rng(0).integers(1, 127, 4000)
    order = Order(lengths, seed=0, max_tokens=128, row_tokens=1024, layout="padded")
    rows = order.rows(0, len(order.epoch(0)))
    padded = [int(padded_length(row.lengths, 128)[0]) for row in rows]
    for part in (padded[:40], padded[len(padded) // 2 :][:40]):
        assert set(part) == {32, 64, 96, 128}


@settings(max_examples=500, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 10))
def test_rows_do_not_depend_on_what_was_asked_before(lengths, seed, first, count):
    def fresh():
        return Order(lengths, seed=seed, max_tokens=32, row_tokens=64)

    walked = fresh()
    walked.rows(0, first + count)
    direct = fresh().rows(first, count)
    again = [walked.rows(row, 1)[0] for row in range(first, first + count)]
    for a, b in zip(direct, again):
        assert (a.epoch, tokens_of([a])) == (b.epoch, tokens_of([b]))
        assert a.document.tolist() == b.document.tolist()


def test_epochs_and_seeds_differ_and_epoch_of_follows_the_stream():
    lengths = np.full(500, 40)
    order = Order(lengths, seed=1, max_tokens=64, row_tokens=256)
    rows = len(order.epoch(0))
    assert order.epoch(0).pieces.tolist() != order.epoch(1).pieces.tolist()
    other = Order(lengths, seed=2, max_tokens=64, row_tokens=256)
    assert order.epoch(0).pieces.tolist() != other.epoch(0).pieces.tolist()
    assert [order.rows(row, 1)[0].epoch for row in (0, rows - 1, rows)] == [0, 0, 1]


def test_golden_order():
    # Guards the promise that a seed means the same rows in every version of numpy and of this library.
    order = Order([5, 0, 13, 8, 21], seed=3, max_tokens=10, row_tokens=24)
    found = [list(zip(row.document.tolist(), row.start.tolist())) for row in order.rows(0, 4)]
    assert found == GOLDEN


def test_going_on_plans_one_epoch_however_many_went_before(monkeypatch):
    import encoderkit.pretrain.order as module

    def fresh():
        return Order(np.arange(1, 90), seed=3, max_tokens=32, row_tokens=64)

    first, second = fresh(), fresh()
    row = 10 * len(first.epoch(0))
    expected = first.rows(row, 1)[0]
    planned = []
    real = module.pack_rows
    monkeypatch.setattr(module, "pack_rows", lambda *arguments: planned.append(1) or real(*arguments))
    second.ends = list(first.ends)
    found = second.rows(row, 1)[0]
    assert len(planned) == 1
    assert (found.epoch, found.start.tolist()) == (expected.epoch, expected.start.tolist())
    assert found.epoch >= 8


@pytest.mark.parametrize(("max_tokens", "row_tokens"), [(128, 1024), (512, 1024), (512, 4096)])
@pytest.mark.parametrize(("mean", "sigma"), [(4.5, 1.2), (3.0, 0.8), (7.5, 0.5)])
def test_rows_are_full_on_realistic_lengths(mean, sigma, max_tokens, row_tokens):
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(mean, sigma, 20_000)).astype(int)
    order = Order(lengths, seed=0, max_tokens=max_tokens, row_tokens=row_tokens)
    plan = order.epoch(0)
    fill = (lengths.sum() + 2 * order.num_pieces) / (len(plan) * row_tokens)
    assert fill >= 0.98


@pytest.mark.parametrize(("mean", "sigma"), [(4.5, 1.2), (3.0, 0.8), (7.5, 0.5)])
def test_rows_are_nearly_full_with_room_for_shorter_sequences(mean, sigma):
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(mean, sigma, 20_000)).astype(int)
    order = Order(lengths, seed=0, max_tokens=512, row_tokens=4096, shortest=128)
    fill = (lengths.sum() + 2 * order.num_pieces) / (len(order.epoch(0)) * 4096)
    assert fill >= 0.97  # 6 tokens of 512 are kept free


def test_a_batch_holds_pieces_of_many_documents():
    # Long documents give 20 pieces each; shuffled pieces keep them apart.
    order = Order(np.full(200, 126 * 20), seed=0, max_tokens=128, row_tokens=1024)
    row = order.rows(0, 1)[0]
    assert len(set(row.document.tolist())) >= 6


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "row_tokens", "message"),
    [([0, 0], 8, 16, "documents without tokens"), ([5], 2, 16, "max_tokens"), ([5], 32, 16, "row_tokens")],
)
def test_what_cannot_be_ordered_is_refused(lengths, max_tokens, row_tokens, message):
    with pytest.raises(InputError, match=message):
        Order(lengths, seed=0, max_tokens=max_tokens, row_tokens=row_tokens)
