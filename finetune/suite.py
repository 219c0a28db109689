"""Tasks by rates by seeds, each a fine-tuning run of its own: what a model is worth, with spread and intervals.

The rate of a task is chosen by the median of its validation scores over the seeds that tried every rate; what is
reported is the test score where there is test data, else the validation score. A run is over when its metrics.json is
there, or its failed.json, where its loss was not finite: a suite that was stopped goes on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.comparison import Comparison, compare, corrected
from encoderkit.finetune.data import LabelledData, load_data
from encoderkit.finetune.run_folder import check_same, held
from encoderkit.finetune.settings import FinetuneSettings, SuiteSettings
from encoderkit.finetune.settings import Precision as PrecisionName
from encoderkit.finetune.suite_file import SuiteTask, read_suite
from encoderkit.finetune.suite_report import write_suite_report
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.run_folder import clear_folder, model_fingerprint, replace_file
from encoderkit.pretrain.terminal import plain_console

Result = dict[str, Any]  # a line of results.jsonl; chosen: at its task's rate; failed: why it has no scores


@dataclass(frozen=True)
class Run:
    """One cell of the suite."""

    task: str
    lr: float
    seed: int
    out: Path

    def __str__(self) -> str:
        return f"{self.task}, rate {self.lr:g}, seed {self.seed}"


def run_suite(
    settings: SuiteSettings, *, precision: PrecisionName | None = None, console: Console | None = None
) -> list[Result]:
    """Run what is missing, write results.jsonl, report.md and scores.png into settings.out; returns all results.

    precision: in place of auto, which the suite resolves itself without it. Raises InputError for a suite that cannot
    be run, before anything runs, for a run that cannot, and for a task of which every rate fails.
    """
    console = console or plain_console()
    tasks = read_suite(settings)
    out = Path(settings.out)
    base = _read_base(settings.against) if settings.against else None
    _check_out(out)
    with held(out):
        return _run_held(settings, tasks, base, _begin_folder(out, settings, precision), console)


def _run_held(
    settings: SuiteSettings,
    tasks: dict[str, SuiteTask],
    base: dict[str, dict[int, Result]] | None,
    precision: PrecisionName,
    console: Console,
) -> list[Result]:
    """run_suite in a folder that is this process's own."""
    out, start = Path(settings.out), time.monotonic()
    jobs = settings.jobs or max(1, _gpus())
    for wave in _waves(tasks):
        search = range(settings.num_search_seeds)
        runs = [_run(out, task.name, lr, seed) for task in wave for lr in task.lrs(settings) for seed in search]
        _run_all(runs, tasks, settings, precision, jobs, console)
        results = _results(out, tasks, settings)
        rates = {task.name: _best_rate(results, task.name, settings) for task in wave}
        runs = [_run(out, task.name, rates[task.name], seed) for task in wave for seed in range(settings.seeds)]
        _run_all(runs, tasks, settings, precision, jobs, console)
    results = _results(out, tasks, settings)
    chosen_rates = {task: _best_rate(results, task, settings) for task in tasks}
    results = [{**result, "chosen": result["lr"] == chosen_rates[result["task"]]} for result in results]
    _write_results(out, results)
    chosen = best_scores(results)
    comparisons = compare_results(chosen, base) if base is not None else None
    seconds = time.monotonic() - start
    write_suite_report(out, settings, tasks, results, chosen, comparisons, seconds, console)
    return results


def best_scores(results: list[Result]) -> dict[str, dict[int, Result]]:
    """task -> seed -> the result at the task's rate; seeds that failed there are left out."""
    chosen: dict[str, dict[int, Result]] = {}
    for result in results:
        if result["chosen"] and "failed" not in result:
            chosen.setdefault(result["task"], {})[result["seed"]] = result
    return chosen


