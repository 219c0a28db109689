"""prepare: counts what it drops, holds out what it says, writes whole stores or nothing."""

import json
import re

import pytest
from tiny_run import TEXTS

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import prepare as prepare_module
from encoderkit.pretrain import prepare_progress
from encoderkit.pretrain.data_settings import PrepareSettings, TokenizerSettings
from encoderkit.pretrain.prepare import prepare, run_prepare
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import load_tokenizer, run_tokenizer


def test_the_manifest_counts_everything(tmp_path, corpus, tokenizer):
    manifest = prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=0.1)
    assert manifest["num_documents"] == 36
    assert manifest["num_held_out"] == 4
    assert manifest["dropped"] == {"blank": 1, "without tokens": 1}
    assert manifest["sources"][0]["files"][0]["size"] == corpus.stat().st_size
    store = Store.open(tmp_path / "s", verify=True)
    assert store.manifest == json.loads(json.dumps(manifest))
    assert set(store.held_out_texts()) < set(TEXTS)
    assert manifest["tokens"] == store.num_tokens


def test_a_second_run_does_nothing_and_another_input_is_refused(tmp_path, corpus, tokenizer, capsys):
    first = prepare([str(corpus)], tokenizer, tmp_path / "s")
    stamp = (tmp_path / "s/manifest.json").stat().st_mtime_ns
    assert prepare([str(corpus)], tokenizer, tmp_path / "s") == first
    assert "is up to date" in capsys.readouterr().err
    assert (tmp_path / "s/manifest.json").stat().st_mtime_ns == stamp
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    same = corpus.rename(moved / corpus.name)
    assert prepare([str(same)], tokenizer, tmp_path / "s") == first
    same.write_text(same.read_text().replace("document 7", "document 8"))
    with pytest.raises(InputError, match="made from other sources"):
        prepare([str(same)], tokenizer, tmp_path / "s")


@pytest.mark.parametrize(
    "other", [{"held_out": 0.2}, {"duplicates": "exact"}, {"sentences": "de"}, {"documents": "line"}, {"shard": "1/2"}]
)
def test_another_setting_is_another_store(tmp_path, corpus, tokenizer, other):
    prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=0.1)
    with pytest.raises(InputError, match="made from other sources, settings or tokenizer"):
        prepare([str(corpus)], tokenizer, tmp_path / "s", **{"held_out": 0.1} | other)


def test_a_held_out_source_is_kept_apart(tmp_path, corpus, tokenizer):
    (tmp_path / "v.txt").write_text("one held out\n\nanother one")
    prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=str(tmp_path / "v.txt"))
    store = Store.open(tmp_path / "s")
    assert [text.strip() for text in store.held_out_texts()] == ["one held out", "another one"]
    assert store.num_documents == 40


@pytest.mark.parametrize("again", ["corpus.txt", "corpus.txt@2", "*.txt", "link.txt"])
@pytest.mark.parametrize("held_out", [True, False])
def test_a_file_is_read_by_one_source(again, held_out, tmp_path, tokenizer):
    (tmp_path / "corpus.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "link.txt").symlink_to(tmp_path / "corpus.txt")
    sources, other = [f"{tmp_path}/corpus.txt"], f"{tmp_path}/{again}"
    options = {"held_out": other} if held_out else {"held_out": 0.1}
    advice = "give another source as held_out" if held_out else "leave it out of one of them"
    with pytest.raises(InputError, match=rf"(corpus|link)\.txt is read by .* and by .*; {advice}"):
        prepare(sources if held_out else [*sources, other], tokenizer, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_a_small_corpus_holds_out_at_least_one_document(tmp_path, corpus, tokenizer, share):
    manifest = prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=share)
    assert manifest["num_held_out"] == max(1, round(42 * share) if share < 0.5 else 20)


def test_text_that_spells_special_tokens_stays_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("say [MASK] and [SEP] about [PAD]\n\nmore")
    prepare([str(tmp_path / "a.txt")], tokenizer, tmp_path / "s", held_out=0.5)
    store = Store.open(tmp_path / "s")
    special = [load_tokenizer(tokenizer).convert_tokens_to_ids(t) for t in ("[MASK]", "[SEP]", "[PAD]", "[CLS]")]
    assert store.unigram_counts[special].sum() == 0
    assert store.num_tokens > 0


def test_special_ids_that_slip_through_become_unknown(tmp_path):
    # A tokenizer that splits at spaces finds "[MASK]" in its vocabulary like any word.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "say": 5}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    named = {f"{role}_token": token for role, token in roles.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(tmp_path / "t")
    (tmp_path / "a.txt").write_text("say [MASK] say\n\nsay [MASK]")
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "t", tmp_path / "s", held_out=0.5)
    assert manifest["special_in_text"] == 1
    assert Store.open(tmp_path / "s").tokens(0).tolist() in ([5, 1, 5], [5, 1])


def test_failures_leave_nothing_behind(tmp_path, corpus, tokenizer, monkeypatch):
    corpus.write_text(corpus.read_text() + "{\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="line 43 is not JSON"):
        prepare([str(corpus)], tokenizer, tmp_path / "s")
    assert sorted(tmp_path.iterdir()) == before

    def no_space(*_, **__):
        raise OSError(28, "No space left")

    monkeypatch.setattr(prepare_module, "describe_files", no_space)
    corpus.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": "as well"}))
    with pytest.raises(InputError, match="cannot be written: No space left"):
        prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=0.5)
    monkeypatch.undo()  # a full disk is not the input's fault: what was tokenized waits for the next run
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", ".s.partial"}
    prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=0.5)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "s"}


