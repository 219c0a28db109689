"""The race gives every side the same time and the same measure, and goes on where it was stopped."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import make_store

from encoderkit.encoder import precision
from encoderkit.encoder.precision import resolve_precision
from encoderkit.finetune import race, race_cell, race_opponents, race_tune
from encoderkit.finetune.race_settings import SIDES, Opponent, RaceSettings, TuneSettings
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.probe import ProbeScore, evaluate_probe_hf, probe_sequences
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.terminal import plain_console
from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer

MINUTES = 0.02
SMALL = "num_layers: 2, hidden_size: 32, num_heads: 4, intermediate_size: 48"
RECIPES = {
    "bert": f"{{architecture: bert, {SMALL}, max_tokens: 32, batch_size: 8}}",
    "modernbert": f"{{architecture: modern, {SMALL}, max_tokens: 32, batch_size: 8, layout: chunks, "
    "sparse_prediction: true}",
    "encoderkit": f"{{model: {{preset: modern, {SMALL}}}, data: {{max_tokens: 32, row_tokens: 64, workers: 0}}, "
    "batch_tokens: 256, micro_batch_tokens: 256, log: {every_steps: 5}}",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("race"))


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for side, text in RECIPES.items():
        (folder / f"{side}.yaml").write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "order.jsonl"
    lines = [{"good": f"the cat sees a {noun}", "bad": f"cat the a sees {noun}"} for noun in ("dog", "bird", "fox")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def raced(store, recipes, pairs, tmp_path_factory):
    """A race of all sides, one seed."""
    out = tmp_path_factory.mktemp("raced") / "race"
    settings = RaceSettings(
        store=str(store), out=str(out), minutes=MINUTES, seeds=1, points=2, recipes=recipes, minimal_pairs=pairs
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race_cell, "MOST_UNLIKE", 9.0)  # positions are most of BERT's parameters at this size
        results = race.run_race(settings, console=plain_console(quiet=True))
    return settings, results


def test_every_side_has_its_minutes_and_a_curve(raced):
    _, results = raced
    assert [result["side"] for result in results] == list(SIDES)
    for result in results:
        assert 60 * MINUTES <= result["seconds"] < 60 * MINUTES + 1
        assert result["tokens"] > 0
        assert np.isfinite([loss for _, loss in result["curve"]]).all()
        assert result["curve"][-1][1] == pytest.approx(result["loss"], abs=1e-6)
        assert 0 <= result["minimal_pairs"] <= 1
    assert len({result["precision"] for result in results}) == 1


def test_what_is_written_can_be_read(raced):
    settings, results = raced
    out = Path(settings.out)
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == results
    report = (out / "report.md").read_text()
    assert all(f"| {side} |" in report for side in SIDES)
    assert (out / "race.png").stat().st_size > 1000


@pytest.mark.parametrize("side", SIDES)
def test_a_finished_model_has_the_loss_that_was_told(raced, store, side):
    from transformers import AutoModelForMaskedLM

    settings, results = raced
    final = Path(settings.out) / side / "seed-0" / "final"
    tokenizer = load_tokenizer(final)
    sequences = probe_sequences(Store.open(store).held_out_texts(), tokenizer, seed=0)
    model = AutoModelForMaskedLM.from_pretrained(final)
    score = evaluate_probe_hf(model, sequences, pad_token_id=tokenizer.pad_token_id)
    assert score.loss == pytest.approx(next(r["loss"] for r in results if r["side"] == side), abs=1e-4)


def test_what_is_done_is_not_done_again(raced, monkeypatch):
    settings, results = raced
    monkeypatch.setattr(race_cell, "MOST_UNLIKE", 9.0)
    monkeypatch.setattr(race_cell, "run_cell", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)  # nothing is multiplied here
    assert race.run_race(settings, console=plain_console(quiet=True)) == results
    other = "fp32" if results[0]["precision"] == "bf16" else "bf16"
    for change in ({"minutes": 1}, {"points": 3}, {"precision": other}):
        with pytest.raises(InputError, match="was run with other settings"):
            race.run_race(dataclasses.replace(settings, **change), console=plain_console(quiet=True))
    monkeypatch.setattr(race_cell, "machine", lambda: {"threads": 99})
    with pytest.raises(InputError, match="or on another machine; choose another --out"):
        race.run_race(settings, console=plain_console(quiet=True))


def test_sides_of_different_sizes_do_not_race(raced):
    settings, _ = raced
    with pytest.raises(InputError, match="expected within 5%"):
        race.run_race(settings, console=plain_console(quiet=True))


def test_the_sides_that_are_shipped_are_of_one_size():
    tokens = TokenIds(8192, 0, 2, 3, 4, np.arange(5, 8192))
    race_cell.check_alike({side: race.read_side(side, None) for side in SIDES}, tokens)


def opponent(**changes) -> Opponent:
    small = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "max_tokens": 16}
    return Opponent(**{"architecture": "bert", "batch_size": 4, **small, **changes})


def rows_of(store: Path, layout: str) -> tuple[race_opponents.Rows, TokenIds]:
    opened = Store.open(store)
    tokens = TokenIds.of(load_tokenizer(opened.tokenizer_folder))
    return race_opponents.Rows(opened, tokens, opponent(layout=layout)), tokens


def test_chunks_are_full_and_hold_every_document(store):
    rows, tokens = rows_of(store, "chunks")
    opened = Store.open(store)
    assert {len(rows[i]["input_ids"]) for i in range(len(rows))} == {16}
    assert len(rows) == (opened.num_tokens + 2 * opened.num_documents) // 16
    joined = np.concatenate([rows[i]["input_ids"] for i in range(len(rows))])
    assert abs(int((joined == tokens.cls).sum()) - opened.num_documents) <= 1


def test_pieces_stand_between_cls_and_sep(store):
    rows, tokens = rows_of(store, "pieces")
    for i in range(len(rows)):
        ids, special = rows[i]["input_ids"], rows[i]["special_tokens_mask"]
        assert ids[0] == tokens.cls
        assert ids[-1] == tokens.sep
        assert 3 <= len(ids) <= 16
        assert special.tolist() == [1, *[0] * (len(ids) - 2), 1]
    opened = Store.open(store)
    assert len(rows) == sum(-(-len(opened.tokens(i)) // 14) for i in range(opened.num_documents))
    joined = np.concatenate([rows[i]["input_ids"][1:-1] for i in range(len(rows))])
    assert (joined == np.concatenate([opened.tokens(i) for i in range(opened.num_documents)])).all()


def test_a_store_without_a_row_is_told(store):
    opened = Store.open(store)
    tokens = TokenIds.of(load_tokenizer(opened.tokenizer_folder))
    with pytest.raises(InputError, match="expected at least max_tokens"):
        race_opponents.Rows(opened, tokens, opponent(layout="chunks", max_tokens=10**6))


def test_a_loop_that_diverges_is_told(store):
    with pytest.raises(FloatingPointError, match="held-out loss is nan at step"):
        trained_by(opponent(), store, points=1, measure=lambda model: ProbeScore(float("nan"), 0.0, 1))


@pytest.mark.parametrize("layout", ["chunks", "pieces"])
def test_the_collator_predicts_no_special_token(store, layout):
    rows, tokens = rows_of(store, layout)
    tokenizer = load_tokenizer(Store.open(store).tokenizer_folder)
    batches = race_opponents._batches(rows, tokenizer, opponent(layout=layout, mlm_probability=0.5), seed=0)
    predicted = torch.cat([next(batches)["labels"].flatten() for _ in range(20)])
    assert not np.isin(predicted[predicted >= 0].numpy(), [tokens.pad, tokens.cls, tokens.sep]).any()
    assert (predicted >= 0).any()


def trained_by(settings: Opponent, store: Path, **options) -> race_opponents.Trained:
    opened = Store.open(store)
    model = race_opponents.build_model(settings, TokenIds.of(load_tokenizer(opened.tokenizer_folder)), seed=0)
    fp32 = resolve_precision("fp32", torch.device("cpu"))
    return race_opponents.train(settings, opened, model, precision=fp32, minutes=0.005, seed=0, **options)


def test_the_clock_stands_still_while_the_probe_is_measured(store):
    began, score = time.perf_counter(), ProbeScore(1.0, 0.0, 1)
    trained = trained_by(opponent(), store, points=3, measure=lambda model: time.sleep(0.4) or score)
    assert len(trained.curve) == 3
    assert trained.seconds <= time.perf_counter() - began - 3 * 0.4  # however slow the machine is


def fake_cells(monkeypatch, loss_of) -> list:
    """run_cell without training; returns its calls. loss_of: a side's loss, None where it diverges."""
    calls = []

    def run_cell(side, seed, folder, *, store, minutes, precision, points, about):
        calls.append((side, seed, minutes))
        loss = loss_of(side)
        if loss is None:
            raise FloatingPointError("loss is nan")
        figures = dict.fromkeys(("tokens", "steps", "seconds", "tokens_per_second", "parameters"), 1)
        return {**about, **figures, "loss": loss, "curve": [[1, loss]], "seed": seed}

    monkeypatch.setattr(race_cell, "run_cell", run_cell)
    return calls


