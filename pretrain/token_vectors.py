"""Token vectors from co-occurrence counts, to begin training with.

Words that keep the same company get similar vectors, counted in seconds; gradient descent takes millions of tokens to
find the same. The vectors are the leading factors of the positive pointwise mutual information of neighbouring tokens
(Levy and Goldberg 2014, "Neural word embedding as implicit matrix factorization"; counts and smoothing as in Levy,
Goldberg and Dagan 2015, "Improving distributional similarity"). The decoder's bias begins at the unigram.

V vocabulary, D hidden size
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from encoderkit.encoder.model import MaskedLM
from encoderkit.pretrain.store import Store

WINDOW = 4  # neighbours to each side; the one at distance d counts 1 / d
SMOOTHING = 0.75  # exponent of the neighbours' frequencies
MAX_TOKENS = 1 << 25  # counted, so that time and memory are bounded; of a larger store, documents at equal distances
RMS = 0.1  # of the vectors' coordinates
_OVERSAMPLED, _ITERATIONS = 64, 3  # of the subspace iteration
_CHUNK_TOKENS = 1 << 22


@torch.no_grad()
def start_from_counts(model: MaskedLM, store: Store) -> None:
    """Set the token table to co-occurrence vectors and the decoder's bias to the unigram, in place.

    Types without a vector, such as [MASK], keep their random direction, at the same size. What is added to the tokens,
    learned positions and token types, grows in proportion: else it would hardly be seen beside them.
    """
    V, D = model.config.vocab_size, model.config.hidden_size
    vectors_VD = cooccurrence_vectors(store, D).to(model.encoder.embeddings.tokens.weight.device)
    rows_VD = model.encoder.embeddings.tokens.weight[:V]
    seen_V1 = (vectors_VD != 0).any(1, keepdim=True)
    rows_VD.copy_(torch.where(seen_V1, vectors_VD, rows_VD * (RMS / model.config.init_std)))
    for added in (model.encoder.positions, model.encoder.embeddings.token_types):
        for table in [] if added is None else added.parameters():
            table.mul_(RMS / model.config.init_std)
    if model.decoder_bias is not None:
        model.decoder_bias.copy_(unigram_bias(store))


def unigram_bias(store: Store) -> Tensor:
    """(V,) log of each type's share of the store, one more counted of each."""
    shares_V = torch.from_numpy(store.unigram_counts + 1.0)
    return (shares_V / shares_V.sum()).log().float()


def cooccurrence_vectors(store: Store, size: int) -> Tensor:
    """(V, size) fp32 vectors of one length, so that the root mean square of their coordinates is RMS.

    Zero where a type has no neighbour more often than chance. One length learns faster than those of the factors,
    which grow with frequency (pretrain/recipes).
    """
    information = positive_information(cooccurrences(store))
    vectors = _leading_factors(information, min(size, information.shape[0]))
    seen = torch.from_numpy(np.diff(information.indptr) > 0)
    vectors[seen] -= vectors[seen].mean(0)  # what all have in common is the bias's to say
    vectors[~seen] = 0.0
    vectors = torch.nn.functional.normalize(vectors) * RMS * math.sqrt(size)
    return torch.nn.functional.pad(vectors, (0, size - vectors.shape[1]))


def cooccurrences(store: Store) -> sparse.csr_array:
    """(V, V): how often two types stand within WINDOW tokens of each other in a document, weighted by 1 / distance."""
    V = store.vocab_size
    total = sparse.csr_array((V, V), dtype=np.float32)
    for tokens, document in _chunks(store):
        for distance in range(1, WINDOW + 1):
            same = document[distance:] == document[:-distance]
            pairs, times = np.unique(tokens[:-distance][same] * V + tokens[distance:][same], return_counts=True)
            weights = times.astype(np.float32) / distance
            total += sparse.coo_array((weights, np.divmod(pairs, V)), shape=(V, V)).tocsr()
    return (total + total.T).tocsr()


def positive_information(counts: sparse.csr_array) -> sparse.csr_array:
    """max(0, log p(a, b) / (p(a) p'(b))) of each pair, symmetric; p' is p to the power SMOOTHING, normalised."""
    rows = np.asarray(counts.sum(1)).ravel()
    smooth = rows**SMOOTHING / max((rows**SMOOTHING).sum(), 1e-12)
    pairs = counts.tocoo()
    a, b = pairs.coords
    information = np.log(pairs.data / (rows[a] * smooth[b]))
    kept = information > 0
    half = sparse.coo_array((information[kept].astype(np.float32) / 2, (a[kept], b[kept])), shape=counts.shape).tocsr()
    return (half + half.T).tocsr()


def _leading_factors(matrix: sparse.csr_array, size: int) -> Tensor:
    """U sqrt(S) of the largest singular values, by subspace iteration (Halko et al. 2011, arXiv:0909.4061)."""
    indptr, indices, data = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        a = torch.sparse_csr_tensor(indptr, indices, data, matrix.shape, check_invariants=False)
    start = torch.randn(len(a), min(size + _OVERSAMPLED, len(a)), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(a @ start)[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(a @ basis)[0]
    values, directions = torch.linalg.eigh(basis.T @ (a @ basis))
    leading = values.abs().argsort(descending=True)[:size]
    return (basis @ directions[:, leading]) * values[leading].abs().sqrt()


def _chunks(store: Store) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of whole documents, and the number of the document of each, some millions at a time."""
    every = max(1, -(-store.num_tokens // MAX_TOKENS))
    documents = np.arange(0, store.num_documents, every)
    chunk = store.document_lengths[documents].cumsum() // _CHUNK_TOKENS
    for part in np.split(documents, np.flatnonzero(np.diff(chunk)) + 1) if len(documents) else ():
        tokens = [store.tokens(document) for document in part.tolist()]
        yield np.concatenate(tokens).astype(np.int64), np.repeat(part, store.document_lengths[part])
