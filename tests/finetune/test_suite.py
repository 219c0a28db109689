"""The suite: its file, what is run and what is left, statistics against scipy, and the comparison."""

import dataclasses
import json
import math
import shutil
import subprocess
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from encoderkit.finetune import loop, suite
from encoderkit.finetune.__main__ import main
from encoderkit.finetune.comparison import compare, corrected, summarize
from encoderkit.finetune.data import load_data
from encoderkit.finetune.run_folder import held
from encoderkit.finetune.settings import FinetuneSettings, SuiteSettings
from encoderkit.finetune.suite import best_scores, compare_results, run_suite
from encoderkit.finetune.suite_file import read_suite
from encoderkit.finetune.suite_report import _verdict
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml, read_settings, run_command

pytestmark = pytest.mark.usefixtures("no_plots")
SUITE = """
lrs: [1.0e-3, 4.0e-3]
defaults: {epochs: 1, batch_size: 32, max_tokens: 32, precision: fp32}
tasks:
  colour:
    data: {train: [train.jsonl], validation: [validation.jsonl], test: [test.jsonl]}
  same:
    data: {train: [train.jsonl]}
    columns: {text_b: other, label: same}
    start_from: colour
    lrs: [2.0e-3]
"""


@pytest.fixture
def suite_file(tmp_path):
    (tmp_path / "small.yaml").write_text(SUITE)
    return str(tmp_path / "small.yaml")


def settings_for(model, suite_file, task_files, out, **changes):
    return SuiteSettings(model=model, suite=suite_file, data=str(task_files), out=str(out), **{"seeds": 2, **changes})


def test_a_task_file_lies_beside_its_suite(tmp_path, monkeypatch):
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "stars.yaml").write_text("kind: classification\ndata: {train: [stars.jsonl]}\ncolumns: {text: body}\n")
    (folder / "stars.jsonl").write_text('{"body": "x", "label": 0}\n')
    (folder / "mine.yaml").write_text("tasks:\n  stars: {task: stars.yaml}\n")
    monkeypatch.chdir(tmp_path)
    suite = read_suite(SuiteSettings(model="m", suite="suites/mine.yaml"))
    task = suite["stars"].settings("m", 1e-3, 0, "out").resolve()
    assert task.columns.text == "body"
    assert [Path(path).resolve() for path in task.data.train] == [folder / "stars.jsonl"]


