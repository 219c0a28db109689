"""Bad inputs to both commands: exit status 2, one or two lines that say where, what and what to do; nothing written.

Where no torch is needed, the answer comes within three seconds: those rows run in one process that has none. What a
row's file format allows in detail is tested beside its reader: tests/pretrain/test_corpora.py, test_command_line.py,
test_tokenizer.py, test_initial_model.py, test_run_folder.py (locks), tests/finetune/test_data.py and test_examples.py.
"""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from encoderkit.finetune.__main__ import main as finetune
from encoderkit.pretrain.__main__ import main as pretrain

LONGEST = 3.0  # seconds, where no torch is needed
COMMANDS = {"pretrain": pretrain, "finetune": finetune}
GOOD = b'{"text": "a cat", "label": 0}\n{"text": "a dog", "label": 1}\n'


@dataclass(frozen=True)
class Row:
    """One bad input. light: told without torch. files: what lies in the working folder; words: of the message."""

    name: str
    command: str  # with {things}
    words: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    light: bool = True


def corpus(name: str, content: bytes, *words: str, file: str = "a.txt") -> list[Row]:
    """The same corpus given to prepare and to tokenizer."""
    return [
        Row(f"{name}: {command}", f"pretrain {command} {file} --out out{more}", words, {file: content})
        for command, more in (("prepare", " --tokenizer {tokenizer}"), ("tokenizer", " --vocab_size 100"))
    ]


def task(name: str, content: bytes, *words: str, file: str = "a.jsonl") -> Row:
    """A training file."""
    command = f"finetune run {{model}} --data.train {file} --out out"
    return Row(f"{name}: run", command, words, {file: content, "good.jsonl": GOOD})


def labels(*values: object) -> bytes:
    return b"".join(json.dumps({"text": "a cat", "label": value}).encode() + b"\n" for value in values)


def squad(*answers: list[dict], ids: tuple[str, ...] = ("q0", "q1")) -> bytes:
    """SQuAD's JSON with a question for each list of answers."""
    questions = [{"id": name, "question": "who?", "answers": found} for name, found in zip(ids, answers)]
    return json.dumps({"data": [{"paragraphs": [{"context": "a cat sat", "qas": questions}]}]}).encode()


