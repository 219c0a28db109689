"""Runs that learn sentence pairs: resuming, accumulation and ranks change nothing, and what is told and exported."""

from pathlib import Path

import pytest
import tiny_run
import torch
from reliability.children import run_ranks
from tiny_run import differences, read_log, stop_before, write_recipe
from transformers import AutoModelForPreTraining, AutoTokenizer, BertForPreTraining

from encoderkit.encoder import TokenBatch, load
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.job import build_job
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.settings import Budget, Checkpoints, Data, Log, Masking, Model, PretrainSettings
from encoderkit.pretrain.store import Store

LOSSES_12_STEPS = 1e-4  # other orders of summation
LOGITS_FP32 = 2e-6
MODEL = Model(preset="bert", hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_positions=128)


def make_settings(store: Path, out: Path, **changes) -> PretrainSettings:
    defaults = {
        "model": MODEL,
        "masking": Masking(rate=0.15, mask_share=0.8, random_share=0.1, select="word"),
        "pairs": "nsp",
        "budget": Budget(steps=12),
        "micro_batch_tokens": 512,
        "checkpoints": Checkpoints(every_steps=5, every_minutes=None),
        "log": Log(every_steps=3),
    }
    return tiny_run.make_settings(store, out, **{**defaults, **changes})


def losses(out: Path) -> list[float]:
    return [record[key] for record in read_log(out) if record["kind"] == "train" for key in ("loss", "pair_loss")]


@pytest.fixture(scope="module")
def whole_run(sentence_store, tmp_path_factory):
    """Without dropout, to compare micro-batches and ranks."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(make_settings(sentence_store, out, model=no_dropout()))
    return out


def no_dropout() -> Model:
    return Model(**{**vars(MODEL), "hidden_dropout": 0.0, "attention_dropout": 0.0})


@pytest.mark.parametrize(("objective", "lengths"), [("nsp", []), ("sop", []), ("nsp", [(0.5, 12)])])
def test_resumed_run_equals_uninterrupted_run(objective, lengths, sentence_store, tmp_path):
    data = Data(store=str(sentence_store), max_tokens=32, length_curriculum=lengths, row_tokens=64, workers=0)
    whole, cut = (
        make_settings(sentence_store, tmp_path / name, pairs=objective, data=data) for name in ("whole", "cut")
    )
    pretrain(whole)
    with stop_before(8):
        pretrain(cut)
    pretrain(cut, resume=True)
    assert not differences(tmp_path / "whole", tmp_path / "cut")


def test_micro_batches_and_workers_change_only_the_order_of_summation(whole_run, sentence_store, tmp_path):
    data = Data(store=str(sentence_store), max_tokens=32, row_tokens=64, workers=1)
    pretrain(make_settings(sentence_store, tmp_path / "run", micro_batch_tokens=64, data=data, model=no_dropout()))
    for a, b in zip(losses(whole_run), losses(tmp_path / "run"), strict=True):
        assert abs(a - b) < LOSSES_12_STEPS


def test_two_processes_learn_what_one_learns(whole_run, sentence_store, tmp_path):
    settings = make_settings(sentence_store, tmp_path / "run", model=no_dropout())
    recipe = write_recipe(settings, tmp_path / "recipe.yaml")
    ranks = run_ranks(2, "run", "--config", recipe, log=tmp_path / "log")
    assert [rank.wait() for rank in ranks] == [0, 0], (tmp_path / "log").read_text()[-3000:]
    for a, b in zip(losses(whole_run), losses(tmp_path / "run"), strict=True):
        assert abs(a - b) < LOSSES_12_STEPS


def test_pairs_are_told_and_exported(sentence_store, tmp_path, capsys):
    out = tmp_path / "run"
    final = pretrain(make_settings(sentence_store, out, budget=Budget(steps=4), log=Log(every_steps=2)))
    end, validation = read_log(out)[-1], [r for r in read_log(out) if r["kind"] == "validation"]
    assert 0 < end["pair_accuracy"] < 1
    assert end["pair_count"] > 60
    assert {"pair_loss", "pair_accuracy"} <= validation[0].keys()
    assert "sentence pairs (nsp)" in (out / "report.md").read_text()
    told = capsys.readouterr()
    assert "pairs " in told.err
    assert "; pairs " in told.out

    assert main(["export", str(out), "--out", str(tmp_path / "exported")]) == 0
    assert f"accuracy {end['pair_accuracy']:.3f}" in capsys.readouterr().out
    assert "sentence pairs (nsp)" in (tmp_path / "exported" / "README.md").read_text()

    native = AutoModelForPreTraining.from_pretrained(final).eval()
    assert isinstance(native, BertForPreTraining)
    encoded = AutoTokenizer.from_pretrained(final)("Cat dog.", "Red blue pink.", return_tensors="pt")
    ids, types = encoded["input_ids"][0].tolist(), encoded["token_type_ids"][0].tolist()
    with torch.no_grad():
        found, ours = native(**encoded), load(final)
        scores = ours.logits(TokenBatch.from_sequences([ids], targets=[dict(enumerate(ids))], token_types=[types]))
        pair = ours.pair_logits(TokenBatch.from_sequences([ids], token_types=[types]))
    assert (found.prediction_logits[0] - scores).abs().max() < LOGITS_FP32
    assert (found.seq_relationship_logits - pair).abs().max() < LOGITS_FP32


def test_held_out_pairs_are_fixed_and_of_other_documents_than_those_trained_on(sentence_store, tmp_path):
    first, other = (
        build_job(make_settings(sentence_store, tmp_path / str(seed), seed=seed), resume=False) for seed in (0, 1)
    )
    for a, b in zip(first.held_out.pairs, other.held_out.pairs, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.pair_labels, b.pair_labels)
        assert int(a.segments.longest) <= 128
        assert (a.input_ids[a.segments.cu_seqlens[:-1].long()] == 2).all()
        assert ((a.input_ids == 3).sum() == 2 * len(a.pair_labels)).item()
    first.run.close()
    other.run.close()


@pytest.mark.parametrize("preset", ["roberta", "modern"])
def test_a_preset_gets_the_pair_head_and_two_token_types(preset, sentence_store, tmp_path):
    model = Model(**{**vars(MODEL), "preset": preset})
    job = build_job(make_settings(sentence_store, tmp_path / "run", model=model), resume=False)
    assert (job.model.config.sentence_pairs, job.model.config.token_types) == (True, 2)
    assert all(p.requires_grad for p in job.model.parameters())
    job.run.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Model(**{**vars(MODEL), "token_types": 1})}, "model.token_types is 1, but pairs is nsp"),
        ({"model": Model(**{**vars(MODEL), "sentence_pairs": False})}, "model.sentence_pairs is false"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_is_written(changes, message, sentence_store, tmp_path):
    with pytest.raises(InputError, match=message):
        pretrain(make_settings(sentence_store, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_store_without_sentences_is_refused(small_store, tmp_path):
    assert Store.open(small_store).num_documents > 1  # of one sentence each
    with pytest.raises(InputError, match="no piece of the store holds two sentences"):
        pretrain(make_settings(small_store, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