LRS = (1e-4, 1e-3, 1e-2, 1e-1)


@pytest.fixture
def search(store, recipes, tmp_path, monkeypatch):
    """Four trials: the recipe as it is, and three of four learning rates."""
    monkeypatch.setitem(race_tune.SPACES, "bert", [[{"lr": lr} for lr in LRS], [{"clip": clip} for clip in (1.0, 2.0)]])
    return TuneSettings(side="bert", store=str(store), out=str(tmp_path), trials=4, minutes=8, recipes=recipes)


def test_a_search_trains_the_best_two_for_longer_and_goes_on(search, monkeypatch):
    calls = fake_cells(monkeypatch, lambda side: abs(side.lr - 0.01))
    best = race_tune.tune(search, console=plain_console(quiet=True))
    log = race_tune.read_trials(Path(search.out) / "bert" / "trials.jsonl")
    assert [trial["minutes"] for trial in log] == [4] * 4 + [8] * 2
    first = sorted(log[:4], key=lambda trial: trial["loss"])
    assert [trial["changes"] for trial in log[4:]] == [trial["changes"] for trial in first[:2]]
    assert [(side.lr, seed, minutes) for side, seed, minutes in calls[4:]] == [
        (trial["settings"]["lr"], search.seed, 8) for trial in first[:2]
    ]
    assert best == first[0]["changes"]
    assert race.read_side("bert", f"{search.out}/bert") == race.read_side("bert", search.recipes, best)
    calls.clear()
    assert race_tune.tune(search, console=plain_console(quiet=True)) == best
    assert calls == []


