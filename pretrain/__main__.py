"""Commands of encoderkit.pretrain. Each imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import Commands, check_place, dispatch, parse_settings, read_settings, run_command

if TYPE_CHECKING:
    from encoderkit.pretrain.settings import PretrainSettings

PROG = "encoderkit-pretrain"
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return run_command(lambda: dispatch(PROG, COMMANDS, sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    """Pretrain, from the start or from the newest checkpoint of --resume RUN_FOLDER."""
    from encoderkit.pretrain.settings import PretrainSettings

    resume, argv = _take_option(argv, "--resume")
    branch, argv = _take_option(argv, "--branch", "RUN_FOLDER[:STEP]")
    changes, argv = _take_option(argv, "--allow_change", "KEY,KEY")
    if changes is not None and resume is None and branch is None:
        raise InputError(
            "--allow_change is given without --resume or --branch; it names settings that may differ from that run's"
        )
    if branch is not None and resume is not None:
        raise InputError(
            "--branch is given with --resume; a branch is a new run, go on with --resume of its own folder"
        )
    if branch is not None and not any(word.split("=")[0] == "--out" for word in argv):
        raise InputError("--branch is given without --out; a branch needs a folder of its own")
    if resume is not None and any(word.split("=")[0] == "--out" for word in argv):
        raise InputError("--out is given with --resume; a resumed run stays in its folder")
    settings = parse_settings(
        PretrainSettings,
        argv if resume is None else [*argv, f"--out={resume}"],
        prog=f"{PROG} run",
        description="Pretrain an encoder. The run folder holds config.yaml, log.jsonl, checkpoints, the final "
        "Hugging Face folder and report.md.",
        examples=[
            f"{PROG} run --config recipe.yaml --data.store stores/mine --out runs/first",
            f"{PROG} run --model.init_from bert-base-uncased --data.store stores/mine --budget.tokens 10_000_000",
            f"{PROG} run --resume runs/first",
            f"{PROG} run --resume runs/first --allow_change budget.steps --budget.steps 200_000",
            f"{PROG} run --branch runs/stable:80000 --budget.steps 100000 --schedule.decay 0.2 --out runs/decayed",
            "torchrun --nproc_per_node 2 -m encoderkit.pretrain run --config recipe.yaml --out runs/two",
            "accelerate launch --config_file pretrain/recipes/accelerate/fsdp2.yaml -m encoderkit.pretrain run ...",
        ],
        base=_begins_with(resume, branch),
        more_options={
            "--resume RUN_FOLDER": "continue a run from its newest whole checkpoint, with its own settings",
            "--branch RUN_FOLDER[:STEP]": "a new run from a checkpoint of another one, the newest or that of STEP; "
            "schedule, budget and masking may differ; progress counts from that run's beginning: to decay over D steps "
            "from step N on, set budget.steps N + D, schedule.name wsd and schedule.decay D / (N + D)",
            "--allow_change KEY,KEY": "with --resume or --branch: settings that may differ from the run's, such as "
            "seed or data.*",
        },
    )
    begun = Path(settings.out) / "config.yaml"
    if resume is None and _was_restarted() and begun.is_file():
        settings = _as_begun(settings, begun)
        resume = settings.out
    allowed = changes.split(",") if changes else []
    if branch is not None:
        from encoderkit.pretrain.branch import CHANGES, begin_branch

        allowed += CHANGES
        if resume is None:
            begin_branch(branch, settings, allowed)
            resume = settings.out
    if resume is None:  # told before torch is imported, which takes seconds
        from encoderkit.encoder.containment import check_source
        from encoderkit.pretrain.run_folder import check_new
        from encoderkit.pretrain.store import Store

        check_new(Path(settings.out))
        if not settings.data.store:
            raise InputError("data.store is missing; set it with --data.store or in the config file")
        Store.open(settings.data.store)
        if settings.model.init_from is not None:
            check_source(settings.model.init_from)
    from encoderkit.pretrain.loop import pretrain

    pretrain(settings, resume=resume is not None, allow_change=allowed)


def _begins_with(resume: str | None, branch: str | None) -> Path | None:
    """The config.yaml that a run's settings begin with."""
    if resume is not None:
        return _config_of(Path(resume), "--resume")
    if branch is None:
        return None
    from encoderkit.pretrain.branch import named_run

    return _config_of(named_run(branch)[0], "--branch")


