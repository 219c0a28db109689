"""Drawn corpora, lengths, rates, ranks, micro-batches and restarts: the same sequences are learned, each of the corpus.

Every token has an id of its own, so that a sequence tells which tokens of which document it is made of.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.batches import StepBatches, step_loader
from encoderkit.pretrain.clock import Clock
from encoderkit.pretrain.job import MaskRate, make_order
from encoderkit.pretrain.pairs import NO_PAIR, REPLACED
from encoderkit.pretrain.schedule import Stage
from encoderkit.pretrain.settings import Budget, Data, Masking, PretrainSettings
from encoderkit.pretrain.tokenizer import TokenIds

PAD, CLS, SEP, MASK, FIRST = 0, 2, 3, 4, 5
STEPS = 4


class Corpus:
    """A store of documents of these sentence lengths; token i of the corpus has the id FIRST + i."""

    def __init__(self, sentences: list[list[int]]) -> None:
        self.sentences = [np.array(lengths, dtype=np.int64) for lengths in sentences]
        self.document_lengths = np.array([lengths.sum() for lengths in self.sentences])
        self.num_documents = len(sentences)
        self.stops = np.cumsum(self.document_lengths)
        self.num_tokens = int(self.stops[-1])

    def tokens(self, document: int) -> np.ndarray:
        stop = self.stops[document]
        return FIRST + np.arange(stop - self.document_lengths[document], stop)

    def sentence_lengths(self, document: int) -> np.ndarray:
        return self.sentences[document]

    def word_starts(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return (np.arange(self.document_lengths[document]) % 3 == 0)[start:stop]

    def document_of(self, ids: list[int]) -> int:
        """The one document that these tokens are a run of."""
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        first, last = np.searchsorted(self.stops + FIRST, [ids[0], ids[-1]], side="right")
        assert first == last
        return int(first)


@dataclass(frozen=True)
class Case:
    """A corpus and the settings of a run over it, by one process in one micro-batch a step."""

    sentences: list[list[int]]
    settings: PretrainSettings

    def batches(self, rank: int = 0, world_size: int = 1, *, static: bool = False, **changes: Any) -> StepBatches:
        run, corpus = replace(self.settings, **changes), Corpus(self.sentences)
        ordinary = np.arange(FIRST, FIRST + corpus.num_tokens)
        tokens = TokenIds(FIRST + corpus.num_tokens, PAD, CLS, SEP, MASK, ordinary)
        order, rate_at = make_order(run, corpus), MaskRate(run.masking, Clock(run))
        return StepBatches(corpus, order, run, tokens, rate_at, rank=rank, world_size=world_size, static_shapes=static)


@st.composite
def cases(draw: st.DrawFn, objectives: tuple[str, ...] = ("none", "nsp", "sop")) -> Case:
    sentences = draw(st.lists(st.lists(st.integers(0, 30), max_size=8), min_size=1, max_size=10))
    objective = draw(st.sampled_from(objectives))
    longest = draw(st.integers(8, 48))
    lengths = [(0.5, draw(st.integers(8, longest)))] if draw(st.booleans()) else []
    row = 3 * longest + draw(st.integers(0, 40))
    whole = 12 * row  # 12 and 6 rows are shared by 1, 2, 3 and 6 ranks
    ramp = [(draw(st.sampled_from([0.25, 0.6])), 6 * row)] if draw(st.booleans()) else []
    mask_share = draw(st.floats(0, 1))
    run = PretrainSettings(
        seed=draw(st.integers(0, 2**32 - 1)),
        data=Data(
            max_tokens=longest,
            length_curriculum=lengths,
            row_tokens=row,
            layout="packed" if lengths else draw(st.sampled_from(["packed", "padded"])),
        ),
        masking=Masking(
            select=draw(st.sampled_from(["token", "word", "span"])),
            rate=draw(st.floats(0.01, 0.9)),
            final_rate=draw(st.none() | st.floats(0.01, 0.9)),
            mask_share=mask_share,
            random_share=draw(st.floats(0, 1)) * (1 - mask_share),
        ),
        pairs=objective,
        budget=Budget(steps=STEPS),
        batch_tokens=whole,
        batch_ramp=ramp,
        micro_batch_tokens=whole,
    )
    case = Case(sentences, run)
    try:
        make_order(run, Corpus(sentences))
    except InputError:  # no token, or no pair
        assume(False)
    return case


@dataclass(frozen=True)
class Sequence:
    """One sequence as the model gets it. targets: by place. label: of a pair, None where it is no pair."""

    ids: list[int]
    types: list[int] | None
    targets: dict[int, int]
    label: int | None

    @property
    def parts(self) -> list[list[int]]:
        """The tokens between [CLS], [SEP] and [SEP] before any was masked."""
        whole = [self.targets.get(place, token) for place, token in enumerate(self.ids)]
        assert (whole[0], whole[-1]) == (CLS, SEP)
        inside = whole[1:-1]
        cut = inside.index(SEP) if SEP in inside else len(inside)
        return [part for part in (inside[:cut], inside[cut + 1 :]) if part]


def sequences_of(batches: list[TokenBatch]) -> list[Sequence]:
    """In order, without padding; every position and target is in the segment that counts it."""
    found = []
    for batch in batches:
        bounds = batch.segments.cu_seqlens.tolist()
        targets = [{} for _ in batch.segments.lengths]
        owners = np.repeat(np.arange(len(targets)), batch.target_segments.lengths.numpy()).tolist()
        for segment, place, target in zip(owners, batch.target_positions.tolist(), batch.targets.tolist(), strict=True):
            assert bounds[segment] <= place < bounds[segment + 1]
            if target != IGNORE_INDEX:
                targets[segment][place - bounds[segment]] = target
        pairs = {}
        if batch.pair_reads is not None:
            pairs = dict(zip(batch.target_positions[batch.pair_reads].tolist(), batch.pair_labels.tolist()))
        all_ids, places = batch.input_ids.tolist(), batch.position_ids.tolist()
        types = None if batch.token_type_ids is None else batch.token_type_ids.tolist()
        for (start, stop), own in zip(itertools.pairwise(bounds), targets, strict=True):
            ids = all_ids[start:stop]
            assert places[start:stop] == list(range(stop - start))
            if PAD in ids:  # padding is of its own
                assert set(ids) == {PAD}
                assert not own
            elif ids:
                found.append(Sequence(ids, types and types[start:stop], own, pairs.get(start)))
    return found


def walk(
    case: Case, *ranks: int, static: bool = False, first: int = 0, state: dict[str, Any] | None = None, **changes: Any
) -> Iterator[tuple[list[TokenBatch], dict[str, Any]]]:
    """The micro-batches of each step from first on, and what a checkpoint before the step holds of the order."""
    dataset, clock = case.batches(*ranks, static=static, **changes), Clock(case.settings)
    if state is not None:
        dataset.order.ends = list(state["ends"])
        clock.stage = dataset.stage = Stage(**state["stage"])
    for step in range(first, STEPS):
        before = {"ends": list(dataset.order.ends), "stage": asdict(clock.stage)}
        clock.stage = dataset.stage = clock.due_stage(step)
        yield dataset[step], before


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([1, 2, 3, 6]), st.integers(1, 5), st.booleans(), st.integers(0, STEPS - 1))
def test_ranks_micro_batches_fixed_shapes_and_restarts_change_nothing(case, world_size, micro_rows, static, first):
    whole = list(walk(case))
    expected = [sequences_of(batches) for batches, _ in whole]
    micro, state = micro_rows * case.settings.data.row_tokens, whole[first][1]
    again = {"static": static, "first": first, "state": state, "micro_batch_tokens": micro}
    ranks = [[batches for batches, _ in walk(case, rank, world_size, **again)] for rank in range(world_size)]
    for step, parts in enumerate(zip(*ranks, strict=True), start=first):
        assert [sequence for part in parts for sequence in sequences_of(part)] == expected[step]
        for batch in itertools.chain(*parts):
            assert len(batch.input_ids) <= micro
            if static:
                assert len(batch.input_ids) == batch.segments.total == len(parts[0][0].input_ids)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_sequence_is_a_run_of_one_document_or_a_pair_of_runs(case):
    corpus, data, objective = Corpus(case.sentences), case.settings.data, case.settings.pairs
    rates = [rate for rate in (case.settings.masking.rate, case.settings.masking.final_rate) if rate is not None]
    for step, (batches, _) in enumerate(walk(case)):
        stage = Stage.at(case.settings, step / STEPS)
        longest = stage.max_tokens
        assert sum(len(batch.input_ids) for batch in batches) <= stage.step_rows * data.row_tokens
        for found in sequences_of(batches):
            documents = [corpus.document_of(part) for part in found.parts]
            inside = sum(map(len, found.parts))
            assert len(found.ids) == inside + 1 + len(documents) <= longest
            assert max(found.ids) < FIRST + corpus.num_tokens
            assert found.ids.count(CLS) == 1
            assert found.ids.count(SEP) == len(documents)
            assert min(found.targets.values()) >= FIRST  # at least one, none of a special token
            if case.settings.masking.select == "token":
                low, high = (int(rate * inside) for rate in (min(rates), max(rates)))
                assert low <= len(found.targets) <= high + 1
            if objective == "none":
                assert (len(documents), found.types, found.label) == (1, None, None)
                continue
            first = len(found.parts[0]) + 2
            assert found.types == [0] * first + [1] * (len(found.ids) - first)
            assert (found.label is None) == (len(documents) == 1)
            if found.label is not None:
                assert (documents[0] != documents[1]) == (objective == "nsp" and found.label == REPLACED)


@settings(max_examples=250, deadline=None)
@given(cases(objectives=("none", "sop")), st.booleans(), st.integers(0, 2))
def test_an_epoch_holds_every_token_of_the_corpus_once(case, short, epoch):
    dataset = case.batches()
    plans = [dataset.order.epoch(e) for e in range(epoch + 1)]
    longest = case.settings.data.length_curriculum[0][1] if short and case.settings.data.length_curriculum else None
    dataset.stage = Stage(longest or case.settings.data.max_tokens, len(plans[-1]), 0, sum(map(len, plans[:-1])))
    counts = dataset.counts(0)
    found = sequences_of(dataset[0])
    seen = collections.Counter(token for sequence in found for part in sequence.parts for token in part)
    assert seen == dict.fromkeys(range(FIRST, FIRST + dataset.store.num_tokens), 1)
    assert counts.tokens == sum(len(sequence.ids) for sequence in found)
    assert counts.tokens <= counts.row_tokens


@settings(max_examples=250, deadline=None)
@given(cases(objectives=("nsp", "sop")), st.integers(8, 48), st.integers(0, 3))
def test_pairs_cut_again_keep_every_token_and_where_their_parts_meet(case, longest, epoch):
    dataset = case.batches()
    shortest = min([case.settings.data.max_tokens, *(length for _, length in case.settings.data.length_curriculum)])
    longest = min(max(longest, shortest), case.settings.data.max_tokens)
    before = sum(len(dataset.order.epoch(e)) for e in range(epoch))
    for row in dataset.order.rows(before, len(dataset.order.epoch(epoch))):
        cut = row.cut(longest)

        def tokens(of, *names):
            parts = [getattr(of.pairs, name) for name in names]
            return collections.Counter(
                (d, t) for p in parts for d, a, b in zip(p.document, p.start, p.stop) for t in range(a, b)
            )

        assert tokens(cut, "first", "second") == tokens(row, "first", "second")
        assert (cut.lengths <= longest).all()
        assert cut.num_tokens <= case.settings.data.row_tokens
        is_pair = row.pairs.labels != NO_PAIR
        still = cut.pairs.labels != NO_PAIR
        assert cut.pairs.labels[still].tolist() == row.pairs.labels[is_pair].tolist()
        for name, edge in (("first", "stop"), ("second", "start")):
            assert getattr(getattr(cut.pairs, name), edge)[still].tolist() == (
                getattr(getattr(row.pairs, name), edge)[is_pair].tolist()
            )
        assert (np.minimum(cut.pairs.first.lengths, cut.pairs.second.lengths)[still] > 0).all()
        whole = row.lengths <= longest
        assert cut.lengths[still][whole[is_pair]].tolist() == row.lengths[is_pair & whole].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@settings(max_examples=8, deadline=None)
@given(cases(), st.integers(1, 3), st.integers(0, STEPS - 1))
def test_loader_workers_change_nothing(case, workers, first):
    dataset = case.batches()  # its first stage, as a run asks for the steps of one
    expected = [sequences_of(dataset[step]) for step in range(first, STEPS)]
    loader = step_loader(case.batches(), first, STEPS, workers)
    assert [sequences_of(batches) for batches in loader] == expected