def test_no_document_and_no_character_is_lost(tmp_path, corpus, tokenizer):
    manifest = prepare([f"{corpus}@2.5"], tokenizer, tmp_path / "s", held_out=0.1)
    ledger = manifest["ledger"]
    for unit in ("documents", "characters"):
        dropped = sum(amount[unit] for amount in ledger["dropped"].values())
        assert ledger["read"][unit] + ledger["repeated"][unit] == (
            ledger["trained"][unit] + ledger["held_out"][unit] + dropped
        )
    assert ledger["read"] == {"documents": 42, "characters": sum(map(len, [*TEXTS, " ", "\u200b"]))}
    store = Store.open(tmp_path / "s")
    given = manifest["tokenized"]
    assert given["documents"] == store.num_documents + given["without_tokens"]["documents"]
    assert {given[unit] == ledger["trained"][unit] for unit in ("documents", "characters")} == {True}
    texts = {tuple(store.tokens(d).tolist()) for d in range(store.num_documents)}
    assert len(texts) == 36  # every one that is not held out, two or three times
    assert 2 * 36 < store.num_documents < 3 * 36


def test_bad_settings_are_named(tmp_path, corpus, tokenizer):
    with pytest.raises(InputError, match=r"held_out is 0\.9"):
        prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=0.9)
    with pytest.raises(InputError, match="sources is empty"):
        PrepareSettings(sources=[], tokenizer="t", out="s")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="in use"):
        prepare([str(corpus)], tokenizer, tmp_path / "s")
    (tmp_path / "one.txt").write_text("only one")
    with pytest.raises(InputError, match="0 documents to train on, 1 held out"):
        prepare([str(tmp_path / "one.txt")], tokenizer, tmp_path / "t")


def test_the_commands_say_what_they_made(tmp_path, corpus, capsys):
    run_tokenizer(TokenizerSettings(sources=[str(corpus)], out=str(tmp_path / "t"), vocab_size=80))
    run_prepare(PrepareSettings(sources=[str(corpus)], tokenizer=str(tmp_path / "t"), out=str(tmp_path / "s")))
    told = capsys.readouterr().out
    assert "80 types" in told
    assert "held out; dropped: 1 blank, 1 without tokens" in told


def test_a_group_is_held_out_as_a_whole(tmp_path, tokenizer):
    rows = [{"text": f"document {i} of book {i % 20}", "book": i % 20} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "s", held_out=0.2, held_out_by="book")
    books = [int(text.split()[-1]) for text in Store.open(tmp_path / "s").held_out_texts()]
    assert 1 <= len(set(books)) <= 8
    assert {books.count(book) for book in books} == {10}
    (tmp_path / "c.jsonl").write_text('{"text": "a", "book": "\\ud800"}\n')
    with pytest.raises(InputError, match=r"line 1 holds half of a surrogate pair at position 0"):
        prepare([str(tmp_path / "c.jsonl")], tokenizer, tmp_path / "t", held_out=0.2, held_out_by="book")
    with pytest.raises(InputError, match="no column author; present: text, book; set held_out_by"):
        prepare([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "t", held_out_by="author")
    with pytest.raises(InputError, match=r"held_out_by is book, and held_out .*b.jsonl names what is held out"):
        prepare(
            [str(tmp_path / "a.jsonl")],
            tokenizer,
            tmp_path / "t",
            held_out=str(tmp_path / "b.jsonl"),
            held_out_by="book",
        )


def test_the_passes_of_a_mixture_are_told(tmp_path, corpus, tokenizer, capsys):
    (tmp_path / "b.txt").write_text("\n\n".join(TEXTS[:10]))
    sources = [f"{corpus}@50%", f"{tmp_path}/b.txt@50%"]
    manifest = prepare(sources, tokenizer, tmp_path / "s", held_out=0.1)
    told = capsys.readouterr().err
    for source in manifest["sources"]:
        assert f"{source['source']}: 50% of the characters, {source['passes']:.4g} passes" in told
    assert prepare(sources, tokenizer, tmp_path / "s", held_out=0.1) == manifest
    with pytest.raises(InputError, match="made from other sources"):
        prepare([f"{corpus}@40%", f"{tmp_path}/b.txt@60%"], tokenizer, tmp_path / "s", held_out=0.1)


def test_the_size_is_told_before_the_work(tmp_path, corpus, tokenizer, capsys):
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) * 20)
    manifest = prepare([str(corpus)], tokenizer, tmp_path / "s")
    told = re.search(r"1 source of [\d.]+ KB: about ([\d,]+) tokens, ([\d.]+) KB of store", capsys.readouterr().err)
    assert float(told[1].replace(",", "")) == pytest.approx(manifest["tokens"], rel=0.1)
    stored = sum(file["size"] for name, file in manifest["files"].items() if name.endswith(".arrow"))
    assert float(told[2]) == pytest.approx(stored / 1000, rel=0.2)


def test_lines_tell_how_far_it_is_and_the_time_left(tmp_path, corpus, tokenizer, small_shards, monkeypatch, capsys):
    monkeypatch.setattr(prepare_progress, "SECONDS_BETWEEN_LINES", 0.0)
    prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=0.5)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("left")]
    assert len(lines) > 3
    shares = [int(re.fullmatch(r"[\d,]+ tokens, (\d+)%, \d s left", line)[1]) for line in lines]
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_the_store_stays_within_a_quarter_more_than_its_tokens(tmp_path, tokenizer):
    text = " ".join(TEXTS)
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} {text}. And {text}." for i in range(60)))
    manifest = prepare([str(tmp_path / "a.txt")], tokenizer, tmp_path / "s")
    stored = sum(file["size"] for name, file in manifest["files"].items() if name.startswith("tokens/"))
    assert stored <= 1.25 * 2 * manifest["tokens"]
