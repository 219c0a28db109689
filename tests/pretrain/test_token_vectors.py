"""Token vectors from counts, against counting by hand and dense linear algebra."""

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.pretrain import token_vectors
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.token_vectors import (
    RMS,
    WINDOW,
    cooccurrence_vectors,
    cooccurrences,
    positive_information,
    start_from_counts,
)


class Documents:
    """A store's documents and counts, from lists of token ids."""

    def __init__(self, documents: list[list[int]], vocab_size: int) -> None:
        self._documents = [np.array(tokens, dtype=np.uint16) for tokens in documents]
        self.vocab_size, self.num_documents = vocab_size, len(documents)
        self.document_lengths = np.array([len(tokens) for tokens in documents])
        self.num_tokens = int(self.document_lengths.sum())
        self.unigram_counts = np.bincount(np.concatenate(self._documents), minlength=vocab_size)

    def tokens(self, document: int) -> np.ndarray:
        return self._documents[document]


def counted_by_hand(documents: list[list[int]], vocab_size: int) -> np.ndarray:
    counts = np.zeros((vocab_size, vocab_size))
    for tokens in documents:
        for i, a in enumerate(tokens):
            for j, b in enumerate(tokens):
                if 0 < abs(i - j) <= WINDOW:
                    counts[a, b] += 1 / abs(i - j)
    return counts


def random_documents(seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = [1, 2, 3, 60, 7, 31, 0, 18]
    return [generator.integers(0, 12, length).tolist() for length in lengths]


@pytest.mark.parametrize("chunk_tokens", [1 << 22, 20])
def test_neighbours_are_counted_within_documents(chunk_tokens, monkeypatch):
    monkeypatch.setattr(token_vectors, "_CHUNK_TOKENS", chunk_tokens)
    documents = random_documents()
    found = cooccurrences(Documents(documents, 12)).toarray()
    np.testing.assert_allclose(found, counted_by_hand(documents, 12), rtol=1e-5)


def test_a_large_store_is_sampled_by_document(monkeypatch):
    monkeypatch.setattr(token_vectors, "MAX_TOKENS", 61)  # of 122 tokens
    documents = random_documents()
    found = cooccurrences(Documents(documents, 12)).toarray()
    np.testing.assert_allclose(found, counted_by_hand(documents[::2], 12), rtol=1e-5)


def test_information_is_the_smoothed_formula_of_levy_2015():
    counts = counted_by_hand(random_documents(), 12)
    p, total = counts.sum(1), counts.sum()
    smooth = p**0.75 / (p**0.75).sum()
    with np.errstate(divide="ignore"):
        expected = np.maximum(np.log((counts / total) / np.outer(p / total, smooth)), 0)
    found = positive_information(sparse.csr_array(counts)).toarray()
    np.testing.assert_allclose(found, (expected + expected.T) / 2, atol=1e-5)


def test_factors_are_those_of_the_dense_matrix():
    generator = np.random.default_rng(0)
    half = generator.normal(size=(40, 6)) * 3.0 ** -np.arange(6)
    dense = half @ half.T
    factors = token_vectors._leading_factors(sparse.csr_array(dense.astype(np.float32)), 4).double().numpy()
    values, directions = np.linalg.eigh(dense)
    expected = directions[:, -4:] * np.sqrt(values[-4:])
    np.testing.assert_allclose(factors @ factors.T, expected @ expected.T, atol=1e-4 * values[-1])


def test_words_with_the_same_company_get_similar_vectors():
    """Types 1 and 2 stand between 5 and 6, types 3 and 4 between 7 and 8."""
    generator = np.random.default_rng(1)
    phrases = [[5, 1, 6], [5, 2, 6], [7, 3, 8], [7, 4, 8]]
    chosen = [generator.integers(0, 2, 50) + 2 * (n % 2) for n in range(40)]
    documents = [[token for i in order for token in phrases[i]] for order in chosen]
    vectors = cooccurrence_vectors(Documents(documents, 10), 8)
    similar = vectors @ vectors.T / (8 * RMS**2)
    assert similar[1, 2] > 0.9
    assert similar[3, 4] > 0.9
    assert similar[1, 3] < 0.1
    assert vectors[[0, 9]].abs().sum() == 0
    torch.testing.assert_close(vectors[1:9].square().mean(1).sqrt(), torch.full((8,), RMS))


def test_a_model_begins_at_the_vectors_and_the_unigram(small_store):
    store = Store.open(small_store)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    model = MaskedLM(preset("modern", "tiny", vocab_size=store.vocab_size, **sizes))
    before = model.encoder.embeddings.tokens.weight.detach().clone()
    start_from_counts(model, store)
    table, vectors = model.encoder.embeddings.tokens.weight, cooccurrence_vectors(store, 32)
    V = store.vocab_size
    seen = vectors.abs().sum(1) > 0
    assert 0 < seen.sum() < V
    assert torch.equal(table[:V][seen], vectors[seen])
    torch.testing.assert_close(table[:V][~seen], before[:V][~seen] * RMS / 0.02)
    assert torch.equal(table[V:], before[V:])
    assert float(model.decoder_bias.exp().sum().detach()) == pytest.approx(1)
    commonest = int(store.unigram_counts.argmax())
    share = (store.unigram_counts[commonest] + 1) / (store.num_tokens + V)
    assert float(model.decoder_bias[commonest].detach()) == pytest.approx(math.log(share), rel=1e-5)


def test_positions_and_token_types_grow_with_the_tokens(small_store):
    store = Store.open(small_store)
    model = MaskedLM(preset("bert", "tiny", vocab_size=store.vocab_size, hidden_size=32, num_layers=1, num_heads=4))
    added = model.encoder.positions.table.weight, model.encoder.embeddings.token_types.weight
    before = [table.detach().clone() for table in added]
    start_from_counts(model, store)
    for table, was in zip(added, before):
        torch.testing.assert_close(table, was * RMS / 0.02)


def test_vectors_have_no_common_direction():
    """Uncentred ones of these documents have a mean of 0.5 of their length."""
    vectors = cooccurrence_vectors(Documents(random_documents(), 12), 8)
    assert vectors.mean(0).norm() < 0.1 * vectors.norm(dim=1).mean()
