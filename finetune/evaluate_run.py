"""A pretraining run measured on minimal pairs and on tasks, and its report written again with these scores.

RUN/evaluations/ holds what was found: minimal-pairs/ and tasks/ in full, scores.json for the report.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.comparison import summarize
from encoderkit.finetune.run_folder import held
from encoderkit.finetune.settings import EvaluateSettings, MinimalPairsSettings, SuiteSettings
from encoderkit.finetune.suite_file import read_suite
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.minimal_pairs import fingerprint, read_pairs
from encoderkit.pretrain.report import write_report
from encoderkit.pretrain.run_folder import clear_folder, model_fingerprint, replace_file
from encoderkit.pretrain.terminal import plain_console


def evaluate_run(settings: EvaluateSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Measure what is missing; write RUN/evaluations and RUN/report.md; returns what scores.json holds.

    Raises InputError where the run has no finished model, or pairs or suite cannot be used.
    """
    console = console or plain_console()
    run = Path(settings.run)
    if not (run / "final").is_dir():
        raise InputError(f"{run} holds no final/; expected a pretraining run that has ended")
    # Both are read before anything is measured.
    pairs = None if settings.minimal_pairs is None else fingerprint(read_pairs([settings.minimal_pairs]))
    suite = None if settings.suite is None else _suite_of(settings, settings.suite)
    if suite is not None:
        read_suite(suite)
    folder = run / "evaluations"
    file = folder / "scores.json"
    with held(folder):
        weights = model_fingerprint(str(run / "final"))
        scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if scores and scores.get("weights") != weights:
            console.print(f"the scores in {folder} are not known to be of this model; everything is measured again")
            clear_folder(folder)
            scores = {}
        scores["weights"] = weights
        replace_file(file, json.dumps(scores, indent=1) + "\n")
        if settings.minimal_pairs is not None:
            scores["minimal_pairs"] = _minimal_pairs(settings.minimal_pairs, pairs, run, console)
        if suite is not None:
            scores["tasks"] = _tasks(suite, console)
        replace_file(file, json.dumps(scores, indent=1) + "\n")
        write_report(run)
    console.print(f"report: {run / 'report.md'}", soft_wrap=True)
    return scores


def _minimal_pairs(file: str, pairs: str | None, run: Path, console: Console) -> dict[str, Any]:
    """What is measured, or was; pairs: the fingerprint of the file's."""
    from encoderkit.finetune.minimal_pairs import score_minimal_pairs

    out = run / "evaluations" / "minimal-pairs"
    done, fresh = out / "results.json", out.with_name(f".{out.name}.partial")
    asked = MinimalPairsSettings(model=str(run / "final"), data=[file], out=str(fresh))
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if found.get("fingerprint") != pairs:
        shutil.rmtree(fresh, ignore_errors=True)
        found = score_minimal_pairs(asked, console=console)
        shutil.rmtree(out, ignore_errors=True)  # of other pairs
        fresh.rename(out)
    kept = ("pairs", "paradigms", "original", "within_word")
    fields = [{name: line[name] for name in ("field", *kept)} for line in found["by_field"]]
    return {"file": Path(file).name, **{name: found[name] for name in kept}, "by_field": fields}


def _suite_of(settings: EvaluateSettings, suite: str) -> SuiteSettings:
    run = Path(settings.run)
    return SuiteSettings(
        model=str(run / "final"),
        suite=suite,
        data=settings.data,
        tasks=settings.tasks,
        lrs=settings.lrs,
        seeds=settings.seeds,
        out=str(run / "evaluations" / "tasks"),
    )


def _tasks(suite: SuiteSettings, console: Console) -> list[dict[str, Any]]:
    from encoderkit.finetune.suite import best_scores, run_suite

    rows = []
    for task, by_seed in best_scores(run_suite(suite, console=console)).items():
        found, first = summarize([result["score"] for result in by_seed.values()]), by_seed[0]
        about = {"task": task, "metric": first["metric"], "on": first["measured_on"], "lr": first["lr"]}
        rows.append({**about, "seeds": found.n, "mean": found.mean, "sd": found.sd if found.n > 1 else None})
    return rows