ANSWER = [{"text": "a cat", "answer_start": 0}]
SQUAD = "finetune run {model} --task squad --data.train a.json --data.validation a.json --out out"
TAGS = "finetune run {model} --kind tagging --data.train a.jsonl --data.validation a.jsonl --columns.text words "
TAGS += "--columns.label tags --out out"
MODEL = "pretrain run --data.store {store} --budget.steps 1 --out out"
FIT = "finetune run {model} --data.train good.jsonl --data.validation good.jsonl --out out"
LIGHT = [
    *corpus("empty corpus", b"", "a.txt", "0 usable documents"),
    *corpus("blank lines only", b"\n \n\t\n", "0 usable documents"),
    Row(
        "blank lines are counted",
        "pretrain prepare a.txt --documents line --tokenizer {tokenizer} --out out",
        ("0 usable documents (dropped: 3 blank)",),
        {"a.txt": b"\n \n\t\n"},
    ),
    task("empty task", b"\n\n", "a.jsonl", "0 rows"),
    *corpus("binary file", bytes(range(1, 256)), "a.txt: byte 127 (0x80) is not UTF-8", "invalid_utf8 replace"),
    *corpus("invalid UTF-8", b"good\n\nbad \xff", "a.txt: byte 10 (0xff)"),
    task("invalid UTF-8", GOOD + b"\xff\n", f"a.jsonl: byte {len(GOOD)} (0xff) is not UTF-8"),
    *corpus("NUL", b"\xef\xbb\xbfg\0od", "a.txt: byte 4 is NUL"),
    task("NUL", b"\0\n", "a.jsonl: byte 0 is NUL"),
    *corpus("60 MB line", b"a" * 60_000_000, "the line at byte 0 is over 32 MiB", "split it")[:1],
    *corpus("60 MB line packed", gzip.compress(b"a" * 60_000_000), "at byte 0 is over 32 MiB", file="a.jsonl.gz")[:1],
    task("60 MB line", b"a" * 60_000_000, "a.jsonl: the line at byte 0 is over 32 MiB"),
    task("60 MB row", b'[{"text": "' + b"a" * 60_000_000 + b'"}]', "row 0: column text is over 32 MiB", file="a.json"),
    *corpus("gzip bomb", gzip.compress((b"a cat " * 1000 + b"\n\n") * 2**7) * 120, "a.txt.gz: ", "unpack to",
            "expected at most 200 times", file="a.txt.gz")[1:],  # prepare tokenizes 64 MB before it tells
    task("gzip bomb", gzip.compress(labels(0).replace(b"a cat", b"a cat " * 1000) * 2**7) * 120, "a.jsonl.gz: ",
         "unpack to", file="a.jsonl.gz"),
    *corpus("missing field", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl: line 2: no column text; present: body",
            file="a.jsonl"),
    *corpus("mixed types", b'{"text": "x"}\n{"text": 3}\n', "line 2: column text holds int", file="a.jsonl"),
    *corpus("bad JSON", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON", file="a.jsonl"),
    *corpus("endless number", b'{"text": "x"}\n{"text": ' + b"1" * 5000 + b"}\n", "line 2 is not JSON", file="a.jsonl"),
    task("missing field", GOOD + b'{"body": "x"}\n', "a.jsonl: line 3: no column text, label; present: body"),
    task("mixed types", GOOD + b'{"text": 3, "label": 1}\n', "column text has no valid text in row 3"),
    task("bad JSON", GOOD + b'{"text":\n', "a.jsonl: line 3 is not JSON"),
    task("endless number", GOOD + b'{"text": ' + b"1" * 5000 + b"}\n", "a.jsonl: line 3 is not JSON"),
    Row("sequence over positions", MODEL + " --model.max_positions 64",
        ("data.max_tokens has sequences of 128 tokens; model.max_positions is 64",)),
    Row("heads do not divide", MODEL + " --model.num_heads 3", ("model.num_heads 3", "expected a multiple of 8")),
    Row("layers -1", MODEL + " --model.num_layers -1", ("model.num_layers is -1; expected at least 1",)),
    Row("dropout 1.5", MODEL + " --model.hidden_dropout 1.5", ("model.hidden_dropout is 1.5; expected 0 <= p < 1",)),
    Row("dropout 1.5: finetune", FIT + " --dropout 1.5", ("dropout is 1.5; expected from 0 to 0.9",)),
    Row("unknown key", MODEL + " --optimizer.learning_rte 1", ("unknown key optimizer.learning_rte", "did you mean")),
    Row("unknown key: finetune", FIT + " --epoch 3", ("unknown key epoch; did you mean epochs?",)),
    Row("unknown key: baseline", "finetune baseline --task rte --epoch 3", ("unknown key epoch",)),
    Row("duplicate key", MODEL + " --config c.yaml", ("c.yaml line 2: key seed is already set in line 1",),
        {"c.yaml": b"seed: 1\nseed: 2\n"}),
    Row("duplicate key: finetune", FIT + " --config c.yaml", ("c.yaml line 2: key seed is already set",),
        {"c.yaml": b"seed: 1\nseed: 2\n"}),
    Row("out in use", MODEL, ("out out exists and is not empty; choose another out",), {"out/x": b""}),
    Row("out in use: prepare", "pretrain prepare {text} --tokenizer {tokenizer} --out out", ("out is in use",),
        {"out/x": b""}),
    Row("out in use: finetune", FIT, ("out exists and is not empty",), {"out/x": b"", "good.jsonl": GOOD}),
    Row("out is a URL", MODEL.replace("out out", "out s3://u:p@b/x"), ("out is the URL s3://b/x; expected a path",)),
    Row("no store", MODEL.replace("{store}", "nowhere"), ("nowhere is not a store", "encoderkit-pretrain prepare")),
    Row("no model", "finetune fill ./nowhere --text [MASK]", ("./nowhere: no such model folder",)),
    Row("no model: predict", "finetune predict ./nowhere --texts x", ("./nowhere: no such model folder",)),
    Row("no model: init_from", MODEL + " --model.init_from ./nowhere", ("./nowhere: no such model folder",)),
    Row("no model: eval", "pretrain eval ./nowhere --store {store}", ("./nowhere: no such model folder",)),
    Row("label out of range", FIT.replace("good", "bad", 1) + " --data.labels no yes",
        ("bad.jsonl: label '2' in row 3; expected 0, 1 (no, yes)",),
        {"bad.jsonl": labels(0, 1, 2), "good.jsonl": GOOD}),
    task("missing label", labels(0, 1, None), "label column label is empty or NaN in row 3"),
    task("label NaN", labels(0, 1, float("nan")), "label column label is empty or NaN in row 3"),
    task("one class", labels(1, 1, 1), "'1' is the only label"),
    Row("column missing in validation", FIT.replace("validation good", "validation bad"),
        ("bad.jsonl: line 1: no column label; present: text, gold",),
        {"good.jsonl": GOOD, "bad.jsonl": b'{"text": "a cat", "gold": 1}\n'}),
    Row("duplicate SQuAD ids", SQUAD, ("a.json: ", "q0"), {"a.json": squad(ANSWER, ANSWER, ids=("q0", "q0"))}),
    Row("unanswerable in a v1 task", SQUAD, ("a.json: ", "q1", "data.unanswerable"), {"a.json": squad(ANSWER, [])}),
    Row("tags not IOB2", TAGS, ("a.jsonl: row 2, word 1: tag I-A after O is not IOB2", "--data.iob1 true"),
        {"a.jsonl": b'{"words": ["a", "cat"], "tags": ["B-A", "O"]}\n{"words": ["cat"], "tags": ["I-A"]}\n'}),
    Row("not finite", MODEL + " --optimizer.weight_decay .inf", ("optimizer.weight_decay is inf; expected",)),
    Row("NaN in YAML", MODEL + " --config c.yaml", ("c.yaml line 2: optimizer.lr is '.nan'; expected a number",),
        {"c.yaml": b"optimizer:\n  lr: .nan\n"}),
    Row("binary recipe", MODEL + " --config c.yaml", ("config c.yaml is not UTF-8 text at byte 0",),
        {"c.yaml": b"\xff\0\1"}),
    Row("binary recipe: finetune", FIT + " --config c.yaml", ("config c.yaml is not UTF-8 text at byte 0",),
        {"c.yaml": b"\xff\0\1"}),
    Row("a folder as recipe", MODEL + " --config c.yaml", ("config c.yaml cannot be read: Is a directory",),
        {"c.yaml/x": b""}),
    Row("negative budget", MODEL.replace("steps 1", "steps -5"), ("budget.steps is -5; expected at least 1",)),
    Row("huge batch", MODEL + f" --batch_tokens {10**21}", ("expected from 1 to 1,073,741,824",)),
    Row("huge number", MODEL + f" --seed {10**400}", ("expected from 0 to 4,294,967,295",)),
    Row("too many workers", MODEL + " --data.workers 100000", ("data.workers is 100,000; expected from 0 to 1,024",)),
    Row("too many layers", MODEL + f" --model.num_layers {10**9}", ("num_layers is 1000000000; expected at most",)),
    Row("no store named", MODEL.replace(" --data.store {store}", ""), ("data.store is missing; set it with",)),
    Row("resume of nothing", "pretrain run --resume nowhere", ("nowhere holds no config.yaml; expected a run folder",)),
    Row("resume of nothing: finetune", FIT + " --resume", ("out is not there, so nothing can be resumed",),
        {"good.jsonl": GOOD}),
    Row("out is empty", MODEL.replace("out out", "out ''"), ("out is empty; expected a path",)),
    Row("out of too long a name", MODEL.replace("out out", "out " + "o" * 300), ("looked at: File name too long",)),
    Row("out is a file: suite", "finetune suite {model} --suite glue --out out", ("out exists and holds no suite",),
        {"out": b""}),
    *(Row(f"out below a file: {command.split()[1]}", f"{command} --out out/below/x", ("below", "which is a file"),
          {"out": b""})
      for command in (MODEL.replace(" --out out", ""), FIT.replace(" --out out", ""), "pretrain export {store}",
                      "pretrain prepare {text} --tokenizer {tokenizer}", "pretrain tokenizer {text} --vocab_size 60",
                      "finetune suite {model} --suite glue", "finetune predict {classifier} --texts x")),
    Row("no [MASK]: prepare", "pretrain prepare {text} --tokenizer nomask --out out",
        ("tokenizer nomask has no mask_token",), {"nomask/tokenizer_config.json": b"", "nomask/tokenizer.json": b""}),
]  # fmt: skip
HEAVY = [
    Row("a model larger than the memory", MODEL + " --model.hidden_size 1048576 --model.num_heads 8192",
        ("model.hidden_size 1,048,576", "GiB of weights; this machine has")),
    Row("sequence over positions: finetune", FIT + " --max_tokens 999", ("max_tokens is 999", "at most 128"),
        {"good.jsonl": GOOD}),
    Row("xformers where there is none", MODEL + " --attention xformers",
        ("xformers cannot serve here: it runs on CUDA",)),
    Row("xformers where there is none: finetune", FIT + " --attention xformers", ("xformers cannot serve here",),
        {"good.jsonl": GOOD}),
    Row("bf16 where there is none", MODEL + " --precision bf16", ("precision is bf16, but this CPU has no bf16",)),
    Row("bf16 where there is none: finetune", FIT + " --precision bf16", ("precision is bf16",), {"good.jsonl": GOOD}),
    Row("another vocabulary", MODEL + " --model.init_from other", ("other: its token", "prepare the store with")),
    Row("tokenizer larger than the model", "finetune fill larger --text [MASK]",
        ("larger: the tokenizer has 61 tokens and the model 60",)),
    Row("tokenizer larger than the model: eval", "pretrain eval larger --store {store}",
        ("larger: the tokenizer has 61 tokens and the model 60",)),
    Row("column missing: predict", "finetune predict {classifier} --file good.jsonl --columns.text body",
        ("good.jsonl: line 1: no column body; present: text, label",), {"good.jsonl": GOOD}),
    Row("no [MASK]: fill", "finetune fill nomask --text [MASK]", ("tokenizer nomask has no mask_token",)),
]  # fmt: skip

CHILD = """
import io, json, os, sys, time
from contextlib import redirect_stderr, redirect_stdout
sys.modules["torch"] = None
import transformers.models.auto  # seconds alone, which only prepare needs
from encoderkit.finetune.__main__ import main as finetune
from encoderkit.pretrain.__main__ import main as pretrain
answers = []
for folder, argv in json.load(sys.stdin):
    os.chdir(folder)
    told, began = io.StringIO(), time.perf_counter()
    with redirect_stderr(told), redirect_stdout(io.StringIO()):
        status = {"pretrain": pretrain, "finetune": finetune}[argv[0]](argv[1:])
    answers.append([status, told.getvalue(), time.perf_counter() - began])
print(json.dumps(answers))
"""


def lay_out(row: Row, folder: Path, things) -> list[str]:
    """Write the row's files; returns its arguments."""
    for name, content in row.files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    for name, make in {"nomask": without_mask, "other": other_vocabulary, "larger": with_one_token_more}.items():
        if name in shlex.split(row.command):
            make(things, folder / name)
    return shlex.split(row.command.format(**{name: str(path) for name, path in vars(things).items()}))


def without_mask(things, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in things.model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def other_vocabulary(things, folder: Path) -> None:
    shutil.copytree(things.model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra"] = content["model"]["vocab"].pop("##s")
    (folder / "tokenizer.json").write_text(json.dumps(content))


def with_one_token_more(things, folder: Path) -> None:
    from encoderkit.pretrain.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(things.tokenizer)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((things.model / name).read_bytes())


def check(row: Row, status: int, told: str, before: list[str], folder: Path) -> None:
    assert status == 2, told
    told = told[told.index("error: ") :]  # after the lines of progress
    assert told.count("\n") <= 2, told
    assert all(word in told for word in row.words), told
    assert contents(folder) == before


def contents(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def answers(things, tmp_path_factory):
    """Row -> status, message, seconds, folder before, folder; all from one process without torch."""
    folders = [tmp_path_factory.mktemp("row") for _ in LIGHT]
    asked = [[str(folder), lay_out(row, folder, things)] for row, folder in zip(LIGHT, folders)]
    before = [contents(folder) for folder in folders]
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(asked), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {row.name: (*answer, *rest) for row, answer, *rest in zip(LIGHT, found, before, folders)}


@pytest.mark.parametrize("row", LIGHT, ids=lambda row: row.name)
def test_told_without_torch(row, answers):
    status, told, seconds, before, folder = answers[row.name]
    check(row, status, told, before, folder)
    assert seconds < LONGEST


@pytest.mark.parametrize("row", HEAVY, ids=lambda row: row.name)
def test_told_before_anything_is_written(row, things, tmp_path, monkeypatch, capsys):
    import encoderkit.encoder.precision as precision

    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    monkeypatch.chdir(tmp_path)
    command, *argv = lay_out(row, tmp_path, things)
    before = contents(tmp_path)
    status = COMMANDS[command](argv)
    check(row, status, capsys.readouterr().err, before, tmp_path)


@pytest.mark.parametrize(("command", "more"), [("pretrain", []), ("finetune", ["m", "--task", "rte"])])
def test_numbers_in_yaml_are_read_as_numbers(command, more, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("optimizer:\n  lr: 1e-4\n")
    with pytest.raises(SystemExit):
        COMMANDS[command](["run", *more, "--config", str(tmp_path / "c.yaml"), "--print-config"])
    assert "lr: 0.0001\n" in capsys.readouterr().out


def test_replaced_bytes_are_counted(things, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"a cat \xff\xfe sees\n\n" + b"the dog likes the tree\n\n" * 20 + b"a \xc3 cat")
    argv = ["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(things.tokenizer), "--out", str(tmp_path / "store")]
    assert pretrain([*argv, "--held_out", "0.1", "--invalid_utf8", "replace", "--workers", "1"]) == 0
    assert "3 bytes were not UTF-8" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["replaced_bytes"] == 3


def test_a_folder_that_may_not_be_written_is_told_at_once(things, tmp_path, monkeypatch, capsys):
    """A superuser may write everywhere, so the question is answered here."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setitem(sys.modules, "encoderkit.pretrain.loop", None)
    for main, argv in (
        (pretrain, ["run", "--data.store", str(things.store), "--budget.steps", "1"]),
        (finetune, ["run", str(things.model), "--data.train", str(things.task)]),
    ):
        assert main([*argv, "--out", str(tmp_path / "a" / "run")]) == 2
        assert f"cannot be written: {tmp_path} is read-only here; choose another out" in capsys.readouterr().err
    assert contents(tmp_path) == []


def test_one_command_as_a_user_starts_it(tmp_path):
    """Within the same seconds, though Python starts in them."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from encoderkit.finetune.__main__ import main; raise SystemExit(main())"
    argv = [sys.executable, "-c", code, "run", "m", "--task", "sst22"]
    began = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    assert time.perf_counter() - began < LONGEST
    assert done.returncode == 2, done.stderr
    assert "did you mean sst2?" in done.stderr
