"""The command minimal-pairs, from files to figures."""

import gzip
import json

import pytest
import transformers

from encoderkit.encoder.checkpoint import load
from encoderkit.encoder.pseudo_likelihood import packed_logits
from encoderkit.finetune import minimal_pairs
from encoderkit.finetune.__main__ import main
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.minimal_pairs import MinimalPairs, read_pairs, sample_pairs

ROWS = [
    {"good": "the cat sees a dog", "bad": "the cat see a dog", "uid": "agreement", "field": "syntax"},
    {"good": "a bird eats", "bad": "a bird eats eats", "uid": "agreement", "field": "syntax"},
    {"good": "one tree is red", "bad": "one tree is not", "uid": "colour", "field": "semantics"},
]


@pytest.fixture
def files(tmp_path):
    """The same pairs in both shapes; the second file has no paradigm."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    other = [{"sentence_good": row["good"], "sentence_bad": row["bad"], "UID": ""} for row in ROWS]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)))
    return [str(tmp_path / "all.jsonl.gz"), str(tmp_path / "other.jsonl")]


def test_table_and_files(model_folder, files, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["minimal-pairs", model_folder, "--data", *files, "--out", str(out), "--batch_tokens", "32"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("agreement", "colour", "other", "semantics", "within word"))
    found = json.loads((out / "results.json").read_text())
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == found["pairs"] == 6
    assert [pairs[i]["original"] for i in range(3)] == [pairs[i]["original"] for i in range(3, 6)]
    for line in found["by_paradigm"]:
        mine = [pair for pair in pairs if pair["paradigm"] == line["paradigm"]]
        assert line["pairs"] == len(mine)
        assert line["original"] == sum(pair["original"][0] > pair["original"][1] for pair in mine) / len(mine)
    assert found["original"] == pytest.approx(sum(line["original"] for line in found["by_paradigm"]) / 3)
    assert main(argv) == 2  # the folder is in use


def test_a_comparison_with_transformers_passes_or_fails(model_folder, files, capsys, monkeypatch):
    argv = ["minimal-pairs", model_folder, "--data", *files, "--check", "4"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "4 pairs: largest difference from transformers" in shown
    assert "times as fast as one masked copy at a time" in shown
    assert "agreement" not in shown
    real = minimal_pairs.one_at_a_time
    monkeypatch.setattr(
        minimal_pairs, "one_at_a_time", lambda *a: {name: value + 2e-4 for name, value in real(*a).items()}
    )
    assert main(argv) == 1
    assert "nats; expected at most 0.0001" in capsys.readouterr().err
    assert main([*argv, "--out", "x"]) == 2


def test_any_masked_language_model_of_transformers(tokenizer, files, tmp_path, capsys):
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    transformers.DistilBertForMaskedLM(config).save_pretrained(tmp_path / "distil")
    tokenizer.save_pretrained(tmp_path / "distil")
    assert main(["minimal-pairs", str(tmp_path / "distil"), "--data", *files]) == 0
    assert "by transformers' own forward pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"good": "a"}\n', ["a.jsonl: line 1: no columns good and bad, or sentence_good and sentence_bad"]),
        ('{"good": "a", "bad": "b"}\n{"good": "a", "bad": 3}\n', ["line 2: column bad holds no text"]),
        ('{"good": "a", "bad": "\\ud800"}\n', ["line 1: column bad holds half of a surrogate pair at position 0"]),
        ("\n", ["0 pairs"]),
        ("{\n", ["line 1 is not JSON"]),
    ],
)
def test_bad_rows_are_named(content, words, tmp_path, modern_folder, capsys):
    (tmp_path / "a.jsonl").write_text(content)
    assert main(["minimal-pairs", modern_folder, "--data", str(tmp_path / "a.jsonl")]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told


def test_a_field_that_is_spelled_in_two_ways_is_one(tmp_path):
    rows = [{**ROWS[0], "field": field} for field in ("syntax/semantics", "syntax_semantics")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert {pair.field for pair in read_pairs([str(tmp_path / "pairs.jsonl")])} == {"syntax_semantics"}


def test_long_sentences_are_refused(tmp_path, modern_folder, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"good": "cat " * 80, "bad": "dog"}))
    assert main(["minimal-pairs", modern_folder, "--data", str(tmp_path / "a.jsonl")]) == 2
    assert "sentence 1 has 82 tokens; the model takes at most 64" in capsys.readouterr().err


def test_a_sample_is_the_same_whatever_the_order(files):
    pairs = read_pairs(files[:1])
    kept = sample_pairs(pairs, 2)
    assert len(kept) == 2
    assert {pair.good for pair in sample_pairs(pairs[::-1], 2)} == {pair.good for pair in kept}
    assert sample_pairs(pairs, 10) == pairs


def test_scores_are_in_the_order_of_the_pairs(files, modern_folder, tokenizer):
    pairs, logits = read_pairs(files[:1]), packed_logits(load(modern_folder))
    whole = MinimalPairs.of(pairs, tokenizer, 64).score(logits)["original"]
    for i, pair in enumerate(pairs):
        alone = MinimalPairs.of([pair], tokenizer, 64).score(logits)["original"]
        assert whole[i] == pytest.approx(alone[0], abs=1e-5)
    with pytest.raises(InputError, match="sentence 1 has"):
        MinimalPairs.of(pairs, tokenizer, 4)
