"""Sentence pairs: halves, other documents, sentence bounds, and batches that are the same however they are built."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.encoder.batch import IGNORE_INDEX
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.batches import StepBatches, step_loader
from encoderkit.pretrain.order import Order
from encoderkit.pretrain.pairs import FOLLOWS, NO_PAIR, REPLACED, SentencePairs
from encoderkit.pretrain.settings import Data, Masking, PretrainSettings
from encoderkit.pretrain.tokenizer import TokenIds

CLS, SEP = 2, 3
TYPES, FEW = 1 << 15, 200
CORPUS = st.lists(st.lists(st.integers(1, 40), max_size=12), min_size=2, max_size=12)
EXACT_SUM = 1e-12  # float64, another order of summation


class FakeStore:
    """Documents of these sentence lengths; token i of the corpus is 5 + i % types, which tells where it is from."""

    def __init__(self, sentences, types=TYPES):
        self.types = types
        self.sentences = [np.array(part, dtype=np.int64) for part in sentences]
        self.document_lengths = np.array([part.sum() for part in self.sentences])
        self.first = np.cumsum(self.document_lengths) - self.document_lengths

    def tokens(self, document):
        return 5 + (self.first[document] + np.arange(self.document_lengths[document])) % self.types

    def sentence_lengths(self, document):
        return self.sentences[document]

    def word_starts(self, document, start=0, stop=None):
        starts = np.arange(self.document_lengths[document]) % 3 == 0
        starts[np.cumsum(self.sentences[document])[:-1]] = True
        return starts[start:stop]


def realistic(documents=120, types=TYPES):
    rng = np.random.default_rng(0)
    return FakeStore([rng.integers(1, 30, rng.integers(1, 30)) for _ in range(documents)], types)


def tokens_of(types):
    return TokenIds(5 + types, 0, CLS, SEP, 4, np.arange(5, 5 + types))


def make_pairs(store, objective, *, seed=0, room=61):
    return SentencePairs(objective, store.sentences, seed=seed, room=room)


def batches(objective="nsp", *, store=None, micro=512, static=False, rank=0, world_size=1, select="word", seed=5):
    store = store or realistic()
    config = PretrainSettings(
        seed=seed,
        batch_tokens=1024,
        micro_batch_tokens=micro,
        data=Data(max_tokens=64, row_tokens=128),
        masking=Masking(rate=0.3, select=select),
        pairs=objective,
    )
    order = Order(
        store.document_lengths, seed=seed, max_tokens=64, row_tokens=128, pairs=make_pairs(store, objective, seed=seed)
    )
    rates = {"rank": rank, "world_size": world_size, "static_shapes": static}
    return StepBatches(store, order, config, tokens_of(store.types), lambda step: 0.3, **rates)


def learned(micro_batches):
    """Each sequence as (ids, types, position -> target, label or None), in order; pads left out."""
    found = []
    for batch in micro_batches:
        targets = dict(zip(batch.target_positions.tolist(), batch.targets.tolist()))
        labels = dict(zip(batch.target_positions[batch.pair_reads].tolist(), batch.pair_labels.tolist()))
        bounds = batch.segments.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(bounds):
            ids = batch.input_ids[start:stop].tolist()
            if ids and ids[0] == CLS:
                own = {p - start: t for p, t in targets.items() if start <= p < stop and t != IGNORE_INDEX}
                label = labels.get(start)
                found.append((ids, batch.token_type_ids[start:stop].tolist(), own, label))
    return found


def parts_of(ids, own):
    """The two parts of a sequence, unmasked."""
    whole = [own.get(i, token) for i, token in enumerate(ids)]
    cut = whole.index(SEP)
    return whole[1:cut], whole[cut + 1 : -1]


@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_half_of_the_pairs_are_changed_within_four_sigma(objective):
    pairs = make_pairs(realistic(3000), objective)
    for epoch in range(3):
        labels = pairs.draw(epoch).labels
        n = int((labels != NO_PAIR).sum())
        assert n > 5000
        assert abs(int((labels == REPLACED).sum()) - n / 2) < 4 * np.sqrt(n) / 2


@settings(max_examples=100, deadline=None)
@given(CORPUS, st.sampled_from(["nsp", "sop"]), st.integers(2, 60), st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_half_of_the_pairs_of_any_corpus_are_changed_within_five_sigma(sentences, objective, room, seed, first_epoch):
    """Five, as some of hundreds of draws are beyond four; and what is a pair never depends on the draw."""
    try:
        pairs = make_pairs(FakeStore(sentences), objective, seed=seed, room=room)
    except InputError:
        return
    labels = np.stack([pairs.draw(epoch).labels for epoch in range(first_epoch, first_epoch + 16)])
    is_pair = labels != NO_PAIR
    assert (is_pair == is_pair[0]).all()
    n = int(is_pair.sum())
    assert abs(int((labels == REPLACED).sum()) - n / 2) < 5 * np.sqrt(n) / 2


@settings(max_examples=500, deadline=None)
@given(CORPUS, st.integers(2, 60), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_parts_are_whole_sentences_and_replacements_are_of_other_documents(sentences, room, seed, epoch):
    store = FakeStore(sentences)
    try:
        pairs = make_pairs(store, "nsp", seed=seed, room=room)
    except InputError:
        return
    drawn, pieces = pairs.draw(epoch), pairs.pieces
    starts = [set((np.cumsum(part) - part).tolist()) for part in store.sentences]
    stops = [set(np.cumsum(part).tolist()) for part in store.sentences]
    assert (drawn.lengths <= room).all()
    for p, label in enumerate(drawn.labels):
        a, b = drawn.first[np.array([p])], drawn.second[np.array([p])]
        document, other = int(a.document[0]), int(b.document[0])
        assert (document, a.start[0]) == (pieces.document[p], pieces.start[p])
        if label == NO_PAIR:
            assert b.lengths[0] == 0
            assert a.stop[0] == pieces.stop[p]
            continue
        assert min(a.lengths[0], b.lengths[0]) > 0
        assert a.stop[0] in stops[document]  # cut at a sentence
        assert b.start[0] in starts[other]
        assert b.stop[0] <= store.document_lengths[other]
        if label == REPLACED:
            assert other != document
        else:
            assert (other, b.start[0], b.stop[0]) == (document, a.stop[0], pieces.stop[p])


@settings(max_examples=500, deadline=None)
@given(CORPUS, st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_order_of_sentences_changes_places_and_loses_nothing(sentences, room, seed):
    store = FakeStore(sentences)
    try:
        pairs = make_pairs(store, "sop", seed=seed, room=room)
    except InputError:
        return
    drawn, found = pairs.draw(0), []
    for part in (drawn.first, drawn.second):
        found += [(d, t) for d, a, b in zip(part.document, part.start, part.stop) for t in range(a, b)]
    assert sorted(found) == [(d, t) for d, n in enumerate(store.document_lengths) for t in range(int(n))]
    swapped = drawn.labels == REPLACED
    assert (drawn.second.stop == drawn.first.start)[swapped].all()
    assert (drawn.first.stop == drawn.second.start)[~swapped].all()
    assert (drawn.first.document == drawn.second.document).all()


def test_neither_lengths_nor_ends_tell_a_replacement():
    store = realistic(1000)
    drawn = make_pairs(store, "nsp").draw(0)
    ends = [set(np.cumsum(part).tolist()) for part in store.sentences]
    lengths = []
    for label in (FOLLOWS, REPLACED):
        second = drawn.second[np.flatnonzero(drawn.labels == label)]
        lengths.append(second.lengths)
        assert np.mean([stop in ends[d] for d, stop in zip(second.document, second.stop)]) > 0.999
    follows, replaced = lengths
    sigma = np.sqrt(follows.var() / len(follows) + replaced.var() / len(replaced))
    assert abs(follows.mean() - replaced.mean()) < 4 * sigma


def test_epochs_and_seeds_draw_other_pairs():
    store = realistic()
    pairs = make_pairs(store, "nsp")
    first, again, later = pairs.draw(0), pairs.draw(0), pairs.draw(1)
    assert (first.labels == again.labels).all()
    assert (first.second.start == again.second.start).all()
    for other in (later, make_pairs(store, "nsp", seed=1).draw(0)):
        assert 0.3 < (first.labels == other.labels)[first.labels != NO_PAIR].mean() < 0.7


@pytest.mark.parametrize(
    ("sentences", "objective", "message"),
    [
        ([[5, 5, 5]], "nsp", "holds one document"),
        ([[5, 5, 5], []], "nsp", "holds one document"),
        ([[5], [7], [300]], "sop", "no piece of the store holds two sentences"),
        ([], "sop", "no piece of the store holds two sentences"),
    ],
)
def test_a_corpus_without_pairs_is_refused(sentences, objective, message):
    with pytest.raises(InputError, match=message):
        make_pairs(FakeStore(sentences), objective)


@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_sequences_are_as_bert_has_them(objective):
    store = realistic()
    dataset = batches(objective, store=store)
    seen = {FOLLOWS: 0, REPLACED: 0, None: 0}
    bounds = np.append(store.first, store.document_lengths.sum()) + 5
    for ids, types, own, label in (s for step in range(6) for s in learned(dataset[step])):
        seen[label] += 1
        first, second = parts_of(ids, own)
        assert types == [0] * (len(first) + 2) + [1] * (len(ids) - len(first) - 2)
        assert ids[0] == CLS
        assert 0 not in own
        assert own  # never without a target
        if label is None:
            assert not second
            continue
        documents = np.searchsorted(bounds, [first[0], second[0]], side="right")
        follows = second[0] == first[-1] + 1
        assert follows == (label == FOLLOWS)
        if label == REPLACED:
            assert (documents[0] != documents[1]) == (objective == "nsp")
            assert objective == "nsp" or first[0] == second[-1] + 1
    assert store.document_lengths.sum() < TYPES
    assert min(seen.values()) > 10


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_ranks_workers_micro_batches_and_restarts_change_nothing(objective):
    expected = [learned(batches(objective)[step]) for step in range(8)]
    for micro in (128, 384, 1024):
        for static in (False, True):
            dataset = batches(objective, micro=micro, static=static)
            assert [learned(dataset[step]) for step in (0, 7)] == [expected[0], expected[7]]
    for world_size in (2, 8):
        parts = [learned(batches(objective, rank=r, world_size=world_size)[3]) for r in range(world_size)]
        assert [sequence for part in parts for sequence in part] == expected[3]
    assert [learned(part) for part in step_loader(batches(objective), 5, 8, 2)] == expected[5:]


def test_counts_are_those_of_the_batches_and_rows_go_on_through_epochs():
    dataset = batches(store=realistic(40))
    epochs = set()
    for step in range(25):
        counts = dataset.counts(step)
        assert counts.tokens == sum(len(batch.input_ids) for batch in dataset[step])
        epochs |= {row.epoch for row in dataset.order.rows(step * 8, 8)}
    assert len(epochs) > 2


def small_model():
    torch.manual_seed(0)
    config = preset("bert", "tiny", vocab_size=5 + FEW, hidden_size=16, num_heads=2, intermediate_size=16, init_std=0.1,
                    sentence_pairs=True, hidden_dropout=0.0, attention_dropout=0.0)  # fmt: skip
    return MaskedLM(config)


@pytest.mark.parametrize("select", ["token", "word", "span"])
def test_fixed_shapes_are_fixed_and_give_the_loss_of_varying_ones(select):
    model = small_model().double()
    store = realistic(types=FEW)
    fixed, varying = (batches(store=store, micro=384, static=static, select=select) for static in (True, False))
    shapes = set()
    for step in range(3):
        sums = []
        for dataset in (fixed, varying):
            with torch.no_grad():
                losses = [model.losses(batch) for batch in dataset[step]]
            sums.append([[sum(float(part[i][j]) for part in losses) for j in range(3)] for i in range(2)])
        for a, b in zip(*sums):
            assert a[0] == pytest.approx(b[0], rel=EXACT_SUM)
            assert a[1:] == b[1:]
        assert sums[0][1][1] > 5
        for batch in fixed[step]:
            parts = (batch.input_ids, batch.targets, batch.pair_reads, batch.pair_labels, batch.segments)
            shapes.add(tuple(map(len, parts)))
            real = batch.pair_labels != IGNORE_INDEX
            assert (batch.input_ids[batch.target_positions[batch.pair_reads[real]]] == CLS).all()
            assert (batch.target_positions.diff() >= 0).all()
    assert len(shapes) == 1


def test_a_packed_pair_scores_as_alone():
    model, store = small_model().double(), realistic(types=FEW)
    (batch,) = batches(store=store, micro=1024)[0]
    tokens, pairs = model.losses(batch)
    alone = torch.zeros(2, dtype=torch.float64)
    for part in batches(store=store, micro=128)[0]:
        alone += torch.stack([loss.loss.detach() for loss in model.losses(part)])
    assert float(alone[0]) == pytest.approx(float(tokens.loss.detach()), rel=EXACT_SUM)
    assert float(alone[1]) == pytest.approx(float(pairs.loss.detach()), rel=EXACT_SUM)
    # One pass reads the first tokens as a pass of their own does.
    starts = batch.target_positions[batch.pair_reads]
    reads = dataclasses.replace(
        batch,
        target_positions=starts,
        target_segments=type(batch.segments).from_lengths(
            torch.isin(batch.segments.cu_seqlens[:-1].long(), starts).int()
        ),
    )
    scores = model.pair_logits(reads)
    loss = torch.nn.functional.cross_entropy(scores, batch.pair_labels, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(pairs.loss.detach()), rel=EXACT_SUM)


def test_without_any_pair_the_loss_is_zero_and_has_gradients():
    model = small_model()
    (batch,) = batches(store=realistic(types=FEW), micro=1024)[0]
    none = torch.zeros(0, dtype=torch.int64)
    for reads, labels in ((none, none), (batch.pair_reads, torch.full_like(batch.pair_labels, IGNORE_INDEX))):
        model.zero_grad()
        tokens, pairs = model.losses(dataclasses.replace(batch, pair_reads=reads, pair_labels=labels))
        (tokens.loss + pairs.loss).backward()
        assert (float(pairs.loss.detach()), int(pairs.count), int(pairs.correct)) == (0.0, 0, 0)
        assert all(p.grad is not None for p in model.parameters())  # DDP waits for every one


def test_the_pairs_of_one_batch_are_learned_beside_its_tokens():
    model = small_model()
    (batch,) = batches(store=realistic(types=FEW), micro=1024)[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        tokens, pairs = model.losses(batch)
        (tokens.loss / tokens.count + pairs.loss / pairs.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pairs.correct == pairs.count
    assert pairs.loss < 0.1 * pairs.count