@pytest.mark.parametrize("change", ["seed", "precision", "recipes", "machine"])
def test_trials_of_another_search_are_run_again(change, search, monkeypatch, tmp_path):
    calls = fake_cells(monkeypatch, lambda side: side.lr)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    quiet = plain_console(quiet=True)
    race_tune.tune(dataclasses.replace(search, precision="fp32"), console=quiet)
    calls.clear()
    other = tmp_path / "other"
    other.mkdir()
    (other / "bert.yaml").write_text(RECIPES["bert"].replace("batch_size: 8", "batch_size: 4"))
    values = {"seed": 1, "precision": "bf16", "recipes": str(other)}
    if change == "machine":
        monkeypatch.setattr(race_cell, "machine", lambda: {"threads": 99})
    changed = {change: values[change]} if change in values else {}
    race_tune.tune(dataclasses.replace(search, **{"precision": "fp32", **changed}), console=quiet)
    assert len(calls) == 6


def test_trials_that_diverge_are_left_behind(search, monkeypatch):
    calls = fake_cells(monkeypatch, lambda side: None if side.lr > 1e-3 else 1 - side.lr)
    best = race_tune.tune(search, console=plain_console(quiet=True))
    log = race_tune.read_trials(Path(search.out) / "bert" / "trials.jsonl")
    lost = [trial for trial in log if trial["loss"] is None]
    assert lost
    assert all((trial["minutes"], trial["error"]) == (4, "loss is nan") for trial in lost)
    assert best.get("lr", 1e-3) == max(lr for side, _, _ in calls if (lr := side.lr) <= 1e-3)
    calls.clear()
    race_tune.tune(search, console=plain_console(quiet=True))
    assert calls == []
    fake_cells(monkeypatch, lambda side: None)
    with pytest.raises(FloatingPointError, match=r"every trial of 4 minutes diverged; lower the rates of bert\.yaml"):
        race_tune.tune(dataclasses.replace(search, seed=2), console=plain_console(quiet=True))


