"""prepare goes on where it was killed, and its shares and what has arrived are stores of the same bytes."""

import contextlib
import os
import random
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pyarrow.parquet as pq
import pytest
from reliability.children import fork

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import encode, shards
from encoderkit.pretrain import prepare as prepare_module
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.data_settings import PrepareSettings
from encoderkit.pretrain.merge import merge
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.run_folder import lock_folder
from encoderkit.pretrain.store import Store


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


def test_a_prepare_of_two_processes_killed_at_random_gives_the_same_bytes(
    tmp_path, corpus, tokenizer, small_shards, monkeypatch
):
    corpus.write_text(corpus.read_text() * 4)
    whole = prepare([str(corpus)], tokenizer, tmp_path / "whole", held_out=0.1)
    generator, out, ends, add = random.Random(0), tmp_path / "killed", [], shards.ShardWriter.add

    def prepare_in_a_group():
        os.setsid()
        prepare([str(corpus)], tokenizer, out, held_out=0.1, workers=2)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "add", lambda *arguments: time.sleep(0.01) or add(*arguments))
        for _ in range(5):
            child = fork(prepare_in_a_group, tmp_path / "log")
            assert child.reaches("batch", generator.randint(1, 8)), (tmp_path / "log").read_text()  # of about 50
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


def test_the_command_merges_and_tells_what_is_in_the_store(tmp_path, corpus, tokenizer, shares, capsys):
    one = prepare([str(corpus)], tokenizer, tmp_path / "one", held_out=0.1)
    out = tmp_path / "merged"
    assert main(["merge", *shares[:2], "--out", str(out)]) == 2
    assert "expected each of 1/3, 2/3, 3/3 once" in capsys.readouterr().err
    assert main(["merge", *shares, "--out", str(out)]) == 0
    told = f"{out}: {one['tokens']:,} tokens in {one['num_documents']:,} documents\n"
    assert capsys.readouterr().out == told
    assert Store.open(out, verify=True).hash == Store.open(tmp_path / "one").hash


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
