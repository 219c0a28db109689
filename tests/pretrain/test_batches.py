"""Step batches: ranks, micro-batches, workers and fixed shapes change nothing that is learned."""

import itertools
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from encoderkit.encoder.batch import IGNORE_INDEX
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.batches import StepBatches, step_loader
from encoderkit.pretrain.order import Order
from encoderkit.pretrain.schedule import Stage
from encoderkit.pretrain.settings import Data, Masking, PretrainSettings
from encoderkit.pretrain.tokenizer import TokenIds

TOKENS = TokenIds(500, 0, 2, 3, 4, np.arange(5, 500))
LENGTHS = np.random.default_rng(0).lognormal(3, 1, 300).astype(int) + 1


class FakeStore:
    """Documents of made-up tokens."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.documents = [rng.integers(5, 500, n).astype(np.uint16) for n in LENGTHS]

    def tokens(self, document):
        return self.documents[document]


def rate_at(step):
    return 0.3 - 0.01 * step


def batches(*, micro=512, static=False, rank=0, world_size=1, store=None, layout="packed", curriculum=(), ramp=()):
    settings = PretrainSettings(
        seed=5,
        batch_tokens=1024,
        batch_ramp=list(ramp),
        micro_batch_tokens=micro,
        data=Data(max_tokens=64, row_tokens=128, layout=layout, length_curriculum=list(curriculum)),
        masking=Masking(rate=0.3, final_rate=0.15, mask_share=0.8, random_share=0.1),
    )
    shortest = min([64, *(length for _, length in curriculum)])
    order = Order(LENGTHS, seed=5, max_tokens=64, row_tokens=128, shortest=shortest, layout=layout)
    return StepBatches(
        store or FakeStore(), order, settings, TOKENS, rate_at, rank=rank, world_size=world_size, static_shapes=static
    )


def learned(micro_batches):
    """The sequences in order, each as (ids, position in the sequence -> target); pads left out."""
    found = []
    for batch in micro_batches:
        ends = batch.segments.cu_seqlens.tolist()
        targets = dict(zip(batch.target_positions.tolist(), batch.targets.tolist()))
        assert batch.target_segments.total == len(batch.targets)
        for start, stop in itertools.pairwise(ends):
            ids = batch.input_ids[start:stop].tolist()
            assert batch.position_ids[start:stop].tolist() == list(range(stop - start))
            if ids and ids[0] != TOKENS.pad:
                own = {p - start: t for p, t in targets.items() if start <= p < stop and t != IGNORE_INDEX}
                found.append((ids, own))
    return found


@pytest.mark.parametrize("micro", [128, 384, 1024, 4096])
@pytest.mark.parametrize("static", [False, True])
def test_micro_batches_and_fixed_shapes_change_nothing(micro, static):
    for step in (0, 7):
        assert learned(batches(micro=micro, static=static)[step]) == learned(batches()[step])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_a_step_without_overlap(world_size):
    parts = [learned(batches(rank=rank, world_size=world_size)[3]) for rank in range(world_size)]
    assert [sequence for part in parts for sequence in part] == learned(batches()[3])


@pytest.mark.parametrize("static", [False, True])
def test_a_stage_goes_on_with_the_rows_after_the_last_one(static):
    """Short sequences in small steps, then long ones: the same tokens as without, each once."""
    staged = batches(static=static, micro=256, curriculum=[(0.5, 16)], ramp=[(0.5, 256)])
    assert (staged.stage.max_tokens, staged.stage.step_rows) == (16, 2)
    found = [sequence for step in range(4) for sequence in learned(staged[step])]
    assert max(len(ids) for ids, _ in found) <= 16
    assert all(own for _, own in found)
    staged.stage = Stage(64, 8, first_step=4, first_row=8)
    assert staged.counts(4).row_tokens == 1024
    found += learned(staged[4])
    assert max(len(ids) for ids, _ in found) == 58  # what four sequences of 16 hold, and two special tokens
    parts = [part for row in staged.order.rows(0, 16) for part in zip(row.document, row.start, row.stop)]
    expected = [token for document, start, stop in parts for token in staged.store.tokens(document)[start:stop]]
    assert expected == [own.get(i, t) for ids, own in found for i, t in enumerate(ids) if 0 < i < len(ids) - 1]


@pytest.mark.parametrize("static", [False, True])
def test_padded_sequences_learn_the_same_as_packed_ones(static):
    padded, packed = batches(layout="padded", static=static, micro=256), batches()

    def epoch(dataset):
        dataset.stage = Stage(64, len(dataset.order.epoch(0)))  # in one step
        return sorted((ids, sorted(own.items())) for ids, own in learned(dataset[0]))

    assert epoch(padded) == epoch(packed)
    for batch in padded[0]:
        ends = batch.segments.cu_seqlens.unique().tolist()
        starts = [start for start in ends[:-1] if batch.input_ids[start] == TOKENS.cls]
        assert all(start % 32 == 0 for start in starts)


def test_ranks_that_cannot_share_are_refused():
    with pytest.raises(InputError, match="8 rows of 128 tokens, which 3 ranks cannot share"):
        batches(world_size=3)


def test_fixed_shapes_are_fixed_and_consistent():
    dataset = batches(micro=384, static=True)
    shapes = set()
    for step in range(8):
        for batch in dataset[step]:
            shapes.add((len(batch.input_ids), len(batch.targets), len(batch.segments), batch.segments.longest))
            assert batch.segments.total == len(batch.input_ids) == 384
            assert int(batch.segments.lengths.max()) <= batch.segments.longest == 64
            assert (batch.target_positions.diff() >= 0).all()
            ignored = batch.targets == IGNORE_INDEX
            assert (batch.target_positions[ignored] == 383).all()
            # Each target position lies in the segment that counts it.
            owner = torch.repeat_interleave(torch.arange(len(batch.segments)), batch.target_segments.lengths.long())
            starts, ends = batch.segments.cu_seqlens[owner], batch.segments.cu_seqlens[owner + 1]
            assert ((batch.target_positions >= starts) & (batch.target_positions < ends)).all()
    assert len(shapes) == 1


def test_counts_are_those_of_the_batches():
    dataset = batches()
    for step in range(5):
        counts = dataset.counts(step)
        assert counts.tokens == sum(len(batch.input_ids) for batch in dataset[step])
        assert counts.row_tokens == 1024
        assert 0.7 * counts.row_tokens < counts.tokens <= counts.row_tokens


def test_an_epoch_ends_and_masks_are_new_in_the_next():
    dataset = batches()
    steps = len(dataset.order.epoch(0)) // 8 + 1
    first = {tuple(i if t is None else t for i, t in zip(ids, map(own.get, range(len(ids))))): own
             for step in range(steps) for ids, own in learned(dataset[step])}  # fmt: skip
    again = [(ids, own) for step in range(steps, 2 * steps) for ids, own in learned(dataset[step])]
    same = [own == first[key] for ids, own in again
            if (key := tuple(i if t is None else t for i, t in zip(ids, map(own.get, range(len(ids)))))) in first
            and len(ids) > 20]  # fmt: skip
    assert len(same) > 50
    assert sum(same) < 0.1 * len(same)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_loader_workers_change_nothing_and_resume_in_the_middle(workers):
    expected = [learned(batches()[step]) for step in range(12)]
    assert [learned(part) for part in step_loader(batches(), 0, 12, workers)] == expected
    assert [learned(part) for part in step_loader(batches(), 5, 12, workers)] == expected[5:]


def test_the_loader_goes_on_without_end_when_the_budget_is_time():
    for workers in (0, 1):
        loader = step_loader(batches(), 3, None, workers)
        assert [learned(next(loader)) for _ in range(3)] == [learned(batches()[step]) for step in (3, 4, 5)]
        loader.close()


class DyingStore(FakeStore):
    """Kills its process at the first token of the first worker that asks, after hanging some seconds."""

    def __init__(self, parent, hang=0.0):
        super().__init__()
        self.parent, self.hang = parent, hang

    def tokens(self, document):
        if os.getpid() != self.parent:
            time.sleep(self.hang)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tokens(document)


def test_a_killed_worker_is_an_error_within_seconds():
    dataset = batches(store=DyingStore(os.getpid()))
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"batches of step 2 failed: .*worker.* exited unexpectedly"):
        next(step_loader(dataset, 2, 9, 1))
    assert time.monotonic() - began < 5


def test_a_hanging_worker_is_an_error_after_the_timeout():
    dataset = batches(store=DyingStore(os.getpid(), hang=60))
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"batches of step 0 failed: .*timed out"):
        next(step_loader(dataset, 0, 9, 1, timeout_seconds=1.0))
    assert time.monotonic() - began < 1 + 1  # the timeout and a second


def test_without_the_timeout_a_hanging_worker_is_waited_for():
    """Proof that it is the timeout that ends the wait; the hang itself ends here after 4 seconds."""
    dataset = batches(store=DyingStore(os.getpid(), hang=4))
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"exited unexpectedly"):
        next(step_loader(dataset, 0, 9, 1, timeout_seconds=0))  # torch's word for endless
    assert time.monotonic() - began >= 4


def test_the_dataset_pickles_without_its_plan():
    dataset = batches()
    dataset[0]
    assert dataset.order._plan is not None
    copy = pickle.loads(pickle.dumps(dataset.order))
    assert copy._plan is None
    assert [r.document.tolist() for r in copy.rows(3, 2)] == [r.document.tolist() for r in dataset.order.rows(3, 2)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_for_a_gpu_are_pinned(workers, monkeypatch):
    dataset, pinned = batches(static=True), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    (first, *_) = next(step_loader(dataset, 0, 1, workers))
    held = [first.input_ids, first.position_ids, first.targets, first.target_positions]
    held += [first.segments.cu_seqlens, first.target_segments.cu_seqlens]
    assert all(any(tensor is other for other in pinned) for tensor in held)
    assert not any(tensor is first.segments.lengths for tensor in pinned)


def test_batches_of_fixed_shape_are_compiled_once(monkeypatch):
    """After the first step nothing is compiled again, until the stage is another."""
    monkeypatch.setattr("encoderkit.encoder.model.CPU_MULTIPLE", 1)
    torch._dynamo.reset()
    counters.clear()
    model = MaskedLM(preset("modern", "tiny", vocab_size=500, max_positions=64))
    model.encoder.compile_blocks(backend="eager")
    for static in (True, False):
        dataset, graphs = batches(static=static), []
        for step in range(5):
            for batch in dataset[step]:
                model(batch).loss.backward()
            graphs.append(counters["stats"]["unique_graphs"])
        assert (graphs[0] == graphs[-1]) == static
    assert not counters["graph_break"]
