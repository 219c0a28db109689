"""Settings from YAML and the command line: keys, types, messages, round trips."""

from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import (
    dump_yaml,
    parse_settings,
    read_settings,
    run_command,
)
from encoderkit.pretrain.settings import (
    Budget,
    Checkpoints,
    Data,
    Log,
    Masking,
    Model,
    Optimizer,
    PretrainSettings,
    Schedule,
    Timeouts,
    Validation,
)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Sliding window."""

    tokens: int = 64
    base: float = 1e4


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner things."""

    lr: float = 1e-3  # peak learning rate
    window: Window | None = None
    names: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Everything a settings class may hold."""

    model: str  # folder or name
    text: str | None = None
    count: int | None = None  # a comment behind a wrapped default
    flag: bool = False
    kind: Literal["none", "mean"] | int = "mean"
    path: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    inner: Inner = field(default_factory=lambda: Inner(lr=0.5))


def parse(*argv: str, cls=Outer, positional: str | None = "model", base: Path | None = None):
    return parse_settings(cls, argv, prog="prog", positional=positional, base=base)


def message(*argv: str, **options) -> str:
    with pytest.raises(InputError) as caught:
        parse(*argv, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_command_line_values_are_typed():
    got = parse(
        *("m", "--text", "123", "--count=7", "--flag", "--kind", "none", "--path", "a/b", "--columns.a", "b"),
        *("--inner.names", "x", "y", "--inner.betas", "0.5", "1e-1", "--inner.window.tokens", "8"),
    )
    assert got == Outer(
        model="m", text="123", count=7, flag=True, kind="none", path=Path("a/b"), columns={"a": "b"},
        inner=Inner(lr=0.5, names=["x", "y"], betas=(0.5, 0.1), window=Window(tokens=8)),
    )  # fmt: skip


@pytest.mark.parametrize(("word", "value"), [("true", True), ("yes", True), ("no", False), ("Off", False)])
def test_a_word_behind_an_option_of_true_or_false_is_its_value(word, value):
    assert parse("m", "--flag", word) == Outer(model="m", flag=value)
    assert parse("--tied_decoder", word, cls=Model, positional=None).tied_decoder is value
    assert parse("--tied_decoder", word, "--tied_decoder", "null", cls=Model, positional=None).tied_decoder is None


def test_command_line_replaces_yaml_and_later_options_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ninner:\n  lr: 1e-4\n  window: {tokens: 9}\n  names: [a, 1, no]\nkind: 3\ntext: no\n")
    assert parse("--config", str(file), "--inner.lr", "2", "--inner.lr", "3") == Outer(
        model="m", kind=3, text="no", inner=Inner(lr=3.0, window=Window(tokens=9), names=["a", "1", "no"])
    )
    assert parse("--config", str(file)).inner.lr == 1e-4
    assert parse("--inner.lr", "2", "--config", str(file)).inner.lr == 2
    assert parse("--config", str(file), "--inner.window", "null").inner.window is None
    assert parse("--inner.lr=7", base=file).inner.lr == 7
    assert parse("m", "--inner.lr", "-1", "--inner.names", "[p, q]").inner == Inner(lr=-1.0, names=["p", "q"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("m", "--inner.learning_rte", "1"), "unknown key inner.learning_rte; did you mean inner.lr?"),
        (("m", "--lr", "1"), "unknown key lr; did you mean inner.lr?"),
        (("m", "--zzzzzz", "1"), "unknown key zzzzzz; --help lists every key"),
        (("m", "--inner.lr", "abc"), "inner.lr is 'abc'; expected a number"),
        (("m", "--inner.lr", ".nan"), "inner.lr is '.nan'; expected a number"),
        (("m", "--inner.lr", "null"), "inner.lr is null; expected a number"),
        (("m", "--count", "1.5"), "count is '1.5'; expected a whole number or null"),
        (("m", "--kind", "max"), "kind is 'max'; expected one of none, mean or a whole number"),
        (("m", "--flag=maybe"), "flag is 'maybe'; expected true or false"),
        (("m", "--inner.betas", "1"), "inner.betas has 1 values; expected 2 values, each a number"),
        (("m", "--inner", "1"), "inner is '1'; expected a section with the keys lr, window, names, betas"),
        (("m", "--count"), "--count has no value; write --count VALUE"),
        (("m", "n"), "unexpected argument 'n'; model is 'm' already"),
        ((), "model is missing; set it with --model or in the config file"),
        (("m", "--config", "missing.yaml"), "config missing.yaml cannot be read: No such file or directory; "
         "expected a YAML file"),
    ],
)  # fmt: skip
def test_bad_command_line_is_one_line(argv, expected):
    assert message(*argv) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: a\nmodel: b\n", "line 2: key model is already set in line 1; keep one of them"),
        ("model: a\ninner:\n  lr: 1\ninner.lr: 2\n", "line 4: key inner.lr is already set in line 3"),
        ("model: a\ninner:\n  learning_rte: 1\n", "line 3: unknown key inner.learning_rte; did you mean inner.lr?"),
        ("model: a\ninner:\n  lr: {a: 1}\n", "unknown key inner.lr.a"),
        ("model: !!python/object/apply:os.system ['true']\n", "line 1: tag tag:yaml.org,2002:python/object"),
        ("model: &a [x, x]\ntext: *a\n", "line 1: &a: anchors and aliases are not read"),
        ("model: [a\n", "line 2: "),
        ("- a\n", "holds a list; expected keys with values"),
        ("model: a\ninner: 3\n", "line 2: inner is '3'; expected a section"),
        ("model: a\ninner:\n  names: a\n", "line 3: inner.names is 'a'; expected a list, each text"),
        ("a: \x00\n", "expected YAML"),
        ("[" * 5000, "expected YAML"),
        ("#" * 1_000_001, "expected settings of at most 1,000,000"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    found = message("--config", str(file))
    assert str(file) in found
    assert expected in found


def test_config_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"model: \xff\xfe\x00")
    assert "is not UTF-8 text at byte 7" in message("--config", str(file))


def test_settings_own_checks_pass_through():
    assert message("--masking.rate", "2", cls=PretrainSettings, positional=None) == (
        "masking.rate is 2; expected from 0.01 to 0.9"
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=500, deadline=None)
@given(
    st.builds(
        Outer,
        model=TEXT | st.sampled_from(["null", "1e-4", "true", "~", "- a", "2020-01-01", "no"]),
        text=st.none() | TEXT | st.sampled_from(["null", "none", "1", ""]),
        count=st.none() | st.integers(),
        flag=st.booleans(),
        kind=st.sampled_from(["none", "mean"]) | st.integers(-5, 5),
        columns=st.dictionaries(st.sampled_from("abc"), TEXT),
        inner=st.builds(
            Inner,
            lr=st.floats(allow_nan=False),
            window=st.none() | st.builds(Window, tokens=st.integers(), base=st.floats(allow_nan=False)),
            names=st.lists(TEXT, max_size=3),
            betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
        ),
    )
)
def test_written_settings_read_back_equal(tmp_path_factory, made):
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(dump_yaml(made), encoding="utf-8")
    assert read_settings(Outer, file) == made


SHARE, COUNT = st.floats(0, 1), st.integers(1, 10**12)
STAGES = st.lists(st.floats(0.001, 0.999), unique=True, max_size=3).map(sorted)
RUNS = st.builds(
    PretrainSettings,
    out=TEXT,
    seed=st.integers(0, 2**32 - 1),
    data=st.builds(
        Data,
        store=TEXT,
        max_tokens=st.integers(64, 128),
        length_curriculum=STAGES.map(lambda shares: [(share, 8 + i) for i, share in enumerate(shares)]),
        row_tokens=st.just(256),
        workers=st.integers(0, 9),
    ),
    model=st.builds(
        Model,
        preset=st.sampled_from([None, "bert", "modern"]),
        biases=st.none() | st.just([]) | st.just(["attention", "norm"]),
        norm_eps=st.none() | st.floats(1e-12, 1e-3),
        hidden_dropout=st.none() | SHARE.filter(lambda share: share < 1),
        tied_decoder=st.none() | st.booleans(),
    )
    | st.builds(Model, init_from=TEXT.filter(bool), max_positions=st.none() | st.integers(8, 10**6)),
    masking=st.builds(
        Masking,
        preset=st.sampled_from(["plain", "bert"]),
        select=st.sampled_from(["token", "word", "span"]),
        rate=st.none() | st.floats(0.01, 0.9),
        final_rate=st.none() | st.floats(0.01, 0.9),
        mask_share=st.floats(0, 0.5),
        random_share=st.floats(0, 0.5),
    ),
    pairs=st.sampled_from(["none", "nsp", "sop"]),
    optimizer=st.builds(
        Optimizer, lr=st.floats(0, 10), betas=st.tuples(*[st.floats(0, 0.99)] * 2), eps=st.floats(0, 1)
    ),
    schedule=st.builds(Schedule, name=st.sampled_from(["linear", "cosine"]), warmup=SHARE, final=SHARE),
    budget=st.builds(Budget)
    | st.builds(Budget, steps=COUNT)
    | st.builds(Budget, tokens=COUNT)
    | st.builds(Budget, minutes=st.floats(0.01, 1e6)),
    batch_tokens=st.integers(1, 9).map(lambda rows: 256 * rows),
    batch_ramp=STAGES.map(lambda shares: [(share, 256 * (1 + i)) for i, share in enumerate(shares)]),
    checkpoints=st.builds(Checkpoints, every_steps=st.none() | COUNT, every_minutes=st.none() | st.floats(0.01, 1e6)),
    log=st.builds(Log, trackers=st.lists(TEXT, max_size=2)),
    timeouts=st.builds(Timeouts, loader=st.floats(1, 1e6)),
    validation=st.builds(Validation, minimal_pairs=st.none() | TEXT),
    price_per_hour=st.none() | st.floats(0, 1e9),
)


@settings(max_examples=80, deadline=None)
@given(RUNS)
def test_any_recipe_reads_back_equal(tmp_path_factory, made):
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(dump_yaml(made), encoding="utf-8")
    assert read_settings(PretrainSettings, file) == made


def test_help_shows_comments_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_settings(Outer, ["--help"], prog="prog", examples=["prog m --flag"], positional="model")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for expected in ("peak learning rate (a number; default 0.5)", "folder or name (text; required)",
                     "a comment behind a wrapped default", "inner: Inner things.", "prog m --flag",
                     "--inner.window.tokens"):  # fmt: skip
        assert expected in shown


def test_every_pretraining_key_is_in_the_help_and_the_defaults_round_trip(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_settings(PretrainSettings, ["--print-config"], prog="prog")
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert read_settings(PretrainSettings, file) == PretrainSettings()


def test_run_command_turns_errors_into_status(capsys, monkeypatch):
    def fail():
        raise InputError("wrong thing")

    def interrupt():
        raise KeyboardInterrupt

    def fill_disk(error):
        raise error

    for error in (OSError(errno.ENOSPC, "No space", "runs/log.jsonl"), SafetensorError("I/O: No space (os error 28)")):
        assert run_command(functools.partial(fill_disk, error)) == 2
        told = capsys.readouterr().err
        assert told == f"error: no room on the disk: {error}; free some, and run it again\n"
    assert run_command(lambda: None) == 0
    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: wrong thing\n"
    assert run_command(interrupt) == 130
    capsys.readouterr()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command(fail) == 2
    assert capsys.readouterr().err == ""


NO_TORCH = """
import contextlib, io, json, runpy, sys
for name in ("torch", "transformers", "datasets"):
    sys.modules[name] = None