def compare_results(
    chosen: dict[str, dict[int, Result]], base: dict[str, dict[int, Result]]
) -> dict[str, tuple[Comparison, list[float], list[float]]]:
    """Each task that both have, and the average over tasks under "average", paired by seed.

    Raises InputError where there is none, or where one was measured in two ways.
    """
    pairs: dict[str, dict[int, tuple[float, float]]] = {}
    for task in chosen:
        seeds = sorted(set(chosen[task]) & set(base.get(task, {})))
        for seed in seeds:
            ways = [_measured(side[task][seed]) for side in (chosen, base)]
            if ways[0] != ways[1]:
                raise InputError(f"against: {task} is {ways[0]} here, {ways[1]} there; compare suites measured alike")
            if len({side[task][seed].get("data") for side in (chosen, base)} - {None}) > 1:
                raise InputError(f"against: {task} has other rows here than there; compare suites of the same files")
        if seeds:
            pairs[task] = {seed: (chosen[task][seed]["score"], base[task][seed]["score"]) for seed in seeds}
    if not pairs:
        raise InputError("against: no task and seed that both suites have; compare suites of the same tasks")
    scores = {task: _sides(by_seed.values()) for task, by_seed in pairs.items()}
    compared = corrected({task: compare(*sides) for task, sides in scores.items()})
    found = {task: (compared[task], *sides) for task, sides in scores.items()}
    shared = sorted(set.intersection(*map(set, pairs.values())))
    if len(pairs) > 1 and shared:
        of_tasks = [_sides(by_seed[seed] for by_seed in pairs.values()) for seed in shared]
        this, other = ([statistics.fmean(sides[i]) for sides in of_tasks] for i in (0, 1))
        found["average"] = (compare(this, other), this, other)
    return found


def _measured(result: Result) -> str:
    """How a score came about, in words."""
    split = result["measured_on"]
    return f"{result['metric']} on {result['rows'][split]:,} rows of {split}"


def _sides(pairs: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    this, other = zip(*pairs)
    return list(this), list(other)


def _run(out: Path, task: str, lr: float, seed: int) -> Run:
    return Run(task, lr, seed, out / "runs" / task / f"lr-{lr:g}-seed-{seed}")


def _waves(tasks: dict[str, SuiteTask]) -> Iterator[list[SuiteTask]]:
    """Tasks that start from another one's model come after it."""
    done: set[str] = set()
    while len(done) < len(tasks):
        wave = [t for t in tasks.values() if t.name not in done and (t.start_from is None or t.start_from in done)]
        assert wave  # read_suite has checked
        done |= {task.name for task in wave}
        yield wave


def _settings_of(
    run: Run, tasks: dict[str, SuiteTask], settings: SuiteSettings, precision: PrecisionName
) -> FinetuneSettings:
    """The settings of a run, whose model may be another run's; precision: in place of auto."""
    task, model = tasks[run.task], settings.model
    if task.start_from is not None:
        results = _results(Path(settings.out), tasks, settings)
        rate = _best_rate(results, task.start_from, settings)
        start = _run(Path(settings.out), task.start_from, rate, run.seed)
        if _failure(start) is not None:
            raise InputError(f"{run.task} starts from {start}, which failed; give lower rates by --lrs")
        model = str(start.out / "final")
    untrained = settings.untrained and not task.start_from
    made = task.settings(model, run.lr, run.seed, str(run.out), untrained=untrained)
    return dataclasses.replace(made, precision=precision) if made.precision == "auto" else made


def _run_all(
    runs: list[Run],
    tasks: dict[str, SuiteTask],
    settings: SuiteSettings,
    precision: PrecisionName,
    jobs: int,
    console: Console,
) -> None:
    """Do the runs that are not done: here one after another, or as processes of their own, so many at once."""
    waiting = [run for run in runs if not (run.out / "metrics.json").is_file() and _failure(run) is None]
    for run in runs:
        if run not in waiting:
            _check_same_run(run, _settings_of(run, tasks, settings, precision), tasks[run.task])
        elif run.out.exists():
            with held(run.out):  # a process that outlived its suite may still write it
                clear_folder(run.out)
    if jobs == 1:
        from encoderkit.finetune.loop import finetune

        data: dict[str, LabelledData] = {}
        for i, run in enumerate(waiting, 1):
            of_run = _settings_of(run, tasks, settings, precision)
            if run.task not in data:
                data = {run.task: load_data(of_run.resolve())}
            with _noted(run):
                finetune(of_run, data[run.task], console=Console(quiet=True))
            _tell(run, i, len(waiting), tasks, console)
        return
    devices: queue.SimpleQueue[int] = queue.SimpleQueue()
    for device in range(jobs):
        devices.put(device)
    running: set[subprocess.Popen[str]] = set()

    def work(run: Run) -> Run:
        device = devices.get()
        try:
            with _noted(run):
                _in_process(run, _settings_of(run, tasks, settings, precision), device, jobs, running)
        finally:
            devices.put(device)
        return run

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(work, run) for run in waiting]
        try:
            for i, future in enumerate(concurrent.futures.as_completed(started), 1):
                _tell(future.result(), i, len(waiting), tasks, console)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise


@contextlib.contextmanager
def _noted(run: Run) -> Iterator[None]:
    """Write failed.json where the loss is not finite: the rate is no good, and the suite goes on."""
    try:
        yield
    except FloatingPointError as error:
        replace_file(run.out / "failed.json", json.dumps({"failed": str(error)}) + "\n")


def _failure(run: Run) -> str | None:
    """Why a run has no scores."""
    path = run.out / "failed.json"
    return json.loads(path.read_text(encoding="utf-8"))["failed"] if path.is_file() else None


def _check_same_run(run: Run, of_run: FinetuneSettings, task: SuiteTask) -> None:
    """Raise InputError where a run that is over had other settings: the suite file may have been changed."""
    try:
        # The suite's model may lie elsewhere now: _begin_folder has looked at its weights.
        check_same(run.out / "config.yaml", of_run, free=("model",) if task.start_from is None else ())
    except InputError as error:
        raise InputError(f"{run.out}: {error}, or choose another --out") from error


def _in_process(
    run: Run, of_run: FinetuneSettings, device: int, jobs: int, running: set[subprocess.Popen[str]]
) -> None:
    """One of several runs at once as a process, on a GPU of its own, or with its share of the cores.

    running: where the process is found while it lasts.
    """
    run.out.parent.mkdir(parents=True, exist_ok=True)
    config = run.out.parent / f"{run.out.name}.yaml"
    config.write_text(dump_yaml(of_run), encoding="utf-8")
    environment = dict(os.environ)
    if _gpus():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[device % len(visible)] if visible[0] else str(device % _gpus())
    elif "OMP_NUM_THREADS" not in environment:
        import torch

        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    command = [sys.executable, "-m", "encoderkit.finetune", "run", "--config", str(config)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        running.add(process)
        _, errors = process.communicate()
        running.discard(process)
    config.unlink()
    if process.returncode:
        _, found, told = f"\n{errors.strip()}".rpartition("\nerror: ")
        if not found:  # a traceback, or nothing
            told = told.splitlines()[-1] or f"exit status {process.returncode}"
        if process.returncode == 1 and told.startswith("loss"):
            raise FloatingPointError(told)
        raise InputError(f"{run}: {told}")


def _tell(run: Run, number: int, count: int, tasks: dict[str, SuiteTask], console: Console) -> None:
    """One line a run; its model is removed unless another task starts from it."""
    failed = _failure(run)
    if failed is not None:
        console.print(f"{number}/{count}  {run.task}  rate {run.lr:g}  seed {run.seed}  failed: {failed}")
        return
    found = json.loads((run.out / "metrics.json").read_text())
    if not tasks[run.task].is_start:
        shutil.rmtree(run.out / "final", ignore_errors=True)
    console.print(
        f"{number}/{count}  {run.task}  rate {run.lr:g}  seed {run.seed}  {found['metric']} "
        f"{found['validation'][found['metric']]:.4f} on validation  {found['time']['seconds']:.0f} s"
    )


def _results(out: Path, tasks: dict[str, SuiteTask], settings: SuiteSettings) -> list[Result]:
    """Every run of the suite's rates and seeds that is over, in the order of tasks, rates and seeds."""
    results = []
    for task in tasks.values():
        rows: dict[str, Run] = {}  # data -> a run that was of it
        for lr in task.lrs(settings):
            for seed in range(settings.seeds):
                run = _run(out, task.name, lr, seed)
                failed, path = _failure(run), run.out / "metrics.json"
                if failed is not None:
                    results.append({"task": task.name, "lr": lr, "seed": seed, "failed": failed})
                elif path.is_file():
                    found = json.loads(path.read_text())
                    rows.setdefault(found.get("data", ""), run)
                    results.append(_result(task.name, lr, seed, found))
        if len(rows) > 1:
            one, other = (str(run.out) for run in list(rows.values())[:2])
            raise InputError(f"{task.name}: {one} and {other} are of different rows; remove the older runs of it")
    return results


def _result(task: str, lr: float, seed: int, found: dict[str, Any]) -> Result:
    metric, measured = found["metric"], "test" if "test" in found else "validation"
    return {
        "task": task,
        "lr": lr,
        "seed": seed,
        "metric": metric,
        "measured_on": measured,
        "score": found[measured][metric],
        "validation_score": found["validation"][metric],
        **{
            name: found[name]
            for name in ("validation", "test", "majority_share", "rows", "best_epoch", "data")
            if name in found
        },
        **{name: found[name] for name in ("model", "untrained", "precision", "time")},
    }


def _best_rate(results: list[Result], task: str, settings: SuiteSettings) -> float:
    """The rate with the best median on validation over the seeds that tried every rate; of equals the first.

    A rate with which one of them failed is none. Raises InputError where none is left.
    """
    tried: dict[float, list[Result]] = {}
    for result in results:
        if result["task"] == task and result["seed"] < settings.num_search_seeds:
            tried.setdefault(result["lr"], []).append(result)
    failures = {rate: r["failed"] for rate, of_rate in tried.items() for r in of_rate if "failed" in r}
    whole = [rate for rate in tried if rate not in failures]
    if not whole:
        rate, failed = min(failures.items())
        raise InputError(f"{task}: every rate failed, give lower ones by --lrs; {rate:g}: {failed}")
    return max(whole, key=lambda rate: statistics.median(r["validation_score"] for r in tried[rate]))


def _write_results(out: Path, results: list[Result]) -> None:
    replace_file(out / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))


