"""Commands of encoderkit.finetune. Each imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from encoderkit.finetune.settings import (
    AblateSettings,
    BaselineSettings,
    FillSettings,
    FinetuneSettings,
    PredictSettings,
    SuiteSettings,
)
from encoderkit.pretrain.command_line import Commands, dispatch, parse_settings, run_command

PROG = "encoderkit-finetune"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return run_command(lambda: dispatch(PROG, COMMANDS, sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    """Fine-tune a model on a task."""
    settings = parse_settings(
        FinetuneSettings,
        argv,
        prog=f"{PROG} run",
        positional="model",
        description="Fine-tune an encoder: classes, several labels or scores of texts and pairs, tags of words, "
        "choices, answers in a context. The run folder holds config.yaml, log.jsonl, metrics.json, predictions.jsonl, "
        "report.md and the model in final/.",
        examples=[
            f"{PROG} run runs/first/final --task sst2 --out runs/sst2",
            f"{PROG} run runs/first/final --data.train a.csv --columns.text body --columns.label topic",
            f"{PROG} run runs/first/final --data.train p.jsonl --kind regression --columns.text a --columns.text_b b",
            f"{PROG} run runs/first/final --task wnut17 --data.train a.jsonl --columns.label tags",
            f"{PROG} run runs/first/final --task squad --data.train train-v1.1.json --data.validation dev-v1.1.json",
            f"{PROG} run runs/first/final --task my-task.yaml --untrained --out runs/mine-untrained",
            "torchrun --nproc_per_node 2 -m encoderkit.finetune run runs/first/final --task sst2 --out runs/sst2",
        ],
    )
    from encoderkit.finetune.data import load_data
    from encoderkit.finetune.run_folder import check_out

    check_out(settings.out, resume=settings.resume)
    data = load_data(settings.resolve())  # bad rows are told at once
    from encoderkit.finetune.loop import finetune
    from encoderkit.finetune.terminal import plain_console

    result = finetune(settings, data)
    measured = "test" if "test" in result.scores else "validation"
    if os.environ.get("RANK", "0") != "0":
        return
    plain_console().print(
        f"{result.metric} {result.score:.4f} on {measured}, epoch {result.best_epoch}; report: {result.out}/report.md"
    )


def suite(argv: list[str]) -> None:
    """Tasks by rates by seeds."""
    settings = parse_settings(
        SuiteSettings,
        argv,
        prog=f"{PROG} suite",
        positional="model",
        description="Fine-tune and measure on every task of a suite, with several learning rates and seeds; rates are "
        "chosen on validation. The folder holds results.jsonl, report.md, scores.png and the runs; a suite that was "
        "stopped goes on.",
        examples=[
            f"{PROG} suite runs/first/final --suite glue --seeds 5 --lrs 3e-5 1e-4 --out runs/glue",
            f"{PROG} suite runs/first/final --suite finetune/suites/local.yaml --data DATA --seeds 3 --out runs/local",
            f"{PROG} suite runs/second/final --suite glue --out runs/second-glue --against runs/glue",
        ],
    )
    from encoderkit.finetune.suite import run_suite

    run_suite(settings)


def ablate(argv: list[str]) -> None:
    """Variants of a recipe by seeds."""
    settings = parse_settings(
        AblateSettings,
        argv,
        prog=f"{PROG} ablate",
        description="Pretrain variants of a recipe on the same budget, with several seeds, and measure each at the "
        "fixed probe and on the tasks of a suite. The folder holds results.jsonl, report.md (means, intervals, a "
        "paired test, the difference that could have been detected, a verdict), ablation.png and the runs; an ablation "
        "that was stopped goes on.",
        examples=[
            f"{PROG} ablate --config ablation.yaml --out runs/ablation",
            f"{PROG} ablate --recipe recipe.yaml --base mlm --variants.nsp.pairs nsp --variants.sop.pairs sop "
            "--set.budget.minutes 5",
            f"{PROG} ablate --config ablation.yaml --job $SLURM_ARRAY_TASK_ID",
        ],
    )
    from encoderkit.finetune.ablate import run_ablation

    run_ablation(settings)


def baseline(argv: list[str]) -> None:
    """TF-IDF with logistic regression on the same rows."""
    settings = parse_settings(
        BaselineSettings,
        argv,
        prog=f"{PROG} baseline",
        description="What a network has to beat: TF-IDF of words and word pairs with logistic regression; its strength "
        "is chosen by cross-validation on the training rows.",
        examples=[f"{PROG} baseline --task sst2", f"{PROG} baseline --data.train train.csv --data.test test.csv"],
    )
    from encoderkit.finetune.baseline import tfidf_baseline

    tfidf_baseline(settings)


def predict(argv: list[str]) -> None:
    """Answers of a fine-tuned model for new rows."""
    settings = parse_settings(
        PredictSettings,
        argv,
        prog=f"{PROG} predict",
        positional="model",
        description="Answers of a fine-tuned model for new rows, whatever it was trained for.",
        examples=[
            f'{PROG} predict runs/sst2/final --texts "a delight from start to end" "two hours I want back"',
            f"{PROG} predict runs/sst2/final --file reviews.csv --columns.text body --out predictions.jsonl",
        ],
    )
    from encoderkit.finetune.predict import predict as predict_texts

    predict_texts(settings)


def fill(argv: list[str]) -> None:
    """Show the likeliest tokens for each [MASK]."""
    settings = parse_settings(
        FillSettings,
        argv,
        prog=f"{PROG} fill",
        positional="model",
        description="Show the likeliest tokens for each [MASK] in a sentence.",
        examples=[f'{PROG} fill runs/first/final --text "the capital of france is [MASK]." --top 5'],
    )
    from encoderkit.finetune.fill import fill as fill_text

    fill_text(settings)


COMMANDS: Commands = {
    "run": ("fine-tune a model on a task, and measure it", run),
    "suite": ("tasks by rates by seeds: a table with spread, and a comparison", suite),
    "ablate": ("variants of a pretraining recipe by seeds: what a change is worth", ablate),
    "baseline": ("TF-IDF with logistic regression on the same rows", baseline),
    "predict": ("answers of a fine-tuned model for new rows", predict),
    "fill": ("show the likeliest tokens for each [MASK] in a sentence", fill),
}

if __name__ == "__main__":
    sys.exit(main())