answers = []
for argv in json.load(sys.stdin):
    sys.argv, told = ["encoderkit", *argv], io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        status = 0
        try:
            runpy.run_module("encoderkit.pretrain", run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    answers.append([status, told.getvalue()])
print(json.dumps(answers))
"""
WITHOUT_TORCH = [
    ("--help", 0, "usage: encoderkit-pretrain"),
    ("--version", 0, "encoderkit "),
    ("run --help", 0, "--optimizer.lr"),
    ("tokenizer --help", 0, "usage: encoderkit-pretrain tokenizer"),
    ("prepare --help", 0, "usage: encoderkit-pretrain prepare"),
    ("eval --help", 0, "usage: encoderkit-pretrain eval"),
    ("doctor --help", 0, "--run RUN_FOLDER"),
    ("doctor --run", 2, "error: --run has no value; write --run FOLDER"),
    ("run --optimizer.learning_rte 1", 2, "error: unknown key optimizer.learning_rte; did you mean"),
    ("run --resume nowhere", 2, "error: --resume nowhere holds no config.yaml"),
    ("rum", 2, "error: unknown command rum; did you mean run?"),
]


@pytest.fixture(scope="module")
def answers():
    """Command -> status and message; all from one process."""
    asked = json.dumps([command.split() for command, *_ in WITHOUT_TORCH])
    done = subprocess.run([sys.executable, "-c", NO_TORCH], input=asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {command: answer for (command, *_), answer in zip(WITHOUT_TORCH, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(("command", "status", "shown"), WITHOUT_TORCH)
def test_help_and_mistakes_need_no_torch(command, status, shown, answers):
    ended, told = answers[command]
    assert (ended, shown in told) == (status, True), told
