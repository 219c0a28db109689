"""prepare: counts what it drops, holds out what it says, writes whole stores or nothing."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pyarrow.parquet as pq
import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import encode, prepare_progress, shards
from encoderkit.pretrain import prepare as prepare_module
from encoderkit.pretrain.data_settings import PrepareSettings, TokenizerSettings, run_prepare, run_tokenizer
from encoderkit.pretrain.merge import merge
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.run_folder import lock_folder
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [f"document {i} says something of its own about number {i * i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer("wordpiece", TEXTS, 80, lowercase=True, out=out)
    return out


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " ", "\u200b"]))
    return path


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


def test_the_same_inputs_give_the_same_store(tmp_path, corpus, tokenizer):
    for name, workers in (("a", 1), ("b", 2)):
        prepare([str(corpus)], tokenizer, tmp_path / name, workers=workers)
    assert Store.open(tmp_path / "a").hash == Store.open(tmp_path / "b").hash


def test_a_held_out_source_is_kept_apart(tmp_path, corpus, tokenizer):
    (tmp_path / "v.txt").write_text("one held out\n\nanother one")
    prepare([str(corpus)], tokenizer, tmp_path / "s", held_out=str(tmp_path / "v.txt"))
    store = Store.open(tmp_path / "s")
    assert [text.strip() for text in store.held_out_texts()] == ["one held out", "another one"]
    assert store.num_documents == 40


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


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 150)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 200)


@pytest.mark.parametrize("seed", range(5))
def test_a_prepare_killed_five_times_gives_the_same_bytes(
    tmp_path, corpus, tokenizer, small_shards, monkeypatch, seed, capsys
):
    whole = prepare([str(corpus)], tokenizer, tmp_path / "whole", held_out=0.1)
    generator, add = random.Random(seed), shards.ShardWriter.add
    for _ in range(5):
        left = generator.randint(0, 8)

        def add_or_die(self, batch, notes):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            add(self, batch, notes)

        monkeypatch.setattr(shards.ShardWriter, "add", add_or_die)
        with contextlib.suppress(KeyboardInterrupt):
            prepare([str(corpus)], tokenizer, tmp_path / "killed", held_out=0.1)
    monkeypatch.setattr(shards.ShardWriter, "add", add)
    assert prepare([str(corpus)], tokenizer, tmp_path / "killed", held_out=0.1) == whole
    assert len(list((tmp_path / "whole/tokens").glob("*.arrow"))) > 3
    assert "going on after" in capsys.readouterr().err
    assert not (tmp_path / ".killed.partial").exists()


def test_a_prepare_killed_at_its_checksums_tokenizes_nothing_again(tmp_path, corpus, tokenizer, monkeypatch):
    whole = prepare([str(corpus)], tokenizer, tmp_path / "whole", held_out=0.1)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "describe_files", die)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(corpus)], tokenizer, tmp_path / "killed", held_out=0.1)
    monkeypatch.setattr(shards.ShardWriter, "add", die)
    assert prepare([str(corpus)], tokenizer, tmp_path / "killed", held_out=0.1) == whole
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert not {"lock", "inputs_hash"} & {path.name for path in (tmp_path / "killed").iterdir()}


SLOW_PREPARE = """
import sys, time
from encoderkit.pretrain import prepare, shards

def add_slowly(self, batch, notes, add=shards.ShardWriter.add):
    print(flush=True)
    time.sleep(0.01)
    add(self, batch, notes)

if __name__ == "__main__":
    prepare.BATCH_CHARACTERS, shards.SHARD_TOKENS, shards.ShardWriter.add = 150, 200, add_slowly
    prepare.prepare([sys.argv[1]], sys.argv[2], sys.argv[3], held_out=0.1, workers=2)
