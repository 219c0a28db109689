"""The benchmark of prepare: what it measures, what it grows, what it refuses."""

import json

import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.bench_prepare import BenchSettings, bytes_of, grow, main


def test_the_same_text_goes_through_prepare_and_datasets(sentence_store, tmp_path, capsys):
    source, tokenizer = sentence_store.parent / "text.txt", sentence_store / "tokenizer"
    argv = [str(source), "--tokenizer", str(tokenizer), "--rounds=1", "--max_documents=40", "--grow_to=20KB"]
    assert main([*argv, "--pieces=5_000", "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    prepared, mapped = ([row for row in rows if row["case"] == case] for case in ("prepare", "datasets.map"))
    assert [row["processes"] for row in prepared] == [row["processes"] for row in mapped] == [1, 2]
    assert all(row["words_per_second"] > 0 and row["peak_bytes"] > 1 << 24 for row in (*prepared, *mapped))
    # prepare holds a document out of each 100, the shortest way to see that both saw the same text.
    assert 0.9 * mapped[0]["tokens"] < prepared[0]["tokens"] <= mapped[0]["tokens"]
    grown, order = rows[-2:]
    assert grown["tokens"] > 3 * prepared[0]["tokens"]
    assert order["pieces"] == 5000
    assert order["seconds"] > 0
    assert order["filled"] > 0.98
    assert "words_per_second" in capsys.readouterr().out


def test_a_grown_corpus_repeats_no_document(tmp_path):
    texts = [f"document {i} of some words that are its own" for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = grow(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 3000)
    grown = [json.loads(line)["text"] for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert grown[:10] == texts
    assert len(set(grown)) == len(grown) > 40
    assert sum(len(text.split()) for text in grown) == words
    assert 3000 <= (tmp_path / "b.jsonl").stat().st_size < 3100


def test_sizes_and_settings_are_checked():
    assert [bytes_of(size) for size in ("300", "20KB", "1.5 MB", "1GB")] == [300, 20_000, 1_500_000, 10**9]
    for size in ("1TB", "much", "0MB"):
        with pytest.raises(InputError, match="expected a size such as 300MB"):
            BenchSettings(sources=["a.txt"], tokenizer="t", grow_to=size)
    for wrong in ({}, {"sources": ["a.txt"]}, {"pieces": 0}, {"pieces": 5, "grow_to": "1GB"}):
        with pytest.raises(InputError, match="expected"):
            BenchSettings(**wrong)
    BenchSettings(pieces=1000)  # needs no text
