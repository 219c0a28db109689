"""A run that was stopped ends with the bits of one that was not, or refuses to go on, with a reason."""

import dataclasses
import json
import shutil
import signal
from collections import Counter

import pytest
from reliability.children import run
from tiny_run import MODEL, differences, make_settings, read_log, stop_before, write_recipe

from encoderkit.encoder import precision
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import loop
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.job import make_order
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.settings import Budget, Checkpoints, Data
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer


@pytest.fixture(scope="module")
def whole_run(small_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(make_settings(small_store, out))
    return out


@pytest.mark.parametrize("cut", [1, 6, 7, 13, 19])
def test_resumed_run_equals_uninterrupted_run(cut, whole_run, small_store, tmp_path):
    settings = make_settings(small_store, tmp_path / "cut")
    with stop_before(cut):
        pretrain(settings)
    pretrain(settings, resume=True)
    assert not differences(whole_run, tmp_path / "cut")


def test_dropout_and_two_resumes_change_nothing(small_store, tmp_path):
    changes = {"model": dataclasses.replace(MODEL, preset="bert", hidden_dropout=0.1, attention_dropout=0.1)}
    whole, cut = (make_settings(small_store, tmp_path / name, **changes) for name in ("whole", "cut"))
    pretrain(whole)
    for i, at in enumerate((7, 14)):
        with stop_before(at):
            pretrain(cut, resume=i > 0)
    pretrain(cut, resume=True)
    assert not differences(tmp_path / "whole", tmp_path / "cut")


def test_a_resume_at_the_edge_of_an_epoch_repeats_and_loses_no_row(small_store, tmp_path, monkeypatch):
    """Stopped after the last row of the first epoch, with one row a step: both epochs have each piece once."""
    store, seen, train_step = Store.open(small_store), [], loop.train_step
    tokens = TokenIds.of(load_tokenizer(store.tokenizer_folder))

    def recording(job, batches):
        train_step(job, batches)
        (batch,) = batches
        ids = batch.input_ids.index_copy(0, batch.target_positions, batch.targets)
        parts = ids.split(batch.segments.lengths.tolist())
        seen.append(Counter(tuple(part.tolist()) for part in parts if part[0] == tokens.cls))

    settings = make_settings(small_store, tmp_path / "run", batch_tokens=64, micro_batch_tokens=64)
    order = make_order(settings, store)
    edge, end = len(order.epoch(0)), len(order.epoch(0)) + len(order.epoch(1))
    saving = Checkpoints(every_steps=edge, every_minutes=None)
    settings = dataclasses.replace(settings, budget=Budget(steps=end), checkpoints=saving)
    monkeypatch.setattr(loop, "train_step", recording)
    with stop_before(edge):
        pretrain(settings)
    pretrain(settings, resume=True)

    pieces = Counter(
        (tokens.cls, *store.tokens(document)[start:stop].tolist(), tokens.sep)
        for row in order.rows(0, edge)
        for document, start, stop in zip(row.document, row.start, row.stop)
    )
    assert len(seen) == end
    assert sum(seen[:edge], Counter()) == sum(seen[edge:], Counter()) == pieces


def test_killed_process_resumes_to_the_same_bits(whole_run, small_store, tmp_path):
    settings = make_settings(small_store, tmp_path / "run")
    recipe, route = write_recipe(settings, tmp_path / "recipe.yaml"), precision.fastest_route()

    def as_here():  # on a busy machine another measurement may choose otherwise
        precision.fastest_route = lambda: route

    child = run("run", "--config", recipe, log=tmp_path / "log", before=as_here)
    assert child.reaches("save", 2)
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "final").exists()
    pretrain(settings, resume=True)
    assert not differences(whole_run, tmp_path / "run")


def test_a_resumed_run_keeps_the_precision_it_measured(small_store, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr("encoderkit.encoder.precision.has_bf16", lambda device: True)
    monkeypatch.setattr("encoderkit.encoder.precision.bf16_speedup", lambda: 2.0)
    monkeypatch.setattr("encoderkit.pretrain.step_log.peak_flops", lambda *_: None)  # slow in bf16
    with stop_before(7):
        pretrain(make_settings(small_store, out, precision="auto"))
    monkeypatch.setattr("encoderkit.encoder.precision.bf16_speedup", lambda: 0.5)
    assert main(["run", "--resume", str(out)]) == 0
    assert json.loads((out / "run.json").read_text())["bits"]["precision"] == "bf16"


def test_a_run_from_counted_token_vectors_resumes_to_the_same_bits(small_store, tmp_path):
    model = dataclasses.replace(MODEL, token_vectors="cooccurrence")
    whole, cut = (make_settings(small_store, tmp_path / name, model=model) for name in ("whole", "cut"))
    pretrain(whole)
    for at, resume in ((2, False), (9, True)):  # before the first checkpoint, and after it
        with stop_before(at):
            pretrain(cut, resume=resume)
    pretrain(cut, resume=True)
    assert not differences(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("workers", [0, 2])
def test_length_and_batch_size_change_on_the_way_and_resume_to_the_same_bits(workers, small_store, tmp_path):
    def make(name, workers=0):
        lengths, ramp = [(0.4, 16)], [(0.2, 128), (0.6, 256)]
        data = Data(store=str(small_store), max_tokens=32, length_curriculum=lengths, row_tokens=64, workers=workers)
        return make_settings(small_store, tmp_path / name, data=data, budget=Budget(tokens=6000), batch_ramp=ramp)

    pretrain(make("whole"))
    stages = [record for record in read_log(tmp_path / "whole") if record["kind"] == "stage"]
    # 10 steps of 128 tokens are just over 20%, 5 more of 256 over 40%, 5 more over 60%.
    assert [(record["step"], record["max_tokens"], record["batch_rows"]) for record in stages] == [
        (11, 16, 4), (16, 32, 4), (21, 32, 8)
    ]  # fmt: skip
    for at, resume in ((12, False), (19, True)):
        with stop_before(at):
            pretrain(make("cut", workers), resume=resume)
    pretrain(make("cut", workers), resume=True)
    assert not differences(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses_other_settings(whole_run, small_store):
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        pretrain(make_settings(small_store, whole_run, seed=1), resume=True)


def test_resume_refuses_another_corpus_at_the_same_place(small_store, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    settings = make_settings(store, tmp_path / "run")
    with stop_before(8):
        pretrain(settings)
    arrow = next(store.rglob("*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:])
    with pytest.raises(InputError, match="another checksum"):
        pretrain(settings, resume=True)
    shutil.rmtree(store)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"the old cat likes the dog {'and the fox ' * n}" for n in range(99))
    )
    prepare([str(tmp_path / "text.txt")], tokenizer=small_store / "tokenizer", out=store, held_out=0.1)
    with pytest.raises(InputError, match=r"data was .* resume with the store of the run"):
        pretrain(settings, resume=True)


def test_resume_refuses_to_start_over_when_every_checkpoint_is_damaged(small_store, tmp_path):
    settings = make_settings(small_store, tmp_path / "run")
    with stop_before(8):
        pretrain(settings)
    (tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint is whole"):
        pretrain(settings, resume=True)
    assert len(read_log(tmp_path / "run")) > 1
