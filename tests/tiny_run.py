"""Runs of a second or two that tests interrupt: a store of made-up English, settings, processes, comparison."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.settings import Budget, Checkpoints, Data, Log, Masking, Model, PretrainSettings

TEXT = "the a red blue old young cat dog bird fox sees likes follows hears and but hello world in on tree house"
WORDS = TEXT.split()
TEXTS = [f"document {i} says something of its own about number {i * i}" for i in range(40)]
MODEL = Model(preset="modern", hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_positions=128)


def make_store(folder: Path) -> Path:
    """A store of 120 short documents in folder."""
    from encoderkit.pretrain.prepare import prepare
    from encoderkit.pretrain.tokenizer import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(3, 90))) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(texts))
    train_tokenizer("wordpiece", texts, 60, lowercase=True, out=folder / "tokenizer")
    prepare([str(folder / "text.txt")], tokenizer=folder / "tokenizer", out=folder / "store", held_out=0.1)
    return folder / "store"


def make_settings(store: Path, out: Path, **changes) -> PretrainSettings:
    """20 steps of eight rows in two micro-batches, a checkpoint every 6."""
    defaults = {
        "data": Data(store=str(store), max_tokens=32, row_tokens=64, workers=0),
        "model": MODEL,
        "masking": Masking(rate=0.3, final_rate=0.15),
        "budget": Budget(steps=20),
        "batch_tokens": 512,
        "micro_batch_tokens": 256,
        "precision": "fp32",
        "checkpoints": Checkpoints(every_steps=6, every_minutes=None),
        "log": Log(every_steps=4),
    }
    return PretrainSettings(out=str(out), **{**defaults, **changes})


class Stop(Exception):
    """What a run in stop_before ends with."""


@contextlib.contextmanager
def stop_before(step: int) -> Iterator[None]:
    """The run in here fails before this step, which it must reach."""
    import pytest

    from encoderkit.pretrain import loop

    train_step = loop.train_step

    def failing(job, batches):
        if job.state.step == step:
            raise Stop
        return train_step(job, batches)

    with mock.patch.object(loop, "train_step", failing), pytest.raises(Stop):
        yield


def write_recipe(settings: PretrainSettings, file: Path) -> Path:
    """The settings as YAML."""
    file.write_text(dump_yaml(settings))
    return file


def torchrun(*arguments: object, restarts: int = 0) -> list[str]:
    """The command that starts two processes of these arguments."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max_restarts={restarts}"]
    return [sys.executable, "-m", *launcher, *map(str, arguments)]


def read_log(out: Path) -> list[dict]:
    """log.jsonl without what may differ between two equal runs."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs that should be equal: final weights, last checkpoint's tensors, log."""
    from encoderkit.pretrain.checkpoint import latest_checkpoint

    found = []
    if (a / "final" / "model.safetensors").read_bytes() != (b / "final" / "model.safetensors").read_bytes():
        found.append("weights")
    first, second = (latest_checkpoint(run / "checkpoints") for run in (a, b))
    if first is None or second is None or first.step != second.step:
        found.append("last checkpoint")
    else:
        found += [
            file.name
            for file in sorted(first.path.glob("*.safetensors"))
            if file.read_bytes() != (second.path / file.name).read_bytes()
        ]
    if read_log(a) != read_log(b):
        found.append("log")
    return found
