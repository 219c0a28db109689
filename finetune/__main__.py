"""Commands of encoderkit.finetune. Each imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from encoderkit.encoder.containment import check_source
from encoderkit.finetune.settings import (
    AblateSettings,
    BaselineSettings,
    EmbedSettings,
    EvaluateSettings,
    FillSettings,
    FinetuneSettings,
    MinimalPairsSettings,
    PredictSettings,
    SentenceSettings,
    SuiteSettings,
)
from encoderkit.kernels.errors import InputError
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

    check_source(settings.model)
    check_out(settings.out, resume=settings.resume)
    data = load_data(settings.resolve())  # bad rows are told at once
    from encoderkit.finetune.loop import finetune
    from encoderkit.pretrain.terminal import plain_console

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
        beside=("recipe", "suite", "data"),
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
    check_source(settings.model)
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
    check_source(settings.model)
    from encoderkit.finetune.fill import fill as fill_text

    fill_text(settings)


def minimal_pairs(argv: list[str]) -> None:
    """Score minimal pairs without training."""
    settings = parse_settings(
        MinimalPairsSettings,
        argv,
        prog=f"{PROG} minimal-pairs",
        positional="model",
        description="Which of two sentences does a masked language model find more likely? BLiMP-shaped files, by "
        "pseudo-log-likelihood (Salazar et al. 2020), and with the rest of a word masked too (Kauf and Ivanova 2023).",
        examples=[
            f"{PROG} minimal-pairs runs/first/final --data blimp/*.jsonl --out runs/first/blimp",
            f"{PROG} minimal-pairs runs/first/final --data blimp/*.jsonl --check 100",
        ],
    )
    check_source(settings.model)
    from encoderkit.finetune.minimal_pairs import score_minimal_pairs
    from encoderkit.pretrain.terminal import plain_console

    score_minimal_pairs(settings)
    if settings.out and settings.check is None:
        plain_console().print(f"every figure: {settings.out}/results.json, every pair: {settings.out}/pairs.jsonl")


def evaluate(argv: list[str]) -> None:
    """Measure a pretraining run for its report."""
    settings = parse_settings(
        EvaluateSettings,
        argv,
        prog=f"{PROG} evaluate",
        positional="run",
        description="Measure the model of a pretraining run on minimal pairs and on the tasks of a suite, and write "
        "its report.md again with these scores. RUN/evaluations holds every figure; what is done is not done again.",
        examples=[
            f"{PROG} evaluate runs/first --minimal_pairs blimp/all.jsonl.gz",
            f"{PROG} evaluate runs/first --suite finetune/suites/local.yaml --data DATA --seeds 3",
        ],
    )
    from encoderkit.finetune.evaluate_run import evaluate_run

    evaluate_run(settings)


def sentence(argv: list[str]) -> None:
    """Train an encoder for vectors of sentences."""
    settings = parse_settings(
        SentenceSettings,
        argv,
        prog=f"{PROG} sentence",
        positional="model",
        description="Train an encoder for vectors of sentences, by sentence-transformers: from pairs that belong "
        "together, or from pairs with scores. The run folder holds metrics.json and final/, which opens as a "
        "SentenceTransformer and with embed.",
        examples=[
            f"{PROG} sentence runs/first/final --data.train pairs.jsonl --columns.text a --columns.text_b b "
            "--columns.label score --out runs/sts",
            f"{PROG} sentence runs/first/final --data.train questions.csv --columns.text question "
            "--columns.text_b answer --out runs/answers",
        ],
    )
    check_source(settings.model)
    from encoderkit.finetune.sentence import train_sentences

    train_sentences(settings)


def embed(argv: list[str]) -> None:
    """Turn texts into vectors, or measure search with them."""
    settings = parse_settings(
        EmbedSettings,
        argv,
        prog=f"{PROG} embed",
        positional="model",
        description="Write a vector for each text of a file, or measure exact nearest-neighbour search on documents, "
        "queries and judgements: nDCG@10, mean average precision, recall.",
        examples=[
            f"{PROG} embed runs/first/final --file texts.jsonl --out vectors.parquet",
            f"{PROG} embed runs/first/final --corpus corpus.jsonl --queries queries.jsonl --qrels qrels.tsv",
        ],
    )
    check_source(settings.model)
    if settings.out is not None and Path(settings.out).exists():
        raise InputError(f"out: {settings.out} exists; choose another --out or remove it")
    from encoderkit.finetune.embed import embed as embed_texts

    embed_texts(settings)


COMMANDS: Commands = {
    "run": ("fine-tune a model on a task, and measure it", run),
    "suite": ("tasks by rates by seeds: a table with spread, and a comparison", suite),
    "ablate": ("variants of a pretraining recipe by seeds: what a change is worth", ablate),
    "baseline": ("TF-IDF with logistic regression on the same rows", baseline),
    "predict": ("answers of a fine-tuned model for new rows", predict),
    "fill": ("show the likeliest tokens for each [MASK] in a sentence", fill),
    "minimal-pairs": ("score minimal pairs of sentences, such as BLiMP, without training", minimal_pairs),
    "evaluate": ("measure a pretraining run on minimal pairs and tasks, for its report", evaluate),
    "sentence": ("train an encoder for vectors of sentences, from pairs", sentence),
    "embed": ("turn texts into vectors, or measure search with them", embed),
}

if __name__ == "__main__":
    sys.exit(main())
