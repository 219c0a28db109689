"""Corpora: what is a document, and where exactly a bad input is bad."""

import gzip
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import corpora, corpus_files, python_docs
from encoderkit.pretrain.corpora import Corpora, CorpusSpec, Document, Reading, open_corpus
from encoderkit.pretrain.corpus_files import Interrupted


def texts(source, **options):
    return [document.text for document in open_corpus(CorpusSpec(source=str(source), **options))]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("blank-line", ["one\ntwo\n", "three"]),
        ("line", ["one\n", "two\n", "three"]),
        ("file", ["one\ntwo\n\n \n\nthree"]),
    ],
)
def test_documents_of_a_text_file(tmp_path, documents, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \n\nthree")
    assert texts(tmp_path / "a.txt", documents=documents) == expected


def test_ids_are_unique_and_do_not_name_the_folder_above(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("x\n\ny\n\nz")
    (folder / "deep/a.md").write_text("w")
    (folder / "ignored.bin").write_bytes(b"\0")
    documents = list(open_corpus(CorpusSpec(source=str(folder))))
    assert [d.id for d in documents] == ["corpus/b.txt#0", "corpus/b.txt#1", "corpus/b.txt#2", "corpus/deep/a.md#0"]


def test_jsonl_gz_parquet_and_globs(tmp_path):
    rows = [{"body": "one"}, {"body": "two"}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"body": "three"}\n\n')
    pq.write_table(pa.table({"body": ["four", None, " "]}), tmp_path / "c.parquet")
    assert texts(tmp_path / "*.jsonl*", text_column="body") == ["one", "two", "three"]
    reading = Reading()
    spec = CorpusSpec(source=str(tmp_path), text_column="body")
    assert [d.text for d in open_corpus(spec, reading)] == ["one", "two", "three", "four"]
    assert reading.dropped == {"blank": 2, "null": 1}


def test_blank_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\n \n")
    read = Corpora([str(tmp_path / "a.txt")], documents="line")
    assert [d.text for d in read] == ["one\n"]
    assert read.reading.dropped == {"blank": 3}


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_corpus_has_0_usable_documents(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(InputError, match="0 usable documents"):
        list(Corpora([str(tmp_path / "a.txt")]))


def test_a_byte_order_mark_is_stripped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


BAD_BYTES = [
    ("a.txt", b"good\n\nbad \xff byte", r"a\.txt: byte 10 \(0xff\) is not UTF-8"),
    ("a.txt", b"good\n\nlate \xe2\x82", r"a\.txt: byte 11 \(0xe2\) is not UTF-8"),
    ("a.txt", b"\xef\xbb\xbfg\x00od", r"a\.txt: byte 4 is NUL"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl: byte 24 \(0xff\) is not UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"line 2: column text holds int"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2 is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y", "n": 1}\n', r"line 2: no column text; present: body, n"),
    ("a.jsonl", b'["text"]\n', r"line 1 holds list"),
    ("a.jsonl", b'{"text": "a\\u0000b"}\n', r"line 1 holds a NUL character at position 1"),
    ("a.jsonl", b'{"text": "a\\ud800b"}\n', r"line 1 holds half of a surrogate pair at position 1"),
    ("a.jsonl", b"[" * 100_000, r"line 1"),
    ("a.parquet", b"PAR1 not really", r"a\.parquet is not a whole Parquet file"),
    ("a.txt.gz", b"\x1f\x8b\x08\x00cut", r"a\.txt\.gz is not a whole gzip file"),
    ("a.doc", b"x", r"a\.doc: unknown kind of file"),
    ("a.txt.zst", b"(\xb5/\xfdcut", r"a\.txt\.zst is not a whole zstd file"),
    ("a.csv", b"text,n\nx,1\ny\n", r"a\.csv: line 3 has 1 cells; expected 2"),
    ("a.csv", b'text\n"x\n', r"a\.csv: the row at line 2 is not CSV"),
    ("a.csv", b"body\nx\n", r"a\.csv: line 2: no column text; present: body"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_BYTES)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts(tmp_path / name)


def test_a_file_whose_name_is_no_text_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with pytest.raises(InputError, match=r"caf\?.txt: the file's name is no UTF-8; rename it"):
        texts(tmp_path)


@pytest.mark.parametrize("rows_together", [100, 4000])
def test_a_parquet_file_is_not_held_in_memory(tmp_path, rows_together):
    path = tmp_path / "a.parquet"
    column = [random.Random(i).randbytes(2000).hex() for i in range(4000)]  # 16 MB that hardly compress
    pq.write_table(pa.table({"text": column}), path, row_group_size=rows_together, use_dictionary=False)
    before, most = pa.total_allocated_bytes(), 0
    for number, document in enumerate(open_corpus(CorpusSpec(source=str(path)))):
        assert document.text == column[number]
        most = max(most, pa.total_allocated_bytes() - before)
    assert number == 3999
    assert most < path.stat().st_size / 2


def test_a_parquet_column_is_missing_or_of_another_type(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column text; present: body, n"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column n holds int; expected text"):
        texts(tmp_path / "a.parquet", text_column="n")


@pytest.mark.parametrize("documents", ["line", "blank-line", "file"])
def test_a_document_over_the_limit_is_refused_before_it_is_held(tmp_path, monkeypatch, documents):
    monkeypatch.setattr(corpus_files, "MAX_DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb") as file:  # 50 MB unpacked
        for _ in range(50):
            file.write(b"a" * (1 << 20))
    with pytest.raises(InputError, match=r"byte 0 is over 1 MiB"):
        texts(path, documents=documents)


def test_missing_files_and_empty_globs(tmp_path):
    for source in (tmp_path / "no.txt", tmp_path / "no", "data/no.parquet", "no/", "a/b/c"):
        with pytest.raises(InputError, match="no such file or folder"):
            texts(source)
    with pytest.raises(InputError, match="no file matches"):
        texts(tmp_path / "*.txt")
    with pytest.raises(InputError, match="the folder holds no text"):
        texts(tmp_path)


def test_hub_names_stream_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("owner/corpus") == ["one", "two"]
    assert texts("owner/corpus:small:validation") == ["one", "two"]
    assert asked == [("owner/corpus", None, "train", True), ("owner/corpus", "small", "validation", True)]


def test_an_unreachable_hub_name_is_one_line_of_reason(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("offline\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match="neither a file or folder nor a data set that can be reached: offline\n"):
        texts("owner/corpus")


def test_a_stream_that_breaks_off_can_be_tried_again(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("reset by peer\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    with pytest.raises(
        Interrupted, match="owner/corpus stopped after row 1: reset by peer; run the same command again"
    ):
        texts("owner/corpus")


def test_identity_changes_with_one_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Corpora([str(path)]).inputs()
    path.write_text("onf")
    assert Corpora([str(path)]).inputs() != before


def test_csv_zst_and_tsv(tmp_path):
    table = 'id,text\n1,"one, ""quoted""\nin two lines"\n\n2,two\n'
    wanted = ['one, "quoted"\nin two lines', "two"]
    (tmp_path / "a.csv").write_text(table)
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write(table)
    with pa.CompressedOutputStream(str(tmp_path / "a.csv.zst"), "zstd") as file:
        file.write(table.encode())
    (tmp_path / "a.tsv").write_text("id\ttext\n1\tthree\n")
    for name in ("a.csv", "a.csv.gz", "a.csv.zst"):
        reading = Reading()
        documents = list(open_corpus(CorpusSpec(source=str(tmp_path / name)), reading))
        assert [d.text for d in documents] == wanted
        assert [d.id for d in documents] == [f"{name}#2", f"{name}#5"]
        assert reading.dropped == {"blank": 1}
        assert reading.bytes == (tmp_path / name).stat().st_size
    assert texts(tmp_path / "a.tsv") == ["three"]


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path):
    frames = [pa.compress(line, "zstd", asbytes=True) for line in (b"one\n\n", b"two\n")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert texts(tmp_path / "a.txt.zst") == ["one\n", "two\n"]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames)[:-3])
    with pytest.raises(InputError, match="is not a whole zstd file"):
        texts(tmp_path / "a.txt.zst")


def test_urls_are_read_through_fsspec(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/b.jsonl.gz", gzip.compress(b'{"text": "two"}\n'))
    memory.pipe("/corpus/a.txt", b"one")
    memory.pipe("/corpus/ignored.bin", b"x")
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["three"]}), buffer)
    memory.pipe("/corpus/c.parquet", buffer.getvalue().to_pybytes())
    assert texts("memory://corpus") == ["one", "two", "three"]
    assert texts("memory://corpus/*.gz") == ["two"]
    assert texts("memory://corpus/a.txt") == ["one"]
    (found,) = Corpora(["memory://corpus/a.txt"]).inputs()
    memory.pipe("/corpus/a.txt", b"other")
    assert Corpora(["memory://corpus/a.txt"]).inputs() != [found]
    assert Corpora(["memory://corpus"]).size == sum(map(memory.size, memory.find("/corpus"))) - 1
    for source, message in {
        "memory://corpus/none.txt": "no such file",
        "nothing://x/a.txt": "nothing://x/a.txt cannot be reached",
        "memory://user:secret@corpus/ignored.bin": "memory://corpus/ignored.bin",
    }.items():
        with pytest.raises(InputError, match=message):
            texts(source)


def test_passes_repeat_or_choose_documents(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n\n".join(f"document {i}" for i in range(400)))
    (tmp_path / "b@2.txt").write_text("name with an at sign")
    path = tmp_path / "a.txt"

    def copies(passes):
        read = Corpora([f"{path}@{passes}"])
        return [d.copies for d in read], read.reading.dropped

    assert copies("2") == ([2] * 400, {})
    some, dropped = copies("0.25")
    assert set(some) == {1}
    assert 70 < len(some) == 400 - dropped["left out by @passes"] < 130
    assert set(copies("1.5")[0]) == {1, 2}
    assert [d.copies for d in Corpora([str(tmp_path / "b@2.txt")])] == [1]
    monkeypatch.setattr(python_docs, "python_documents", lambda split: iter([Document("docs#0", "text")]))
    assert [d.copies for d in Corpora(["python-docs@2"])] == [2]
    with pytest.raises(InputError, match="0 passes; expected more than 0"):
        Corpora([f"{path}@0"])


def test_a_data_set_of_local_files_streams(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["one", "two"], "book": [1, 2]}), tmp_path / "train.parquet")
    import datasets

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        return datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"), split=split).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = list(open_corpus(CorpusSpec(source="owner/corpus", group_column="book")))
    assert [(d.id, d.group) for d in found] == [("owner/corpus#0", "1"), ("owner/corpus#1", "2")]


def test_a_file_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    corpora = Corpora([str(tmp_path / "a.txt")])

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    for read in (corpora.inputs, lambda: list(corpora)):
        with pytest.raises(InputError, match=r"a\.txt cannot be opened: Permission denied"):
            read()


def test_a_long_stream_is_read_as_far_as_is_wanted(tmp_path, monkeypatch):
    def rows():
        yield from ({"text": f"row {i}"} for i in range(3))
        raise AssertionError("read too far")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    assert [d.text for d in Corpora(["owner/corpus"], max_documents=3)] == ["row 0", "row 1", "row 2"]


def test_files_of_one_name_in_several_folders_have_ids_of_their_own(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for folder in ("en", "de/new"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(folder)
        memory.pipe(f"/languages/{folder}/a.txt", folder.encode())
    (tmp_path / "b.txt").write_text("b")
    wanted = {"de/new/a.txt#0": "de/new", "en/a.txt#0": "en"}
    listed = [str(tmp_path / folder / "a.txt") for folder in ("en", "de/new")]
    for sources in ([str(tmp_path / "**/a.txt")], ["memory://languages"], listed):
        assert {document.id: document.text for document in Corpora(sources)} == wanted
    # One name, or one folder: no folder is named, so that a store does not depend on where its files lie.
    assert {document.id for document in Corpora([listed[0], str(tmp_path / "b.txt")])} == {"a.txt#0", "b.txt#0"}
    assert {document.id for document in Corpora([listed[0]] * 2)} == {"a.txt#0"}


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_a_document_without_a_group_is_in_no_group(tmp_path, name):
    if name == "a.csv":
        (tmp_path / name).write_text("text,book\none,\ntwo,x\n")
    else:
        pq.write_table(pa.table({"text": ["one", "two"], "book": [None, "x"]}), tmp_path / name)
    documents = open_corpus(CorpusSpec(source=str(tmp_path / name), group_column="book"))
    assert [document.group for document in documents] == [None, "x"]


def test_a_data_set_of_another_commit_is_another_source(monkeypatch):
    from types import SimpleNamespace

    asked = []

    def load_dataset(name, config, *, split, streaming, revision=None):
        asked.append(revision)
        return iter([{"text": "one"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = []
    for commit in ("a" * 40, "b" * 40, None):
        answer = SimpleNamespace(sha=commit)
        monkeypatch.setattr("huggingface_hub.dataset_info", lambda name, timeout, answer=answer: answer)
        corpora.hub_revision.cache_clear()
        read = Corpora(["owner/corpus:small"])
        found += read.inputs()
        assert texts("owner/corpus:small") == ["one"]
    corpora.hub_revision.cache_clear()
    assert [one.get("revision") for one in found] == ["a" * 40, "b" * 40, None] == asked


def test_weights_are_shares_of_the_mixtures_characters(tmp_path):
    for name, count in (("a", 1000), ("b", 200)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i:04}" for i in range(count)))
    read = Corpora([f"{tmp_path}/a.txt@25%", f"{tmp_path}/b.txt@75%"])
    held = dict.fromkeys("ab", 0)
    for document in read:
        held[document.text[0]] += document.copies * len(document.text)
    # Documents are chosen by their ids: 4 sigma of the 300 of a.
    assert held["a"] / sum(held.values()) == pytest.approx(0.25, abs=4 * (300 * 0.7) ** 0.5 / 1200)
    assert sum(held.values()) == pytest.approx(7 * 1200, rel=0.06)  # as many as the sources hold
    passes = [spec.passes for spec in read.specs]
    assert passes == pytest.approx([0.25 * 1.2, 0.75 * 6], rel=0.01)
    told = read.inputs()
    assert [(source["passes"], source["weight"]) for source in told] == [(passes[0], 0.25), (passes[1], 0.75)]


@pytest.mark.parametrize("weights", [("@40%", "@50%"), ("@100%", ""), ("@40%", "@2")])
def test_weights_that_are_no_mixture_are_refused(tmp_path, weights):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text")
    with pytest.raises(InputError, match="expected one for each source, together 100%"):
        Corpora([f"{tmp_path}/{name}.txt{weight}" for name, weight in zip("ab", weights)])


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_file_that_is_named_may_be_one_list(name, tmp_path):
    text = json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (tmp_path / "b.txt").write_text("three")
    assert [(d.id, d.text) for d in Corpora([f"{tmp_path}/{name}"])] == [(f"{name}#0", "one"), (f"{name}#1", "two")]
    in_folder = {document.text for document in Corpora([str(tmp_path)])}
    assert in_folder == ({"one", "two", "three"} if name.endswith(".gz") else {"three"})
    (tmp_path / "bad.json").write_text('[{"text": "one"},\n 3]')
    with pytest.raises(InputError, match="row 1 holds int; expected an object"):
        list(Corpora([f"{tmp_path}/bad.json"]))
