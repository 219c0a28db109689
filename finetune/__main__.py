"""Commands of encoderkit.finetune. Each imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from encoderkit.finetune.settings import BaselineSettings, FillSettings, FinetuneSettings, PredictSettings
from encoderkit.pretrain.command_line import Commands, dispatch, parse_settings, run_command

PROG = "encoderkit-finetune"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return run_command(lambda: dispatch(PROG, COMMANDS, sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    """Fine-tune a model on labelled texts or pairs."""
    settings = parse_settings(
        FinetuneSettings,
        argv,
        prog=f"{PROG} run",
        positional="model",
        description="Fine-tune an encoder to tell labels of texts or pairs of texts apart. The run folder holds "
        "config.yaml, log.jsonl, metrics.json, predictions.jsonl, report.md and the model in final/.",
        examples=[
            f"{PROG} run runs/first/final --task sst2 --out runs/sst2",
            f"{PROG} run runs/first/final --data.train a.csv --data.test b.csv --data.text body --data.label topic",
            f"{PROG} run runs/first/final --data.train pairs.jsonl --data.text premise --data.text_b hypothesis",
            f"{PROG} run runs/first/final --task sst2 --untrained --out runs/sst2-untrained",
        ],
    )
    from encoderkit.finetune.data import load_data
    from encoderkit.finetune.run_folder import check_out
    from encoderkit.finetune.tasks import find_task

    check_out(settings.out)
    data = load_data(settings.data, find_task(settings.task) if settings.task else None)  # bad rows are told at once
    from encoderkit.finetune.loop import finetune
    from encoderkit.finetune.terminal import plain_console

    result = finetune(settings, data)
    measured = "test" if "test" in result.scores else "validation"
    plain_console().print(
        f"{result.metric} {result.score:.4f} on {measured}, epoch {result.best_epoch}; report: {result.out}/report.md"
    )


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
    """Label new texts with a fine-tuned model."""
    settings = parse_settings(
        PredictSettings,
        argv,
        prog=f"{PROG} predict",
        positional="model",
        description="Label new texts with a fine-tuned model.",
        examples=[
            f'{PROG} predict runs/sst2/final --texts "a delight from start to end" "two hours I want back"',
            f"{PROG} predict runs/sst2/final --file reviews.csv --text body --out predictions.jsonl",
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
    "run": ("fine-tune a model on labelled texts or pairs, and measure it", run),
    "baseline": ("TF-IDF with logistic regression on the same rows", baseline),
    "predict": ("label new texts with a fine-tuned model", predict),
    "fill": ("show the likeliest tokens for each [MASK] in a sentence", fill),
}

if __name__ == "__main__":
    sys.exit(main())
