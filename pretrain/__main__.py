"""Commands of encoderkit.pretrain. Each imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import parse_settings, run_command, unknown_key

PROG = "encoderkit-pretrain"
COMMANDS = {
    "tokenizer": "train a tokenizer on text",
    "prepare": "tokenize text once into a store",
    "run": "pretrain an encoder on a store",
    "eval": "score a model at the fixed probe of held-out text",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _dispatch(arguments))


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROG} COMMAND [--help] ...\n\ncommands:")
        print("\n".join(f"  {name:<12}{about}" for name, about in COMMANDS.items()))
        print(f"\n{PROG} COMMAND --help lists the settings of a command. The same as python -m encoderkit.pretrain.")
    elif argv[0] == "--version":
        print(f"encoderkit {metadata.version('encoderkit')}")
    elif argv[0] == "run":
        run(argv[1:])
    elif argv[0] in COMMANDS:
        _data_command(argv[0], argv[1:])
    else:
        unknown_key(argv[0], COMMANDS, kind="command")


def run(argv: list[str]) -> None:
    """Pretrain, from the start or from the newest checkpoint of --resume RUN_FOLDER."""
    from encoderkit.pretrain.settings import PretrainSettings

    resume, argv = _take_option(argv, "--resume")
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
            f"{PROG} run --resume runs/first",
            "torchrun --nproc_per_node 2 -m encoderkit.pretrain run --config recipe.yaml --out runs/two",
        ],
        base=None if resume is None else _config_of(Path(resume)),
        more_options={"--resume RUN_FOLDER": "continue a run from its newest whole checkpoint, with its own settings"},
    )
    from encoderkit.pretrain.loop import pretrain

    pretrain(settings, resume=resume is not None)


def _data_command(name: str, argv: list[str]) -> None:
    from encoderkit.pretrain import data_settings

    run_name, settings_name = f"run_{name}", f"{name.capitalize()}Settings"
    getattr(data_settings, run_name)(parse_settings(getattr(data_settings, settings_name), argv, prog=f"{PROG} {name}"))


def _config_of(folder: Path) -> Path:
    config = folder / "config.yaml"
    if not config.is_file():
        raise InputError(f"--resume {folder} holds no config.yaml; expected a run folder")
    return config


def _take_option(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option that is not a setting, and argv without it."""
    for i, word in enumerate(argv):
        if word.startswith(f"{option}="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
        if word == option:
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise InputError(f"{option} has no value; write {option} RUN_FOLDER")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


if __name__ == "__main__":
    sys.exit(main())