def _was_restarted() -> bool:
    """Whether torchrun --max-restarts started this process again, after one of the run was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _as_begun(settings: PretrainSettings, config: Path) -> PretrainSettings:
    """The settings with what the run chose since they were given. Those of another run stay, and are refused later."""
    from encoderkit.pretrain.settings import PretrainSettings

    if settings.precision != "auto":
        return settings
    return replace(settings, precision=read_settings(PretrainSettings, config).precision)


def _tokenizer(argv: list[str]) -> None:
    from encoderkit.pretrain.data_settings import TokenizerSettings

    examples = [f"{PROG} tokenizer python-docs --vocab-size 8192 --out tokenizers/docs"]
    settings = _parse(TokenizerSettings, argv, "tokenizer", "sources", examples)
    from encoderkit.pretrain.tokenizer import run_tokenizer

    run_tokenizer(settings)


def _prepare(argv: list[str]) -> None:
    from encoderkit.pretrain.data_settings import PrepareSettings

    examples = [
        f"{PROG} prepare python-docs --tokenizer tokenizers/docs --out stores/docs",
        f"{PROG} prepare 'texts/*.jsonl.gz' --tokenizer bert-base-uncased --held_out 0.02 --out stores/mine",
        f"{PROG} prepare wiki.parquet@2 web.jsonl.zst@0.5 --tokenizer t --held_out_by site --out stores/mix",
        f"{PROG} prepare s3://bucket/text/ --tokenizer t --shard 1/4 --out parts/1",
    ]
    settings = _parse(PrepareSettings, argv, "prepare", "sources", examples)
    from encoderkit.pretrain.prepare import run_prepare

    run_prepare(settings)


def _merge(argv: list[str]) -> None:
    from encoderkit.pretrain.data_settings import MergeSettings

    examples = [f"{PROG} merge parts/1 parts/2 --out stores/mine  # made with prepare --shard 1/2 and 2/2"]
    settings = _parse(MergeSettings, argv, "merge", "folders", examples)
    from encoderkit.pretrain.merge import run_merge

    run_merge(settings)


def _contamination(argv: list[str]) -> None:
    from encoderkit.pretrain.data_settings import ContaminationSettings

    examples = [f"{PROG} contamination 'texts/*.jsonl.gz' --against '[glue/rte/dev.jsonl, squad.csv]' --out found.json"]
    settings = _parse(ContaminationSettings, argv, "contamination", "sources", examples)
    from encoderkit.pretrain.contamination import run_contamination

    run_contamination(settings)


def _eval(argv: list[str]) -> None:
    from encoderkit.encoder.containment import check_source
    from encoderkit.pretrain.data_settings import EvalSettings

    settings = _parse(EvalSettings, argv, "eval", "model", [f"{PROG} eval runs/first/final --store stores/docs"])
    check_source(settings.model)
    from encoderkit.pretrain.probe import run_eval

    run_eval(settings)


def _export(argv: list[str]) -> None:
    from encoderkit.pretrain.data_settings import ExportSettings

    examples = [
        f"{PROG} export runs/first --checkpoint average-3 --out models/first",
        f"{PROG} export runs/first --checkpoint best --out models/first --push_to_hub me/first",
    ]
    settings = _parse(ExportSettings, argv, "export", "run", examples)
    from encoderkit.pretrain.export import run_export

    run_export(settings)


def _doctor(argv: list[str]) -> None:
    from encoderkit.pretrain.settings import DoctorSettings

    run, argv = _take_option(argv, "--run")
    out, argv = _take_option(argv, "--out")
    has_recipe = any(word.split("=")[0] == "--config" for word in argv)
    settings = parse_settings(
        DoctorSettings,
        argv,
        prog=f"{PROG} doctor",
        description=f"{COMMANDS['doctor'][0]} Trains a few steps in memory; exit status 0 with and without warnings.",
        examples=[
            f"{PROG} doctor --config recipe.yaml --data.store stores/mine --price_per_hour 2.5",
            f"{PROG} doctor --run runs/first --out reports/first",
        ],
        base=None if run is None or has_recipe else _config_of(Path(run), "--run"),
        writes_out=False,
        more_options={
            "--run RUN_FOLDER": "look at the log of a run too; without --config, at its settings",
            "--out FOLDER": "write report.md and lengths.png into this new folder",
        },
    )
    if out is not None:
        check_place(out)
    from encoderkit.pretrain.doctor import run_doctor

    run_doctor(settings, run=run, out=out)


def _scaling(argv: list[str]) -> None:
    from encoderkit.pretrain.scaling_settings import ScalingSettings

    settings = parse_settings(
        ScalingSettings,
        argv,
        prog=f"{PROG} scaling",
        description=f"{COMMANDS['scaling'][0]} Arithmetic on given and assumed figures: pretrain/recipes/scaling.md.",
        examples=[
            f"{PROG} scaling --model.preset bert --model.size large --tokens_per_second 60000 --gpus 8 64 512",
            f"{PROG} scaling --parallel fsdp2 --network.between 40 --price_per_gpu_hour 2.5",
        ],
    )
    from encoderkit.pretrain.scaling import run_scaling

    run_scaling(settings)


def _parse(settings: type[T], argv: list[str], command: str, positional: str, examples: list[str]) -> T:
    about = COMMANDS[command][0]
    return parse_settings(
        settings, argv, prog=f"{PROG} {command}", description=about, examples=examples, positional=positional
    )


def _config_of(folder: Path, option: str) -> Path:
    config = folder / "config.yaml"
    if not config.is_file():
        raise InputError(f"{option} {folder} holds no config.yaml; expected a run folder")
    return config


def _take_option(argv: list[str], option: str, value: str = "FOLDER") -> tuple[str | None, list[str]]:
    """The value of an option that is not a setting, and argv without it."""
    for i, word in enumerate(argv):
        if word.startswith(f"{option}="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
        if word == option:
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise InputError(f"{option} has no value; write {option} {value}")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


COMMANDS: Commands = {
    "tokenizer": ("Train a tokenizer on text.", _tokenizer),
    "prepare": ("Tokenize text once into a store.", _prepare),
    "merge": ("Put the shares of several machines together to one store.", _merge),
    "contamination": ("Find evaluation texts in a corpus.", _contamination),
    "run": ("Pretrain an encoder on a store.", _run),
    "eval": ("Score a masked language model at the fixed probe of held-out text.", _eval),
    "doctor": ("Look at recipe, data and machine before a run, or at its log, and warn.", _doctor),
    "scaling": ("Compute what a job costs on many GPUs in time and communication.", _scaling),
    "export": ("Write a run's checkpoint as a model folder, and send it to the hub.", _export),
}

if __name__ == "__main__":
    sys.exit(main())