def test_every_cell_is_run_once_and_a_stopped_suite_goes_on(
    modern_folder, suite_file, task_files, tmp_path, monkeypatch
):
    real, started = loop.finetune, []

    def counted(settings, data, **options):
        if len(started) == 3 and "stop" not in state:
            state["stop"] = True
            raise KeyboardInterrupt
        started.append(settings)
        return real(settings, data, **options)

    state = {}
    monkeypatch.setattr(loop, "finetune", counted)
    settings = settings_for(modern_folder, suite_file, task_files, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_suite(settings)
    results = run_suite(settings)
    assert len(started) == 2 * 2 + 2
    assert [(r["task"], r["lr"], r["seed"]) for r in results] == [
        *(("colour", lr, seed) for lr in (1e-3, 4e-3) for seed in (0, 1)),
        *(("same", 2e-3, seed) for seed in (0, 1)),
    ]
    assert results == [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    colour = [r for r in results if r["task"] == "colour"]
    assert {r["measured_on"] for r in colour} == {"test"}
    medians = {lr: sum(r["validation_score"] for r in colour if r["lr"] == lr) for lr in (1e-3, 4e-3)}
    best = max(medians, key=medians.get)
    for settings_of_run in started[4:]:  # the second task starts from the first one's best rate, seed by seed
        assert f"colour/lr-{best:g}-seed-{settings_of_run.seed}/final" in settings_of_run.model
    report = (tmp_path / "out" / "report.md").read_text()
    shown = summarize([r["score"] for r in colour if r["lr"] == best])
    assert f"| colour | accuracy | test | {shown.median:.4f} | {shown.mean:.4f} ± {shown.sd:.4f} |" in report
    assert "from the model of colour: another protocol" in report
    assert (tmp_path / "out" / "scores.png").stat().st_size > 1000
    run_suite(settings)
    assert len(started) == 6
    with pytest.raises(InputError, match="model: other has other weights than the model that the runs in"):
        run_suite(settings_for("other", suite_file, task_files, tmp_path / "out"))
    moved = str(shutil.copytree(modern_folder, tmp_path / "moved"))  # the same weights in another place
    assert run_suite(settings_for(moved, suite_file, task_files, tmp_path / "out")) == results
    assert len(started) == 6

    Path(suite_file).write_text(SUITE.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(InputError, match=r"colour/lr-0.001-seed-0: epochs: 1 -> 2: not as the run began"):
        run_suite(settings)
    Path(suite_file).write_text(SUITE)

    with pytest.raises(InputError, match="against: colour has other rows here than there"):
        compare_results(best_scores(results), best_scores([{**result, "data": "others"} for result in results]))
    other = settings_for(modern_folder, suite_file, task_files, tmp_path / "untrained", untrained=True, lrs=[1e-3])
    run_suite(SuiteSettings(**{**vars(other), "against": str(tmp_path / "out"), "search_seeds": 1}))
    report = (tmp_path / "untrained" / "report.md").read_text()
    assert "## Against" in report
    assert "This model is better on" in report
    with pytest.raises(InputError, match=r"against: .*cannot be read"):
        run_suite(SuiteSettings(**{**vars(other), "against": "nowhere", "out": str(tmp_path / "fresh")}))
    assert not (tmp_path / "fresh").exists()


class Ended:
    """A process that has ended, in place of one."""

    def __init__(self, status, errors):
        self.returncode, self.errors = status, errors

    def communicate(self):
        return None, self.errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def replace_processes(monkeypatch, start):
    """start(command, env=...) in place of Popen."""
    names = {"Popen": start, "DEVNULL": subprocess.DEVNULL, "PIPE": subprocess.PIPE}
    monkeypatch.setattr(suite, "subprocess", types.SimpleNamespace(**names))


def test_runs_side_by_side_are_commands_that_give_the_same_results(
    modern_folder, suite_file, task_files, tmp_path, monkeypatch, capsys
):
    lock, commands, threads = threading.Lock(), [], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)

    def run(command, *, env, **_):
        with lock:  # the commands run here, one after another
            commands.append((command[1:4], Path(command[-1]).name))
            threads.append(env["OMP_NUM_THREADS"])
            status = main(command[3:])
        return Ended(status, "error: " + "x\nerror: no space\nfree some" * (status != 0))

    def results_of(name, **changes):
        options = {"lrs": [4e-3], "tasks": ["colour"], **changes}
        results = run_suite(settings_for(modern_folder, suite_file, task_files, tmp_path / name, **options))
        return [{k: v for k, v in result.items() if k != "time"} for result in results]

    replace_processes(monkeypatch, run)
    assert results_of("one", jobs=1) == results_of("two", jobs=2)
    assert sorted(name for _, name in commands) == ["lr-0.004-seed-0.yaml", "lr-0.004-seed-1.yaml"]
    assert set(threads) == {"4"}  # a share of the cores each
    assert {tuple(words) for words, _ in commands} == {("-m", "encoderkit.finetune", "run")}
    with pytest.raises(InputError, match=r"colour, rate 0.004, seed [01]: no space\nfree some"):
        results_of("failing", jobs=2, set={"max_tokens": "65"})


def test_what_runs_beside_a_run_that_cannot_is_stopped(suite_file, task_files, tmp_path, monkeypatch):
    both_started, stopped = threading.Barrier(2), threading.Event()

    class Failing(Ended):
        def communicate(self):
            both_started.wait(timeout=30)
            return None, "error: no space"

    class Long(Ended):
        def communicate(self):
            both_started.wait(timeout=30)
            assert stopped.wait(timeout=30)
            return None, ""

        def terminate(self):
            stopped.set()

    def start(command, **_):
        return (Failing if command[-1].endswith("seed-0.yaml") else Long)(2, "")

    replace_processes(monkeypatch, start)
    settings = settings_for("m", suite_file, task_files, tmp_path / "out", tasks=["colour"], lrs=[1e-3], jobs=2)
    with pytest.raises(InputError, match=r"seed 0: no space"):
        run_suite(settings)
    assert stopped.is_set()


def scored(seed, lr, scores):
    """metrics.json of a run in place of training."""
    return {
        "metric": "accuracy",
        "validation": {"accuracy": scores[lr][seed]},
        "data": "of all runs",
        "rows": {"train": 96, "validation": 40},
        "best_epoch": 1,
        "model": "m",
        "untrained": False,
        "precision": "fp32",
        "time": {"seconds": 1.0},
    }


def without_training(monkeypatch, scores):
    """Runs end at once with these scores, lr -> seed -> accuracy; None is a loss that is not finite."""
    started = []

    def finetune(settings, data, **_):
        seed, lr = settings.seed, settings.optimizer.lr
        started.append((lr, seed))
        Path(settings.out).mkdir(parents=True)
        (Path(settings.out) / "config.yaml").write_text(dump_yaml(settings))
        if scores[lr][seed] is None:
            raise FloatingPointError("loss is nan at step 1")
        (Path(settings.out) / "metrics.json").write_text(json.dumps(scored(seed, lr, scores)))

    monkeypatch.setattr(loop, "finetune", finetune)
    return started


def test_only_seeds_that_tried_every_rate_choose_one(suite_file, task_files, tmp_path, monkeypatch):
    scores = {1e-3: [0.9, 0.1, 0.2], 4e-3: [0.8, 0.8, 0.8]}  # over all of its seeds the first rate is the worse one
    started = without_training(monkeypatch, scores)
    settings = settings_for("m", suite_file, task_files, tmp_path / "out", seeds=3, search_seeds=1, tasks=["colour"])
    results = run_suite(settings)
    assert started == [(1e-3, 0), (4e-3, 0), (1e-3, 1), (1e-3, 2)]
    assert [(r["lr"], r["seed"], r["chosen"]) for r in results] == [
        *((1e-3, seed, True) for seed in range(3)),
        (4e-3, 0, False),
    ]
    assert {seed: r["score"] for seed, r in best_scores(results)["colour"].items()} == {0: 0.9, 1: 0.1, 2: 0.2}
    report = (tmp_path / "out/report.md").read_text()
    assert "| colour | accuracy | validation | 0.2000 |" in report
    assert "| colour | 0.001 | 0.9000 | 1 | chosen |" in report
    other = settings_for("n", suite_file, task_files, tmp_path / "other", seeds=3, lrs=[4e-3], tasks=["colour"])
    run_suite(dataclasses.replace(other, against=str(tmp_path / "out")))
    assert "| colour | 0.8000 | 0.4000 | +0.4000 |" in (tmp_path / "other/report.md").read_text()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_rate_whose_loss_is_not_finite_is_told_and_not_chosen(
    suite_file, task_files, tmp_path, monkeypatch, capsys, jobs
):
    scores = {1e-3: [0.5, 0.6], 4e-3: [0.9, None]}
    started, lock = without_training(monkeypatch, scores), threading.Lock()

    def run(command, **_):
        with lock:
            settings = read_settings(FinetuneSettings, Path(command[-1]))
            status = run_command(lambda: loop.finetune(settings, None))
            return Ended(status, capsys.readouterr().err)

    replace_processes(monkeypatch, run)
    settings = settings_for("m", suite_file, task_files, tmp_path / "out", tasks=["colour"], jobs=jobs)
    results = run_suite(settings)
    assert [r["lr"] for r in results if r["chosen"]] == [1e-3, 1e-3]
    assert results[-1] == {"task": "colour", "lr": 4e-3, "seed": 1, "failed": "loss is nan at step 1", "chosen": False}
    report = (tmp_path / "out/report.md").read_text()
    assert "- colour, rate 0.004, seed 1: loss is nan at step 1" in report
    assert "| colour | 0.004 |  | 2 | failed |" in report
    run_suite(settings)
    assert len(started) == 4  # a run that failed would fail again
    failing = dataclasses.replace(settings, lrs=[4e-3], out=str(tmp_path / "failing"))
    with pytest.raises(InputError, match=r"colour: every rate failed, .* 0.004: loss is nan at step 1"):
        run_suite(failing)


def results(metric="accuracy", rows=9, **scores):
    about = {"metric": metric, "measured_on": "test", "rows": {"test": rows}}
    return {task: {seed: {"score": x, **about} for seed, x in by_seed.items()} for task, by_seed in scores.items()}


def test_a_suite_is_one_process_at_a_time_and_sets_what_is_its_own(modern_folder, suite_file, task_files, tmp_path):
    settings = settings_for(modern_folder, suite_file, task_files, tmp_path / "out")
    assert read_suite(dataclasses.replace(settings, tasks=["colour"]))["colour"].is_start  # though "same" is not run
    with held(tmp_path / "out"), pytest.raises(InputError, match=r"out is in use by process"):
        run_suite(settings)
    with pytest.raises(InputError, match=r"^set.seed is set by the suite itself"):
        read_suite(dataclasses.replace(settings, set={"seed": "7"}))


def test_runs_of_other_rows_are_not_mixed(modern_folder, suite_file, task_files, tmp_path):
    data = shutil.copytree(task_files, tmp_path / "data")
    settings = settings_for(modern_folder, suite_file, data, tmp_path / "out", tasks=["colour"], lrs=[1e-3], seeds=1)
    run_suite(settings)
    rows = (data / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "test.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(InputError, match=r"colour: .*seed-0 and .*seed-1 are of different rows"):
        run_suite(dataclasses.replace(settings, seeds=2))


def test_a_run_that_a_process_still_writes_is_left_alone(modern_folder, suite_file, task_files, tmp_path):
    options = {"tasks": ["colour"], "lrs": [1e-3]}
    settings = settings_for(modern_folder, suite_file, task_files, tmp_path / "out", seeds=1, **options)
    run_suite(settings)
    run = tmp_path / "out/runs/colour/lr-0.001-seed-1"  # of a second seed, whose suite was killed
    with held(run):
        (run / "log.jsonl").write_text("")
        with pytest.raises(InputError, match=r"lr-0\.001-seed-1"):
            run_suite(dataclasses.replace(settings, seeds=2))
    assert (run / "log.jsonl").exists()


def test_scores_of_two_kinds_are_not_compared():
    this, base = results(a={0: 0.5, 1: 0.6}), results(metric="f1", a={0: 0.5, 1: 0.6})
    with pytest.raises(InputError, match=r"a is accuracy on 9 rows of test here, f1 on 9 rows of test there"):
        compare_results(this, base)
    with pytest.raises(InputError, match=r"on 9 rows of test here, accuracy on 8 rows of test there"):
        compare_results(this, results(rows=8, a={0: 0.5, 1: 0.6}))


def test_the_average_is_paired_by_seed():
    this = results(a={0: 0.5, 1: 0.6, 2: 0.7}, b={1: 0.1, 2: 0.3})
    base = results(a={0: 0.1, 1: 0.2, 2: 0.3}, b={0: 0.9, 1: 0.0, 2: 0.1})
    _, mine, theirs = compare_results(this, base)["average"]
    assert (mine, theirs) == (pytest.approx([0.35, 0.5]), pytest.approx([0.1, 0.2]))  # seeds 1 and 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks:\n  a:\n    epoch: 3\n", ["line 3", "unknown key epoch; did you mean epochs?"]),
        ("tasks:\n  a:\n    seed: 3\n", ["line 3", "seed is set by the suite itself"]),
        ("task:\n  a:\n    epochs: 3\n", ["line 3", "unknown key task.a.epochs"]),
        ("lrs: fast\ntasks:\n  a:\n    task: rte\n", ["line 1", "expected a list of learning rates"]),
        ("lrs: [1]\n", ["no tasks"]),
        ("lrs: [1.0e-3, 0.001]\ntasks:\n  a:\n    task: rte\n", ["line 1", "0.001 0.001; expected each rate once"]),
        ("tasks:\n  a:\n    task: rtee\n", ["did you mean rte?"]),
        ("tasks:\n  a: {task: rte, start_from: b}\n", ["a starts from b, which is no task of this suite"]),
        ("tasks:\n  a: {task: rte, start_from: b}\n  b: {task: rte, start_from: a}\n", ["break the circle"]),
        ("tasks:\n  a:\n    data: {train: [nowhere.jsonl]}\n", ["a: ", "nowhere.jsonl: no such file", "--data"]),
    ],
)
def test_bad_suites_are_told_before_anything_runs(tmp_path, capsys, text, words):
    (tmp_path / "s.yaml").write_text(text)
    assert main(["suite", "m", "--suite", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert told.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_settings_of_the_command_line_are_over_those_of_the_file(suite_file, task_files):
    settings = settings_for("m", suite_file, task_files, "out", set={"epochs": "7", "optimizer.weight_decay": "0.1"})
    made = read_suite(settings)["same"].settings("m", 1e-3, 4, "out")
    assert (made.epochs, made.optimizer.weight_decay, made.optimizer.lr, made.seed) == (7, 0.1, 1e-3, 4)
    assert made.data.train == [str(task_files / "train.jsonl")]
    with pytest.raises(InputError, match=r"unknown task colours; did you mean colour\?"):
        read_suite(settings_for("m", suite_file, task_files, "out", tasks=["colours"]))


SUITES = sorted((Path(loop.__file__).parent / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_packaged_suites_are_whole(path, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # of the data
    settings = SuiteSettings(model="m", suite=str(path), data="there")
    for task in read_suite(settings).values():
        for lr in task.lrs(settings):
            resolved = task.settings("m", lr, 0, "out").resolve()
            assert resolved.columns.names()
            assert resolved.data.train or resolved.data.hub


def test_the_files_of_the_local_suite_have_its_columns(data_folder):
    settings = SuiteSettings(model="m", suite=str(SUITES[-1]), data=str(data_folder))
    tasks = read_suite(settings)
    assert len(tasks) == 12
    for task in tasks.values():
        data = load_data(task.settings("m", 1e-3, 0, "out").resolve())
        assert min(len(split) for split in (data.train, *data.splits().values())) >= 100


def test_intervals_and_tests_equal_scipy():
    a, b = [0.81, 0.79, 0.84, 0.80], [0.78, 0.79, 0.80, 0.77]
    found = summarize(a)
    interval = scipy.stats.t.interval(0.95, 3, loc=sum(a) / 4, scale=scipy.stats.sem(a))
    assert (found.low, found.high) == pytest.approx(interval)
    assert found.median == pytest.approx(0.805)
    compared = compare(a, b)
    expected = scipy.stats.ttest_rel(a, b)
    assert compared.p == pytest.approx(expected.pvalue)
    assert (compared.low, compared.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert compared.verdict.startswith("no difference shown")
    assert compare([0.9, 0.91, 0.92, 0.9], b).verdict == "better"
    assert compare(b, [0.9, 0.91, 0.92, 0.9]).verdict == "worse"
    assert compare([0.9], [0.1]).verdict.startswith("inconclusive")
    equal = compare([0.5, 0.5], [0.5, 0.5])
    assert (equal.p, equal.verdict) == (1.0, "no difference: the scores are equal")
    one_row_each = compare([144 / 277, 150 / 277], [143 / 277, 149 / 277])
    assert one_row_each.verdict == "inconclusive: the differences have no spread"
    assert math.isnan(summarize([0.5]).sd)


def test_the_verdict_names_the_tasks():
    better, worse, equal = (compare([x, x + 0.01, x], [0.5, 0.5, 0.51]) for x in (0.9, 0.1, 0.5))
    told = _verdict({name: (found, [], []) for name, found in (("a", better), ("b", worse), ("c", equal))})
    assert told == "This model is better on 1 of 3 tasks (a), worse on 1 (b)."


def test_a_difference_that_does_not_outlast_the_correction_is_inconclusive():
    clear, none = compare([0.9, 0.94, 0.91], [0.8, 0.8, 0.8]), compare([0.9, 0.8, 0.85], [0.85, 0.85, 0.85])
    assert clear.verdict == "better"
    many = corrected({"clear": clear, **{f"none {i}": none for i in range(20)}})
    assert many["clear"].verdict == "inconclusive: shown alone, but not among so many comparisons"
    assert many["none 0"].verdict.startswith("no difference shown")


def test_p_values_of_several_tasks_are_corrected_as_holm_does():
    pairs = {
        "a": ([3.0, 3.1, 2.9], [0.0, 0.0, 0.0]),
        "b": ([1.0, 0.2, 0.5], [0, 0, 0]),
        "c": ([0.1, -0.3, 0.5], [0, 0, 0]),
    }
    plain = {name: compare(*scores) for name, scores in pairs.items()}
    held = corrected(plain)
    assert held["a"].p == pytest.approx(3 * plain["a"].p)
    assert held["b"].p == pytest.approx(2 * plain["b"].p)
    assert held["c"].p == pytest.approx(plain["c"].p)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_detectable_difference_is_detected_four_times_in_five(n):
    generator = np.random.default_rng(0)
    sd = 0.02
    noise = generator.normal(scale=sd, size=(4000, n))
    typical = compare((noise[0] / noise[0].std(ddof=1) * sd).tolist(), [0.0] * n).detectable
    found = scipy.stats.ttest_1samp(noise + typical, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)
