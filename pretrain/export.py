"""A run's checkpoint as a model folder for transformers, with its card, and onto the hub where that is wanted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from encoderkit.encoder.checkpoint import save
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import MaskedLM, choose_attention
from encoderkit.kernels.errors import InputError, first_line
from encoderkit.pretrain.averaging import mean_weights, newest_due
from encoderkit.pretrain.checkpoint import Checkpoint, whole_checkpoints
from encoderkit.pretrain.data_settings import ExportSettings
from encoderkit.pretrain.probe import HeldOut, HeldOutScore
from encoderkit.pretrain.report import Run, write_model_card
from encoderkit.pretrain.run_folder import whole_folder
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.terminal import plain_console
from encoderkit.pretrain.tokenizer import load_tokenizer


def run_export(settings: ExportSettings) -> None:
    """Write settings.out, whole or not at all, and send it to the hub: the command encoderkit-pretrain export.

    Raises InputError where the run has no such checkpoint, out is in use, or the hub cannot be reached.
    """
    console = plain_console()
    out = Path(settings.out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"out {out} is in use; give --out a new or empty folder")
    run = Run.read(Path(settings.run))
    probe = _Probe.open(run, needed=settings.checkpoint == "best")
    model, source, what = _chosen(settings, run, probe)
    score = probe.score(model)
    record = {"step": source.step, "tokens": source.state["run"]["tokens"], **(score.record() if score else {})}
    with whole_folder(out) as partial:
        save(model, partial, probe.tokenizer, format=settings.format)
        write_model_card(replace(run, end=record, validation=[]), partial, f"Exported from {what}.")
    console.print(f"{out}: {what}; {score.told() if score else f'not scored: {probe.reason}'}")
    if settings.push_to_hub:
        console.print(f"sent to {push(out, settings.push_to_hub, settings.private)}")


def push(folder: Path, name: str, private: bool) -> str:
    """Send a model folder to the hub repository of this name; returns its address. Raises InputError where it fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # no network, no token, no right to write
        raise InputError(
            f"push_to_hub {name}: {first_line(error)}; {folder} is written, log in and send it again"
        ) from error
    return str(address)


class _Probe:
    """The tokenizer of a run, and what its store holds out where that is still there."""

    def __init__(self, tokenizer: Any, held_out: HeldOut | None, reason: str) -> None:
        self.tokenizer, self.held_out, self.reason = tokenizer, held_out, reason

    @classmethod
    def open(cls, run: Run, needed: bool) -> _Probe:
        try:
            store = Store.open(run.settings["data"]["store"])
            if store.hash != run.facts["data"]["hash"]:
                raise InputError(f"{store.folder} was made anew since the run")
        except InputError as error:
            if needed or not (run.path / "final").is_dir():
                raise
            return cls(load_tokenizer(run.path / "final"), None, str(error))
        tokenizer, pairs = load_tokenizer(store.tokenizer_folder), run.settings.get("pairs", "none")
        texts, language = store.held_out_texts(), store.manifest["sentences"]
        return cls(tokenizer, HeldOut.of(texts, tokenizer, pairs, language=language, batch_tokens=8192), "")

    def score(self, model: MaskedLM) -> HeldOutScore | None:
        if self.held_out is None:
            return None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device).encoder.use_attention(
            choose_attention(model.config, "auto", device=device, dtype=torch.float32)
        )
        return self.held_out.score(model, device)


def _chosen(settings: ExportSettings, run: Run, probe: _Probe) -> tuple[MaskedLM, Checkpoint, str]:
    """The model that settings.checkpoint names, the newest checkpoint in it, and what it is in words."""
    name, found = run.path.resolve().name, whole_checkpoints(run.path / "checkpoints")
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    if not found:
        raise InputError(f"{run.path / 'checkpoints'} holds no whole checkpoint; nothing to export")
    if settings.checkpoint == "last":
        return _model(found[:1]), found[0], f"step {found[0].step} of {name}, the last"
    if settings.checkpoint == "best":
        scored = [(probe.score(_model([checkpoint])), checkpoint) for checkpoint in found]
        best = min(scored, key=lambda pair: pair[0].probe.loss if pair[0] else float("inf"))[1]
        return _model([best]), best, f"step {best.step} of {name}, the best of the steps {steps}"
    average = re.fullmatch(r"average-(\d+)", settings.checkpoint)
    if average:
        count = int(average[1])
        newest = newest_due(run.path / "checkpoints", count)
        if not 1 <= count <= len(newest):
            raise InputError(
                f"checkpoint is average-{count}; the run has {len(newest)} whole checkpoints that were due (of the "
                f"steps {steps}), checkpoints.keep says how many stay"
            )
        means = ", ".join(str(checkpoint.step) for checkpoint in newest)
        return _model(newest), newest[0], f"the average of the steps {means} of {name}"
    for checkpoint in found:
        if str(checkpoint.step) == settings.checkpoint:
            return _model([checkpoint]), checkpoint, f"step {checkpoint.step} of {name}"
    raise InputError(f"checkpoint is {settings.checkpoint}; the run has whole checkpoints of the steps {steps}")


def _model(checkpoints: list[Checkpoint]) -> MaskedLM:
    """The mean of these checkpoints."""
    model = MaskedLM(EncoderConfig.from_dict(checkpoints[0].state["model"]))
    model.load_state_dict(mean_weights(checkpoints), strict=True)
    return model.eval()
