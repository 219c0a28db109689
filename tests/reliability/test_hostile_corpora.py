"""Texts and labelled rows from a stranger: nothing outside their folder is read, memory and disk stay bounded.

Bombs are shown to be live: with the guard taken away they fill memory.
"""

import gzip
import itertools
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpora import Corpora

MOST_MEMORY = 512 << 20  # bytes, the process itself included


def test_links_out_of_a_corpus_are_not_read(tmp_path):
    (tmp_path / "secret.txt").write_text("the secret")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a cat")
    (tmp_path / "corpus" / "b.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"b.txt links to .*secret.txt, outside .*corpus; give that file"):
        list(Corpora([str(tmp_path / "corpus")]))
    (tmp_path / "corpus" / "b.txt").unlink()
    (tmp_path / "corpus" / "b.txt").symlink_to("a.txt")  # within the folder
    assert [document.text for document in Corpora([str(tmp_path / "corpus")])] == ["a cat", "a cat"]


def test_archives_are_not_unpacked(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../outside.txt", "outside")
        archive.writestr("inside.txt", "inside")
    for name in ("a.zip", "a.tar.gz", "a.tgz"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match="unknown kind of file"):
            Corpora([str(tmp_path / name)])
    before = sorted(path.name for path in tmp_path.parent.rglob("*"))
    found = [document.text for document in Corpora([f"zip://*.txt::{tmp_path}/a.zip"])]  # read where it lies
    assert "inside" in found
    assert sorted(path.name for path in tmp_path.parent.rglob("*")) == before


MEASURE = """
import resource, sys
from pathlib import Path
from encoderkit.finetune.squad import read_squad_or_file
from encoderkit.finetune.tables import read_file
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import corpus_files
from encoderkit.pretrain.corpora import Corpora
from encoderkit.pretrain.store import Store
reader, path, guarded = sys.argv[1:]
if guarded == "no":
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # a bomb stops here
    corpus_files.LARGEST_RATIO = float("inf")
    corpus_files.PARQUET_BATCH_BYTES = 1 << 40
told = ""
try:
    if reader == "corpus":
        for document in Corpora([path]):
            pass
    elif reader == "store":
        Store(Path(path).parent, {"files": {}}).held_out_texts()
    elif reader == "questions":
        read_squad_or_file(path, ["question"])
    else:
        read_file(path, ["text"])
except (InputError, MemoryError, OSError) as error:
    told = f"{type(error).__name__}: {error}"
print(told.replace("\\n", " "))
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) * 1024)  # of this process alone; getrusage counts what it was forked from
"""


def bomb(path):
    """About 1,000 bytes or more for each that the file has, half a gigabyte or more in all."""
    line = b'{"text": "' + b"a" * 4000 + b'"}\n'
    if path.name == "lines.jsonl.gz":
        path.write_bytes(gzip.compress(line * 2**12) * 40)
    elif path.name in ("list.json.gz", "questions.json.gz"):
        path.write_bytes(
            gzip.compress(b"[" if path.name == "list.json.gz" else b"{") + gzip.compress(b" " * 2**24) * 80
        )
    elif path.name == "one.jsonl.gz":
        path.write_bytes(gzip.compress(b"a" * 2**24) * 40)
    elif path.name == "lines.jsonl.zst":
        path.write_bytes(bytes(pa.Codec("zstd").compress(line * 2**12)) * 64)
    elif path.name == "one.parquet":  # one long value, packed
        pq.write_table(pa.table({"text": ["a" * 2**26] * 2}), path, compression="zstd", use_dictionary=False)
    else:  # one long value that a dictionary says for many rows
        rows = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["a" * 2**24]))
        pq.write_table(pa.table({"text": rows}), path, compression="zstd", store_schema=False)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        *itertools.product(["lines.jsonl.gz", "one.jsonl.gz", "lines.jsonl.zst"], ["corpus", "task"]),
        *itertools.product(["one.parquet", "many.parquet"], ["corpus", "task", "store"]),
        ("list.json.gz", "corpus"),
        ("questions.json.gz", "questions"),
    ],
)
def test_bombs_stay_within_memory(name, reader, tmp_path):
    bomb(tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / (name if reader != "store" else "held_out.parquet"))
    assert path.stat().st_size < 4 << 20

    def measure(guarded):
        argv = [sys.executable, "-c", MEASURE, reader, str(path), guarded]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        told, memory = done.stdout.splitlines()
        return told, int(memory)

    told, memory = measure("yes")
    assert told.startswith("InputError") or (name, reader) == ("many.parquet", "corpus"), told
    assert memory < MOST_MEMORY
    if (name, reader) in [
        ("many.parquet", "corpus"),
        ("lines.jsonl.gz", "task"),
        ("many.parquet", "store"),
        ("questions.json.gz", "questions"),
    ]:
        assert measure("no")[1] > MOST_MEMORY  # the payload is live
