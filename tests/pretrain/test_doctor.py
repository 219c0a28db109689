"""Doctor: every figure against a store known by hand, every warning raised and not raised, nothing written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import save
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM, choose_attention
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import doctor, host_memory, trial
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.clock import Clock
from encoderkit.pretrain.data_facts import DataFacts, length_histogram
from encoderkit.pretrain.doctor_warnings import (
    Finding,
    recipe_findings,
)
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.memory import estimate_memory
from encoderkit.pretrain.optimizer import build_optimizers
from encoderkit.pretrain.order import Order
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.settings import Budget, Data, DoctorSettings, Log, Masking, Model, Optimizer, PretrainSettings
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import load_tokenizer, train_tokenizer

TEXT = "the a red blue old young cat dog bird fox sees likes follows hears and but hello world in on tree house"
TINY = Model(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24)
WORDS = [f"--model.{name}={value}" for name, value in vars(TINY).items() if isinstance(value, int)]


def settings(store: Path, **more) -> DoctorSettings:
    return DoctorSettings(
        **{
            "data": Data(store=str(store), max_tokens=32, row_tokens=256, workers=0),
            "model": TINY,
            "budget": Budget(steps=20),
            "batch_tokens": 1024,
            "micro_batch_tokens": 512,
            **more,
        }
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of(found: list[Finding]) -> list[str]:
    return [finding.about for finding in found]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """54 tokens: 10 words, the same again, 30 words, and two words with one whose two letters are unknown."""
    folder = tmp_path_factory.mktemp("known")
    words = TEXT.split()
    ten, thirty = " ".join(words[:10]), " ".join((words * 2)[1:31])
    (folder / "text.txt").write_text("\n\n".join([ten, ten, thirty, "red blue 漢字"]))
    (folder / "held.txt").write_text("the " * 38 + "漢字")
    train_tokenizer("wordpiece", [TEXT] * 4, 98, lowercase=True, out=folder / "tokenizer")
    prepare(
        [str(folder / "text.txt")],
        tokenizer=folder / "tokenizer",
        out=folder / "store",
        held_out=str(folder / "held.txt"),
    )
    return folder / "store"


@pytest.fixture(scope="module")
def run_folder(small_store, tmp_path_factory):
    plain = settings(small_store, out=str(tmp_path_factory.mktemp("runs") / "first"), log=Log(every_steps=1))
    kept = {field.name: getattr(plain, field.name) for field in dataclasses.fields(PretrainSettings)}
    pretrain(PretrainSettings(**kept))
    return Path(plain.out)


def test_every_figure_of_a_store_known_by_hand(known):
    store = Store.open(known)
    order = Order(store.document_lengths, seed=0, max_tokens=16, row_tokens=32)
    facts = DataFacts.of(store, load_tokenizer(store.tokenizer_folder), order)
    assert (facts.tokens, facts.documents) == (54, 4)
    assert facts.fertility == pytest.approx(40 / 39)
    assert facts.unknown == pytest.approx(2 / 54)
    assert facts.duplicate_documents == pytest.approx(1 / 4)
    assert facts.duplicate_tokens == pytest.approx(10 / 54)
    assert sorted(facts.sequences) == [4, 6, 12, 12, 16, 16]  # pieces of at most 14 tokens, with two special ones
    assert (facts.cut, facts.cut_at_twice) == (1 / 4, 0)  # 30 words fit 32 tokens with the special ones
    assert (facts.rows, facts.padding) == (3, pytest.approx(1 - 66 / 96))
    counted = {number: int(count) for number, count in enumerate(store.unigram_counts) if count}
    assert facts.unused_types == pytest.approx(1 - len(counted) / store.vocab_size)
    the = load_tokenizer(store.tokenizer_folder).convert_tokens_to_ids("the")
    assert facts.unigram_entropy == pytest.approx(math.log((54 + store.vocab_size) / (counted[the] + 1)))
    assert facts.probe_targets == round(0.15 * 38)
    assert facts.ln_vocab == pytest.approx(math.log(store.vocab_size))
    assert length_histogram(facts.lengths) == [(4, 1), (8, 2), (16, 1)]


def test_passes_over_a_source_are_no_duplicates(known, tmp_path):
    folder = known.parent
    copy = str(shutil.copy(folder / "text.txt", tmp_path / "copy.txt"))
    for name, sources in (("twice", [f"{folder}/text.txt@2"]), ("again", [f"{folder}/text.txt", copy])):
        prepare(sources, tokenizer=folder / "tokenizer", out=tmp_path / name, held_out=str(folder / "held.txt"))
    facts = {}
    for path in (known, tmp_path / "twice", tmp_path / "again"):
        store = Store.open(path)
        order = Order(store.document_lengths, seed=0, max_tokens=16, row_tokens=32)
        facts[path.name] = DataFacts.of(store, load_tokenizer(store.tokenizer_folder), order)
    once, twice, again = facts["store"], facts["twice"], facts["again"]
    assert (twice.documents, again.documents) == (8, 8)
    # Ten words twice in the text: copies of both stand side by side, and are one document's passes.
    assert twice.duplicate_documents <= once.duplicate_documents
    assert again.duplicate_documents == pytest.approx(5 / 8)


def test_room_for_a_curriculum_is_padding_and_no_token_of_a_sequence(known):
    store = Store.open(known)
    order = Order(store.document_lengths, seed=0, max_tokens=16, row_tokens=32, shortest=8)
    facts = DataFacts.of(store, load_tokenizer(store.tokenizer_folder), order)
    assert sorted(facts.sequences) == [6, 8, 12, 12, 14, 14]  # pieces of at most 12 tokens: two sequences of 8
    assert facts.padding == pytest.approx(1 - 66 / (32 * facts.rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["modern", "bert"])
def test_memory_estimate_is_what_a_real_step_keeps(architecture, dtype):
    config = preset(architecture, "tiny", vocab_size=1000, pad_token_id=0, num_layers=3)
    sequences = [[5] * length for length in (40, 64, 17, 128)]
    batch = TokenBatch.from_sequences(sequences, targets=[dict.fromkeys(range(1, len(s), 4), 7) for s in sequences])
    cpu = torch.device("cpu")
    estimate = estimate_memory(config, PretrainSettings(), batch, device=cpu, dtype=dtype)

    model = MaskedLM(config)
    model.encoder.use_attention(choose_attention(config, "auto", device=cpu, dtype=dtype))
    own = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        kept.update({storage.data_ptr(): storage.nbytes()} if storage.data_ptr() not in own else {})
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
    ):
        model(batch).loss.backward()
    optimizers = build_optimizers(model, Optimizer())
    for optimizer in optimizers:
        optimizer.step()
    states = {
        f"{type(optimizer).__name__} state": sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        )
        for optimizer in optimizers
    }
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert {name: estimate[name] for name in states} == states
    assert estimate["gradients"] == parameters
    assert estimate["weights"] == parameters + sum(buffer.nbytes for buffer in model.buffers())
    # The loss keeps gradients, which the estimate has under its own name; kernels keep a little more.
    estimated = estimate["activations"] + estimate["logits and loss"]
    assert 0.75 < sum(kept.values()) / estimated < 1.25

    again = PretrainSettings(gradient_checkpointing=True)
    assert estimate_memory(config, again, batch, device=cpu, dtype=dtype)["activations"] < 0.7 * estimate["activations"]


def test_memory_on_a_gpu_is_estimated_where_there_is_none():
    config = preset("modern", "tiny", vocab_size=1000, pad_token_id=0, num_layers=2)
    batch = TokenBatch.from_sequences([[5] * 40, [5] * 61], targets=[{1: 7}, {2: 7, 9: 7}])  # in no round shape
    estimates = [
        estimate_memory(config, PretrainSettings(), batch, device=torch.device(kind), dtype=torch.bfloat16)
        for kind in ("cuda", "cpu")
    ]
    assert estimates[0]["activations"] == estimates[1]["activations"] > 0


def test_a_step_of_the_recipe_is_its_micro_batches_and_one_update(monkeypatch):
    clock, parts = SimpleNamespace(now=0.0), {"data": 0.5, "forward": 0.5, "backward": 1.0, "optimizer": 2.0}

    def step(job):
        clock.now += 0.5
        return 100

    taken = iter([{}, parts])
    monkeypatch.setattr(trial, "step", step)
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    log = SimpleNamespace(timer=SimpleNamespace(take=lambda: next(taken)), read_norm=lambda: (1.0, None))
    found = trial._time_steps(SimpleNamespace(log=log), micro_batches=4)
    # 8 steps in 4 s, of which 2 s are updates: a step of four micro-batches takes (4 * 2 + 2) / 8 s.
    assert (found.steps, found.seconds_per_step, found.tokens_per_second) == (8, 1.25, 320.0)
    assert found.phases == {"data": 0.125, "forward": 0.125, "backward": 0.25, "optimizer": 0.5}


def test_doctor_prints_figures_and_writes_nothing(small_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = files(small_store.parent)
    argv = ["--data.store", str(small_store), "--data.max_tokens=32", "--data.row_tokens=256", *WORDS]
    argv += ["--budget.steps=3", "--batch_tokens=1024", "--micro_batch_tokens=512", "--price_per_hour=3600"]
    assert main(["doctor", *argv]) == 0
    shown = capsys.readouterr().out
    store = Store.open(small_store)
    for expected in (
        f"{store.num_tokens:,}", "fertility", "unknown tokens", "<- a sequence", "padding under packing",
        "unigram entropy", f"{math.log(store.vocab_size):.3f} nats", "global attention", "precision",
        "memory, AdamW state", "memory, Muon state", "trial of 8 steps", "passes over the data", "at 3600 an hour",
    ):  # fmt: skip
        assert expected in shown
    assert "- held-out text: " in shown  # a store this small is warned of, with exit status 0
    assert files(small_store.parent) == before
    assert list(tmp_path.iterdir()) == []


def test_report_is_written_where_asked_and_a_run_folder_is_left_alone(run_folder, tmp_path, capsys):
    before = files(run_folder)
    assert main(["doctor", "--run", str(run_folder), "--out", str(tmp_path / "report")]) == 0
    assert files(run_folder) == before
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "lengths.png"}
    shown = capsys.readouterr().out
    assert f"run: {run_folder}" in shown
    assert "training loss" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optimizer.learning_rte=1"], "did you mean optimizer.lr?"),
        (["--price_per_hour=-1"], "price_per_hour is -1; expected at least 0"),
        (["--run", "nowhere"], "--run nowhere holds no config.yaml"),
        (["--data.store=nowhere", "--budget.steps=1"], "nowhere is not a store"),
        (["--data.store=nowhere"], "budget is empty"),
        (["--out", "."], "--out . exists"),
        (["--out", "runs/pretrain"], "is the recipe's run folder"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(argv, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *argv]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_of_another_model_is_warned_of_without_a_trial(known, small_store, tmp_path, capsys):
    other = load_tokenizer(known / "tokenizer")
    config = preset("modern", "tiny", vocab_size=len(other), pad_token_id=0, hidden_size=16, num_heads=2, num_layers=1)
    save(MaskedLM(config), tmp_path / "model", other)
    found = doctor.run_doctor(settings(small_store, model=Model(init_from=str(tmp_path / "model"))))
    assert "model.init_from" in of(found)
    assert "no trial" in capsys.readouterr().out
    fits = doctor._tokenizer_findings(doctor._Case.of(settings(known, model=Model(init_from=str(tmp_path / "model")))))
    assert list(fits) == []


def test_changed_tokenizer_of_a_store_is_warned_of(small_store):
    case = doctor._Case.of(settings(small_store))
    assert list(doctor._tokenizer_findings(case)) == []
    case.store.manifest["tokenizer"] = "0" * 64
    assert of(list(doctor._tokenizer_findings(case))) == ["tokenizer"]


def test_sentence_pairs_are_laid_out_and_tried_as_the_run_does(sentence_store, capsys):
    case = doctor._Case.of(settings(sentence_store, pairs="nsp"))
    assert (case.order.sizes == case.order.stop - case.order.start + 3).all()  # [CLS] A [SEP] B [SEP]
    found = doctor.run_doctor(settings(sentence_store, pairs="nsp"))
    assert "trial" not in of(found)
    with_head, without = (
        doctor.plan_model(settings(sentence_store, pairs=pairs), case.store, case.tokenizer)[0]
        for pairs in ("nsp", "none")
    )
    assert (with_head.sentence_pairs, without.sentence_pairs) == (True, False)
    told = " ".join(capsys.readouterr().out.split())
    assert f"parameters {doctor.empty_model(with_head).num_parameters():,}" in told


def test_a_model_that_does_not_fit_is_not_built(small_store, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run_trial", lambda _: pytest.fail("built"))
    monkeypatch.setattr(doctor._Case, "device_bytes", 1 << 16)
    found = doctor.run_doctor(settings(small_store))
    assert "memory" in of(found)
    assert "no trial: it does not fit" in capsys.readouterr().out


def test_a_trial_without_room_on_the_device_is_a_warning(small_store, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("encoderkit.pretrain.job.spread", full)
    assert "trial" in of(doctor.run_doctor(settings(small_store)))


@pytest.mark.parametrize(
    "error", [FloatingPointError("step 3: the gradient is not finite; no update was made"), torch.OutOfMemoryError()]
)
def test_a_trial_that_fails_is_a_warning(error, small_store, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(doctor, "run_trial", fail)
    assert "trial" in of(doctor.run_doctor(settings(small_store)))


def test_ram_is_the_machines_or_what_its_container_may_use(tmp_path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, expected in (("max\n", machine), ("4096\n", 4096), (f"{2 * machine}\n", machine)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(host_memory, "CGROUP_LIMIT", tmp_path / "limit")
        assert host_memory.ram_bytes() == expected
    monkeypatch.setattr(host_memory, "CGROUP_LIMIT", tmp_path / "none")
    assert host_memory.ram_bytes() == machine


def test_a_run_whose_log_is_no_pretraining_log_is_refused(tmp_path):
    for name, text in (("config.yaml", "{}"), ("run.json", "{}"), ("log.jsonl", json.dumps({"step": 1}) + "\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="pretraining"):
        doctor.run_doctor(settings(tmp_path), run=str(tmp_path))


@pytest.mark.parametrize("budget", [{"steps": 1003}, {"tokens": 12_345_678}, {"steps": 1}, {"tokens": 1}])
@pytest.mark.parametrize("ramp", [[], [(0.01, 1024), (0.3, 4096)], [(0.5, 16384)]])
def test_the_extent_of_a_run_is_that_of_walking_through_it(budget, ramp, small_store):
    data = Data(store=str(small_store), max_tokens=64, length_curriculum=[(0.2, 16), (0.3, 32)])
    settings = DoctorSettings(data=data, batch_ramp=ramp, budget=Budget(**budget), precision="fp32")
    clock, steps = Clock(settings), 0
    while clock.progress(steps) < 1:
        clock.stage = clock.due_stage(steps)
        steps += 1
    assert doctor._Case.of(settings).extent(None) == (steps, clock.stage.row(steps) * 1024 / 8192)


def test_doctor_and_its_trial_take_a_run_that_changes_on_the_way(small_store, capsys):
    argv = ["--data.store", str(small_store), "--data.max_tokens=32", "--data.row_tokens=256", *WORDS]
    argv += ["--budget.steps=8", "--batch_tokens=1024", "--micro_batch_tokens=512"]
    argv += ["--batch_ramp=[[0.5,512]]", "--data.length_curriculum=[[0.5,16]]"]
    assert main(["doctor", *argv]) == 0
    shown = capsys.readouterr().out
    assert "trial of 8 steps" in shown
    assert re.search(r"steps +8 *\n", shown)


@pytest.mark.parametrize(
    ("ramp", "rates", "fewest"),
    [
        ([], (0.3, None), 0.3 * 1024),
        ([(0.5, 256)], (0.3, None), 0.3 * 256),
        ([(0.5, 256)], (0.4, 0.2), 0.3 * 256),
        ([(0.5, 512)], (0.2, 0.4), 0.2 * 512),
        ([(0.5, 512)], (0.4, 0.1), 0.1 * 1024),
        ([(0.5, 256), (0.8, 512)], (0.4, 0.2), 0.3 * 256),
    ],
)
def test_the_fewest_targets_are_those_of_the_smallest_steps(ramp, rates, fewest, small_store):
    masking = Masking(rate=rates[0], final_rate=rates[1])
    case = doctor._Case.of(settings(small_store, batch_ramp=ramp, masking=masking))
    facts = SimpleNamespace(tokens=256 * 1000, rows=1000, unknown=0.0)  # rows of 256 tokens, all full
    assert case.step_targets(facts) == pytest.approx(fewest)
    half_unknown = SimpleNamespace(**{**vars(facts), "unknown": 0.5})  # unknown tokens are never predicted
    assert case.step_targets(half_unknown) == pytest.approx(fewest / 2)
    (finding,) = recipe_findings(case.settings, parameters=4_400_000, step_targets=10, passes=1.0)
    assert ("of batch_ramp" in finding.advice) == bool(ramp)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Two stores of the same made-up text: one of its own tokenizer, one of the tokenizer of another text."""
    folder, generator = tmp_path_factory.mktemp("larger"), np.random.default_rng(0)
    words = [first + second for first in "abcdefghij" for second in "abcdefghij"]

    def texts(count):
        return [" ".join(generator.choice(words, generator.integers(10, 37))) for _ in range(count)]

    train, held_out = texts(600), texts(700)
    (folder / "text.txt").write_text("\n\n".join(train))
    (folder / "held.txt").write_text("\n\n".join(held_out))
    for name, seen, types in (("sound", train, 125), ("foreign", [TEXT] * 4, 98)):
        tokenizer = folder / f"{name}-tokenizer"
        train_tokenizer("wordpiece", seen, types, lowercase=False, out=tokenizer)
        prepare([str(folder / "text.txt")], tokenizer, folder / name, held_out=str(folder / "held.txt"))
    return folder


@pytest.mark.parametrize(
    ("store", "changed", "about", "told"),
    [
        ("sound", [], set(), "no warnings"),
        ("sound", ["--optimizer.lr=3"], {"optimizer.lr"}, "- optimizer.lr: 3; expected "),
        (
            "foreign",
            [],
            {"unknown tokens", "vocabulary"},
            "train a tokenizer on this text with encoderkit-pretrain tokenizer",
        ),
        ("sound", ["--batch_tokens=256"], {"targets a step"}, "expected at least 150; raise batch_tokens from 256"),
    ],
    ids=["sound", "learning rate", "another text's tokenizer", "few targets"],
)
def test_a_sound_recipe_raises_no_warning_and_each_broken_one_its_own(store, changed, about, told, larger, capsys):
    argv = ["--data.store", str(larger / store), "--data.max_tokens=64", "--data.row_tokens=256", *WORDS]
    argv += ["--budget.steps=8", "--batch_tokens=1024", "--micro_batch_tokens=256", *changed]
    assert main(["doctor", *argv]) == 0
    shown = capsys.readouterr().out
    warnings = {line[2:].partition(":")[0] for line in shown.splitlines() if line.startswith("- ")}
    assert warnings == about
    assert told in shown
