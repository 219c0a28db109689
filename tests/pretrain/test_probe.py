"""The fixed probe: the same questions for every recipe, scored the same packed, padded and one by one."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.data_settings import EvalSettings
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.probe import (
    evaluate_probe_hf,
    probe_batches,
    probe_sequences,
    probe_targets,
    run_eval,
    unigram_entropy,
)
from encoderkit.pretrain.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [" ".join(f"word{(i * j * 7) % 53} stands here" for j in range(1, 4 + 20 * (i % 6))) for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer("wordpiece", TEXTS, 90, lowercase=True, out=out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return BertForMaskedLM(config).train()


def original(sequence):
    return [sequence.targets.get(p, token) for p, token in enumerate(sequence.input_ids)]


def test_questions_are_15_percent_all_masked_and_lose_no_text(tokenizer):
    sequences = probe_sequences(TEXTS, tokenizer, 0)
    tokens = sum(len(s.input_ids) - 2 for s in sequences)
    # floor(0.15 n + u) of each piece has mean 0.15 n and spread below 1/2.
    assert abs(len(probe_targets(sequences)) - 0.15 * tokens) < 4 * math.sqrt(len(sequences)) / 2 + 3
    for s in sequences:
        assert len(s.input_ids) <= 128
        assert s.input_ids[0] == 2
        assert s.input_ids[-1] == 3
        assert {p for p, token in enumerate(s.input_ids) if token == 4} == set(s.targets)
        assert min(s.targets.values()) > 4
    text = [token for s in sequences for token in original(s)[1:-1]]
    assert text == [t for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"] for t in ids]


def test_a_document_is_asked_the_same_whatever_else_is_held_out(tokenizer):
    alone = probe_sequences(TEXTS[5:6], tokenizer, 0)
    among = probe_sequences(TEXTS, tokenizer, 0)
    assert all(s in among for s in alone)
    assert probe_sequences(TEXTS, tokenizer, 0) == among
    assert probe_sequences(TEXTS, tokenizer, 1) != among


def test_a_large_held_out_set_is_bounded_by_whole_documents(tokenizer):
    few = probe_sequences(TEXTS, tokenizer, 0, max_tokens=500)
    assert 0 < sum(len(s.input_ids) - 2 for s in few) <= 500
    assert all(s in probe_sequences(TEXTS, tokenizer, 0) for s in few)


def test_nothing_to_predict_is_an_error(tokenizer):
    with pytest.raises(InputError, match="no token to predict"):
        probe_sequences(["☃"], tokenizer, 0)


def test_unigram_entropy_is_the_cross_entropy_of_smoothed_counts():
    counts = np.array([0, 3, 1])
    expected = -(2 * math.log(4 / 7) + math.log(1 / 7)) / 3
    assert unigram_entropy(counts, np.array([1, 1, 0])) == pytest.approx(expected, rel=1e-12)


def test_batches_hold_every_target_once_shortest_first(tokenizer):
    sequences = probe_sequences(TEXTS, tokenizer, 0)
    batches = probe_batches(sequences, 300)
    lengths = [n for b in batches for n in b.segments.lengths.tolist()]
    assert lengths == sorted(len(s.input_ids) for s in sequences)
    assert all(len(b.input_ids) <= 300 for b in batches)
    assert sorted(t for b in batches for t in b.targets.tolist()) == sorted(probe_targets(sequences).tolist())
    assert all((b.input_ids[b.target_positions] == 4).all() for b in batches)


def test_padded_scores_equal_one_by_one(model, tokenizer):
    sequences = probe_sequences(TEXTS, tokenizer, 0)
    score = evaluate_probe_hf(model, sequences, pad_token_id=0, batch_tokens=1000)
    assert model.training
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        model.eval()
        for s in sequences:
            logits = model(input_ids=torch.tensor([s.input_ids])).logits[0, list(s.targets)].double()
            targets = torch.tensor(list(s.targets.values()))
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            correct += int((logits.argmax(1) == targets).sum())
            count += len(targets)
        model.train()
    assert score.count == count
    assert score.loss == pytest.approx(loss / count, abs=1e-5)  # fp32 logits
    assert score.accuracy == pytest.approx(correct / count, abs=1e-9)
    assert score.loss == pytest.approx(math.log(90), rel=0.05)  # an untrained model knows nothing


def test_eval_prints_the_score_of_a_model_folder(tmp_path, folder, tokenizer, model, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    prepare([str(tmp_path / "a.txt")], folder, tmp_path / "s", held_out=0.2)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    capsys.readouterr()
    run_eval(EvalSettings(model=str(tmp_path / "m"), store=str(tmp_path / "s")))
    told = capsys.readouterr().out
    assert "4.500" in told  # ln 90
    assert "unigram" in told
    assert "does not compare" not in told


def test_a_model_with_fewer_types_than_its_tokenizer_is_refused(tmp_path, folder, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    prepare([str(tmp_path / "a.txt")], folder, tmp_path / "s")
    config = BertConfig(vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="the tokenizer has 90 tokens and the model 80"):
        run_eval(EvalSettings(model=str(tmp_path / "m"), store=str(tmp_path / "s")))
    with pytest.raises(InputError, match="not a model that transformers can open"):
        run_eval(EvalSettings(model=str(folder), store=str(tmp_path / "s")))