def _read_base(folder: str) -> dict[str, dict[int, Result]]:
    path = Path(folder) / "results.jsonl"
    try:
        return best_scores([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"against: {path} cannot be read; give the folder of a suite that is over, or run that suite again: "
            "nothing in it is done twice"
        ) from error


def _check_out(out: Path) -> None:
    """Raise InputError where a folder holds something else than a suite."""
    if not out.exists() or (out / "suite.json").is_file():
        return
    if not out.is_dir() or any(item.name not in ("lock", ".suite.json.partial") for item in out.iterdir()):
        raise InputError(f"out: {out} exists and holds no suite; choose another --out or remove it")


def _begin_folder(out: Path, settings: SuiteSettings, precision: PrecisionName | None) -> PrecisionName:
    """suite.json says what the runs in a folder are of; what decides a single run may not change.

    Returns the precision of all runs that leave it to be chosen: chosen once, or given.
    """
    path = out / "suite.json"
    single = {name: getattr(settings, name) for name in ("untrained", "suite", "data", "set")}
    weights = model_fingerprint(settings.model)
    if path.is_file():
        written = json.loads(path.read_text(encoding="utf-8"))
        if written.get("weights") != weights:
            raise InputError(
                f"model: {settings.model} has other weights than the model that the runs in {out} are known to be of, "
                f"{written['model']}; choose another --out, or remove this one"
            )
        for name, value in single.items():
            if written.get(name) != value:
                raise InputError(
                    f"{name} is {value!r}, but the runs in {out} are of {written.get(name)!r}; choose another --out, "
                    "or remove this one"
                )
        return written["precision"]
    precision = precision or fastest_precision()
    about = {"model": settings.model, "weights": weights, **single, "precision": precision}
    replace_file(path, json.dumps(about, indent=2) + "\n")
    return precision


def fastest_precision() -> PrecisionName:
    """What auto is on this machine now: it may differ from day to day, so those who compare ask once."""
    from encoderkit.encoder.precision import resolve_precision
    from encoderkit.finetune.inference import best_device

    name = resolve_precision("auto", best_device()).name
    assert name != "fp8"  # nothing is, unasked
    return name


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
