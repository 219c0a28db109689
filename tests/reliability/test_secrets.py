"""Secrets in the environment and in URLs appear in nothing that is written or shown."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encoderkit.finetune.__main__ import main as finetune
from encoderkit.pretrain import command_line, redaction
from encoderkit.pretrain.__main__ import main as pretrain
from encoderkit.pretrain.redaction import without_secrets

PLANTED = {
    "HF_TOKEN": "planted-hub-token",
    "WANDB_API_KEY": "planted-tracker-key",
    "AWS_SECRET_ACCESS_KEY": "planted-cloud-key",
    "DATABASE_PASSWORD": "planted-password",
}
URL = "memory://planted-user:planted-p@ss@bucket/a.txt?X-Signature=planted-signature"


@pytest.fixture
def planted(monkeypatch, things):
    """The environment with secrets, and a corpus behind a URL with a password and a signature."""
    import fsspec

    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    memory = fsspec.filesystem("memory")
    memory.pipe(memory._strip_protocol(URL), things.text.read_bytes())
    yield
    memory.rm(memory._strip_protocol(URL))


def found_in(folder):
    """Files below folder that hold something planted; Parquet is unpacked."""
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in held:
        if path.suffix == ".parquet":
            held[path] += json.dumps(pq.read_table(path).to_pylist()).encode()
        elif path.suffix == ".arrow":
            held[path] += str(pa.ipc.open_stream(pa.memory_map(str(path))).schema.metadata).encode()
    return [str(path) for path, content in held.items() if b"planted" in content]


def test_no_secret_is_written_or_shown(planted, things, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "encoderkit.pretrain", URL, PLANTED["HF_TOKEN"]])
    size = ["--model.num_layers=1", "--model.hidden_size=32", "--model.num_heads=2", "--model.intermediate_size=32"]
    step = ["--batch_tokens=1024", "--micro_batch_tokens=1024", "--data.workers=0", "--precision=fp32"]
    task = ["--data.train", str(things.task), "--epochs=1", "--max_tokens=16"]
    story = [
        (pretrain, ["tokenizer", URL, "--vocab_size=60", "--out=tokenizer"]),
        (pretrain, ["prepare", URL, "--tokenizer=tokenizer", "--held_out=0.1", "--workers=1", "--out=store"]),
        (pretrain, ["prepare", str(things.text), "--tokenizer=tokenizer", "--held_out", URL, "--out=other"]),
        (pretrain, ["contamination", URL, "--against", str(things.text), "--out=found.json"]),
        (pretrain, ["run", "--data.store=store", "--budget.steps=2", "--log.trackers=tensorboard", *size, *step,
                    "--checkpoints.every_steps=1", "--out=run"]),
        (pretrain, ["eval", "run/final", "--store=store"]),
        (pretrain, ["export", "run", "--out=exported"]),
        (finetune, ["run", "run/final", *task, "--out=tuned"]),
        (finetune, ["predict", "tuned/final", "--texts", "a cat", "--out=labels.jsonl"]),
    ]  # fmt: skip
    for main, argv in story:
        assert main(argv) == 0, argv
    bad = "https://planted-user:planted-p@ss@localhost:9/a.txt?X-Signature=planted-signature"
    for main, argv in [
        (pretrain, ["prepare", bad, "--tokenizer=tokenizer", "--out=x"]),
        (pretrain, ["prepare", "s3x://planted-user:planted@b/a.txt", "--tokenizer=tokenizer", "--out=x"]),
        (pretrain, ["run", "--data.store", bad, "--budget.steps=2", "--out=x"]),
        (pretrain, ["run", "--data.store=store", "--budget.steps=2", "--model.init_from", bad, "--out=x"]),
        (pretrain, ["run", "--data.store=store", "--budget.steps=2", "--out", bad]),
        (finetune, ["run", "run/final", "--data.train", bad, "--out=x"]),
        (finetune, ["run", bad, *task, "--out=x"]),
        (finetune, ["predict", bad, "--texts", "a"]),
    ]:
        assert main(argv) == 2, argv
    shown = capfd.readouterr()
    assert "planted" not in shown.out + shown.err + caplog.text
    assert "localhost:9/a.txt" in shown.err  # what is no secret stays
    assert found_in(tmp_path) == []
    (tmp_path / "seen.txt").write_text(PLANTED["HF_TOKEN"])
    assert found_in(tmp_path) == [str(tmp_path / "seen.txt")]  # the search finds


def test_tracebacks_hold_no_secret(planted, monkeypatch, capsys):
    def fail():
        try:
            raise KeyError(PLANTED["HF_TOKEN"])
        except KeyError as error:
            raise RuntimeError(f"403 for {URL}") from error

    assert command_line.run_command(fail) == 1
    told = capsys.readouterr().err
    assert "planted" not in told
    assert "403 for memory://bucket/a.txt" in told
    assert told.count("Traceback") == 2
    monkeypatch.setattr(command_line, "without_secrets", lambda text: text)  # the guard off
    assert command_line.run_command(fail) == 1
    assert "planted-p@ss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:p@ss@bucket/a.txt", "s3://bucket/a.txt"),
        ("'https://u:p@h/a?sig=1' and ftp://u@h/b", "'https://h/a' and ftp://h/b"),
        ("zip://a.txt::https://u:p@h/a.zip?x=1", "zip://a.txt::https://h/a.zip"),
        ("me@home, a?b", "me@home, a?b"),
        ("token=planted-hub-token.", "token=***."),
    ],
)
def test_what_counts_as_secret(planted, text, expected):
    assert without_secrets(text) == expected


def test_short_values_and_other_names_stay(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true-or-false")
    monkeypatch.setenv("API_KEY", "short")
    assert without_secrets("true-or-false, short") == "true-or-false, short"
    assert redaction.SECRET_NAME.search("wandb_api_key")


def test_a_command_shows_no_secret_of_its_own(tmp_path):
    """As a user starts it: what the interpreter prints counts too."""
    code = "from encoderkit.pretrain.__main__ import main; raise SystemExit(main())"
    argv = [sys.executable, "-c", code, "tokenizer", "s3x://u:planted-pass@b/a.txt", "--out", "t"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "planted" not in done.stdout + done.stderr
