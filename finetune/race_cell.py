"""One side of the race with one seed, trained for its minutes and then measured: a folder of final/ and result.json."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from encoderkit.encoder.checkpoint import load
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.precision import Precision
from encoderkit.encoder.pseudo_likelihood import packed_logits
from encoderkit.finetune import race_opponents
from encoderkit.finetune.inference import best_device
from encoderkit.finetune.minimal_pairs import results
from encoderkit.finetune.race_settings import MOST_UNLIKE, Opponent, Side
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.checkpoint import whole_checkpoints
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.minimal_pairs import MinimalPairs, read_pairs, sample_pairs
from encoderkit.pretrain.probe import HeldOut, evaluate_probe_hf, probe_sequences
from encoderkit.pretrain.report import Run
from encoderkit.pretrain.run_folder import describe_start, hardware, replace_file
from encoderkit.pretrain.settings import Budget, Checkpoints, PretrainSettings
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer

Result = dict[str, Any]  # what result.json holds
NEVER = 1 << 40  # steps


def run_cell(
    side: Side,
    seed: int,
    folder: Path,
    *,
    store: Store,
    minutes: float,
    precision: Precision,
    points: int,
    about: Result,
) -> Result:
    """Train and measure, and write folder/result.json; what a stopped cell left is removed: its clock is gone.

    points: of the curve. about: what else the result tells. Raises FloatingPointError where the training diverged.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    how = (seed, folder, store, minutes, precision, points)
    found = _train_theirs(side, *how) if isinstance(side, Opponent) else _train_ours(side, *how)
    found["tokens_per_second"] = round(found["tokens"] / max(found["seconds"], 1e-9), 1)
    told = {**about, "seed": seed, "minutes": minutes, **found, "start": describe_start()}
    replace_file(folder / "result.json", json.dumps(told, indent=1) + "\n")
    return told


def machine() -> Result:
    """What decides how much is learned in a minute here."""
    return {name: value for name, value in hardware().items() if name in ("cpu", "threads", "gpus")}


def read_result(folder: Path) -> Result | None:
    """What a finished cell found."""
    file = folder / "result.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None


def check_alike(sides: dict[str, Side], tokens: TokenIds) -> None:
    """Raise InputError unless all sides have about as many parameters."""
    counts = {}
    with torch.device("meta"):
        for name, side in sides.items():
            if isinstance(side, Opponent):
                counts[name] = _size(race_opponents.build_model(side, tokens, seed=0))
            else:
                config = side.model.encoder_config(vocab_size=tokens.vocab_size, pad_token_id=tokens.pad)
                counts[name] = MaskedLM(config).num_parameters()
    if max(counts.values()) > (1 + MOST_UNLIKE) * min(counts.values()):
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise InputError(f"the sides have parameters {told}; expected within {MOST_UNLIKE:.0%}, change their sizes")


def score_pairs(model: Path, file: str, count: int | None) -> float:
    """Mean accuracy over the paradigms of minimal pairs; every side's model is opened and scored by the same code."""
    pairs = read_pairs([file])
    pairs = pairs if count is None else sample_pairs(pairs, count)
    opened = load(model).to(best_device()).eval()
    scores = MinimalPairs.of(pairs, load_tokenizer(model), opened.config.max_positions).score(packed_logits(opened))
    return float(results(str(model), pairs, scores)["original"])


def _train_ours(
    side: PretrainSettings, seed: int, folder: Path, store: Store, minutes: float, precision: Precision, points: int
) -> Result:
    """encoderkit's recipe; its curve is measured afterwards, on the checkpoints."""
    run, saving = folder / "run", side.checkpoints
    keep = max(points + 2, saving.average)
    recipe = replace(
        side,
        out=str(run),
        seed=seed,
        data=replace(side.data, store=str(store.folder)),
        budget=Budget(minutes=minutes),
        precision=precision.name,
        checkpoints=Checkpoints(every_minutes=max(minutes / points, 0.01), keep=keep, average=saving.average),
        log=replace(side.log, validate_every_steps=NEVER),
    )
    final = pretrain(recipe)
    tokenizer, device = load_tokenizer(store.tokenizer_folder), best_device()
    held_out = HeldOut.of(store.held_out_texts(), tokenizer, "none", language="none", batch_tokens=4096)
    curve = []
    for checkpoint in reversed(whole_checkpoints(run / "checkpoints")[1:]):
        model = MaskedLM(EncoderConfig.from_dict(checkpoint.state["model"]))
        model.load_state_dict(checkpoint.tensors("model"), strict=True)
        curve.append([checkpoint.state["run"]["seconds"], held_out.score(model.to(device), device).probe.loss])
    told = Run.read(run)
    assert told.end is not None
    seconds = told.end["time"]["elapsed"]
    curve.append([seconds, told.end["loss"]])
    shutil.rmtree(run / "checkpoints")
    final.rename(folder / "final")
    return {
        "loss": told.end["loss"],
        "accuracy": told.end["accuracy"],
        "parameters": told.facts["parameters"],
        "steps": told.end["step"],
        "tokens": told.end["tokens"],
        "seconds": seconds,
        "curve": curve,
    }


def _train_theirs(
    side: Opponent, seed: int, folder: Path, store: Store, minutes: float, precision: Precision, points: int
) -> Result:
    """The loop of transformers."""
    tokenizer = load_tokenizer(store.tokenizer_folder)
    sequences = probe_sequences(store.held_out_texts(), tokenizer, seed=0)
    model = race_opponents.build_model(side, TokenIds.of(tokenizer), seed).to(best_device())
    trained = race_opponents.train(
        side,
        store,
        model,
        precision=precision,
        minutes=minutes,
        seed=seed,
        points=points,
        measure=partial(evaluate_probe_hf, sequences=sequences, pad_token_id=tokenizer.pad_token_id),
    )
    race_opponents.save(model, store, folder / "final")
    return {
        "loss": trained.final.loss,
        "accuracy": trained.final.accuracy,
        "parameters": _size(model),
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "curve": trained.curve,
    }


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