"""


def test_a_prepare_of_two_processes_killed_at_random_gives_the_same_bytes(tmp_path, corpus, tokenizer, small_shards):
    corpus.write_text(corpus.read_text() * 4)
    whole = prepare([str(corpus)], tokenizer, tmp_path / "whole", held_out=0.1)
    generator, out, ends = random.Random(0), tmp_path / "killed", []
    (tmp_path / "child.py").write_text(SLOW_PREPARE)
    command = [sys.executable, str(tmp_path / "child.py"), str(corpus), str(tokenizer), str(out)]
    for _ in range(5):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        assert child.stdout is not None
        for _ in range(generator.randint(1, 8)):  # batches that are tokenized, of about 50
            child.stdout.readline()
        time.sleep(generator.uniform(0, 0.02))
        os.killpg(child.pid, signal.SIGKILL)
        ends.append(child.wait())
    assert ends == [-signal.SIGKILL] * 5
    assert len(list((tmp_path / ".killed.partial/tokens").glob("data-*.arrow"))) > 2
    assert prepare([str(corpus)], tokenizer, out, held_out=0.1, workers=2) == whole


def test_what_arrived_is_a_store_while_the_rest_is_still_read(
    tmp_path, corpus, tokenizer, small_shards, monkeypatch, capsys
):
    kill, add = iter(range(9)), shards.ShardWriter.add

    def add_or_die(self, batch, notes):
        if next(kill) == 8:
            raise KeyboardInterrupt
        add(self, batch, notes)

    def run(out="s", **options):
        return prepare([f"{corpus}@2"], tokenizer, tmp_path / out, held_out=0.1, **options)

    whole = run("whole")
    with pytest.raises(InputError, match="no prepare is under way there"):
        run(arrived=tmp_path / "first")
    monkeypatch.setattr(shards.ShardWriter, "add", add_or_die)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(shards.ShardWriter, "add", add)
    with pytest.raises(InputError, match="made from other sources, settings or tokenizer; give those of its prepare"):
        run(arrived=tmp_path / "first", sentences="none")
    held = lock_folder(tmp_path / ".s.partial")  # it may be running
    manifest = run(arrived=tmp_path / "first")
    os.close(held)
    first, all_of_it = Store.open(tmp_path / "first", verify=True), Store.open(tmp_path / "whole")
    assert 0 < first.num_documents < all_of_it.num_documents
    for document in range(first.num_documents):
        np.testing.assert_array_equal(first.tokens(document), all_of_it.tokens(document))
    ledger = manifest["ledger"]
    for unit in ("documents", "characters"):
        assert manifest["tokenized"][unit] == ledger["trained"][unit]
        assert ledger["read"][unit] + ledger["repeated"][unit] == sum(
            ledger[part][unit] for part in ("trained", "held_out", "left")
        ) + sum(amount[unit] for amount in ledger["dropped"].values())
    held_out = pq.read_table(tmp_path / "first/held_out.parquet").to_pylist()
    assert held_out == pq.read_table(tmp_path / "whole/held_out.parquet").to_pylist()[: len(held_out)] != []
    run(arrived=tmp_path / "first")
    assert "first is up to date" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"arrived is .*, and so is out, which is still written"):
        run(arrived=tmp_path / "s")
    assert len(list((tmp_path / ".s.partial/tokens").glob("data-*.arrow"))) > 0
    assert run() == whole
    with pytest.raises(InputError, match="s is whole; use it"):
        run(arrived=tmp_path / "second")


def test_whole_shards_of_other_inputs_are_not_taken_up(tmp_path, corpus, tokenizer, small_shards, monkeypatch):
    close = shards.ShardWriter.close
    monkeypatch.setattr(shards.ShardWriter, "close", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tokenizer, tmp_path / "s")
    monkeypatch.setattr(shards.ShardWriter, "close", close)
    corpus.write_text(corpus.read_text().replace("document 7", "document 8"))
    prepare([str(corpus)], tokenizer, tmp_path / "s")
    prepare([str(corpus)], tokenizer, tmp_path / "other")
    assert Store.open(tmp_path / "s", verify=True).hash == Store.open(tmp_path / "other").hash


def test_two_prepares_do_not_write_one_store(tmp_path, corpus, tokenizer):
    (tmp_path / ".s.partial").mkdir()
    held = lock_folder(tmp_path / ".s.partial")
    with pytest.raises(InputError, match="in use by process"):
        prepare([str(corpus)], tokenizer, tmp_path / "s")
    os.close(held)


def test_the_number_of_processes_changes_nothing(tmp_path, corpus, tokenizer, small_shards):
    one, two = (prepare([str(corpus)], tokenizer, tmp_path / f"{n}", held_out=0.1, workers=n) for n in (1, 2))
    assert one == two


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


@pytest.fixture
def shares(tmp_path, corpus, tokenizer, small_shards):
    for i in (1, 2, 3):
        prepare([str(corpus)], tokenizer, tmp_path / f"part{i}", held_out=0.1, shard=f"{i}/3")
    return [str(tmp_path / f"part{i}") for i in (3, 1, 2)]


def test_merged_shares_are_the_store_of_one_machine(tmp_path, corpus, tokenizer, shares):
    one = prepare([str(corpus)], tokenizer, tmp_path / "one", held_out=0.1)
    assert merge(shares, tmp_path / "merged") == one
    assert Store.open(tmp_path / "merged", verify=True).manifest == Store.open(tmp_path / "one").manifest
    assert prepare([str(corpus)], tokenizer, tmp_path / "merged", held_out=0.1) == one  # and it is known again


def test_shares_that_do_not_belong_together_are_refused(tmp_path, corpus, tokenizer, shares):
    with pytest.raises(InputError, match="shares 3/3, 1/3 are given; expected each of 1/3, 2/3, 3/3 once"):
        merge(shares[:2], tmp_path / "merged")
    prepare([str(corpus)], tokenizer, tmp_path / "other", held_out=0.2, shard="2/3")
    with pytest.raises(InputError, match="made from other sources"):
        merge([*shares[:2], str(tmp_path / "other")], tmp_path / "merged")
    prepare([str(corpus)], tokenizer, tmp_path / "one", held_out=0.1)
    with pytest.raises(InputError, match="is a whole store"):
        merge([*shares[:2], str(tmp_path / "one")], tmp_path / "merged")
    with pytest.raises(InputError, match="shard is '4/3'"):
        PrepareSettings(sources=["a"], tokenizer="t", out="s", shard="4/3")
    assert not (tmp_path / "merged").exists()


def test_a_group_is_held_out_as_a_whole(tmp_path, tokenizer):
    rows = [{"text": f"document {i} of book {i % 20}", "book": i % 20} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "s", held_out=0.2, held_out_by="book")
    books = [int(text.split()[-1]) for text in Store.open(tmp_path / "s").held_out_texts()]
    assert 1 <= len(set(books)) <= 8
    assert {books.count(book) for book in books} == {10}
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


def test_a_share_may_be_empty(tmp_path, corpus, tokenizer):
    one = prepare([str(corpus)], tokenizer, tmp_path / "one", held_out=0.1)
    parts = [str(tmp_path / f"part{i}") for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        prepare([str(corpus)], tokenizer, part, held_out=0.1, shard=f"{i}/2")
    assert Store.open(parts[1]).num_documents == 0
    assert merge(parts, tmp_path / "merged") == one


def test_merge_leaves_what_a_killed_prepare_has_written(tmp_path, corpus, tokenizer, shares, monkeypatch):
    monkeypatch.setattr(shards.ShardWriter, "close", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tokenizer, tmp_path / "s")
    monkeypatch.undo()
    before = {path.name for path in (tmp_path / ".s.partial/tokens").iterdir()}
    with pytest.raises(InputError, match=r"\.s\.partial holds what a prepare into .* has tokenized so far; go on"):
        merge(shares, tmp_path / "s")
    assert {path.name for path in (tmp_path / ".s.partial/tokens").iterdir()} == before
    prepare([str(corpus)], tokenizer, tmp_path / "s")


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


def test_a_killed_process_leaves_whole_shards_for_the_next_start(
    tmp_path, corpus, tokenizer, small_shards, monkeypatch
):
    def killed(*_, **__):
        raise BrokenProcessPool

    monkeypatch.setattr(encode.ProcessPoolExecutor, "submit", killed)
    with pytest.raises(InputError, match=r"was killed.*run the same command again, with fewer workers"):
        prepare([str(corpus)], tokenizer, tmp_path / "s", workers=2)
    assert (tmp_path / ".s.partial").exists()
    prepare([str(corpus)], tokenizer, tmp_path / "s")
    assert not (tmp_path / ".s.partial").exists()