def test_another_side_begins_with_each_seed(store, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(race_cell, "MOST_UNLIKE", 9.0)
    calls = fake_cells(monkeypatch, lambda side: 1.0)
    settings = RaceSettings(store=str(store), out=str(tmp_path), minutes=1, seeds=2, recipes=recipes)
    results = race.run_race(settings, console=plain_console(quiet=True))
    names = {race.read_side(side, recipes).__repr__(): side for side in SIDES}
    assert [(names[repr(side)], seed) for side, seed, _ in calls] == [
        ("encoderkit", 0), ("bert", 0), ("modernbert", 0), ("bert", 1), ("modernbert", 1), ("encoderkit", 1)
    ]  # fmt: skip
    assert [(result["side"], result["seed"]) for result in results] == [
        (side, seed) for side in SIDES for seed in (0, 1)
    ]
    assert '- `bert`: architecture "bert", num_layers 2' in (tmp_path / "report.md").read_text()


def test_pairs_that_cannot_be_read_are_told_before_anything_is_trained(store, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(race_cell, "MOST_UNLIKE", 9.0)
    options = {"recipes": recipes, "minimal_pairs": "nowhere.jsonl", "out": str(tmp_path / "race")}
    with pytest.raises(InputError, match=r"nowhere.jsonl"):
        race.run_race(RaceSettings(store=str(store), **options), console=plain_console(quiet=True))
    assert not (tmp_path / "race").exists()


def test_a_side_that_diverges_is_named(store, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(race_cell, "MOST_UNLIKE", 9.0)
    fake_cells(monkeypatch, lambda side: None if isinstance(side, Opponent) else 1.0)
    settings = RaceSettings(store=str(store), out=str(tmp_path), minutes=1, seeds=1, recipes=recipes)
    with pytest.raises(FloatingPointError, match="bert, seed 0: loss is nan"):
        race.run_race(settings, console=plain_console(quiet=True))


def test_every_choice_of_a_search_can_be_set():
    for side, space in race_tune.SPACES.items():
        for changes in (choice for line in space for choice in line):
            race.read_side(side, None, changes)
        trials = race_tune.choose_trials(TuneSettings(side=side, store="s", trials=8))
        assert trials[0] == {}
        assert len({json.dumps(trial) for trial in trials}) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--store", "s", "--sides", "[gpt]"], "no side is called 'gpt'; expected encoderkit, bert, modernbert"),
        (["run", "--store", "s", "--sides", "[bert,bert]"], "sides has bert twice; name it once"),
        (["run", "--store", "/no/store"], "is not a store"),
        (["run", "--store", "s", "--recipes", "/no"], "/no/encoderkit.yaml is not there"),
        (["tune", "--side", "bert", "--store", "s", "--trial", "3"], "trials"),
        (["tune", "--side", "bert", "--store", "/no/store", "--trials", "3000"], "expected at most 2304 for bert"),
    ],
)
def test_bad_input_is_told(words, message, capsys):
    assert race.main(words) == 2
    assert message in capsys.readouterr().err
