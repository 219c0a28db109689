"""Settings of the race: who runs, how long, and the loop of transformers beside encoderkit. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import encoderkit.pretrain
from encoderkit.encoder.config import EncoderConfig, preset
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.settings import PretrainSettings, Schedule, check_range

RECIPES = Path(encoderkit.pretrain.__file__).parent / "recipes" / "race"
OURS = "encoderkit"
OPPONENTS = ("bert", "modernbert")
SIDES = (OURS, *OPPONENTS)
MOST_UNLIKE = 0.05  # share by which the parameters of two sides may differ


@dataclass(frozen=True, kw_only=True)
class Opponent:
    """A masked language model of transformers, trained by a plain loop: its own collator, AdamW, autocast."""

    architecture: Literal["bert", "modern"]  # BertForMaskedLM or ModernBertForMaskedLM
    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    intermediate_size: int = 576  # BERT's 1,024 would be more parameters than the others have
    dropout: float = 0.0  # probability, of hidden states and attention
    window_tokens: int | None = None  # seen to each side by a local layer, which ModernBERT has; None: 64
    sparse_prediction: bool = False  # ModernBERT's own option: logits at masked tokens only
    # pieces: documents cut, [CLS] and [SEP] around each piece; chunks: joined and cut, as run_mlm's group_texts
    layout: Literal["pieces", "chunks"] = "pieces"
    max_tokens: int = 128  # longest sequence
    batch_size: int = 32  # sequences a step
    workers: int = 0  # processes that collate
    mlm_probability: float = 0.15  # share of the tokens that are predicted
    mask_replace_prob: float = 0.8  # of these, replaced by [MASK]
    random_replace_prob: float = 0.1  # and by a random token
    lr: float = 1e-3  # peak
    schedule: Schedule = field(default_factory=Schedule)  # by wall-clock time, as ours
    weight_decay: float = 0.01  # not on norms and biases
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip: float = 1.0  # largest gradient norm

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1)
        check_range("max_tokens", self.max_tokens, 8)
        check_range("workers", self.workers, 0)
        check_range("dropout", self.dropout, 0, 0.9)
        check_range("lr", self.lr, 0, 10)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("clip", self.clip, 0)
        for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob"):
            check_range(name, getattr(self, name), 0, 1)
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise InputError("mask_replace_prob + random_replace_prob is over 1; expected at most 1")
        for name in ("sparse_prediction", "window_tokens"):
            if getattr(self, name) and self.architecture != "modern":
                raise InputError(f"{name} is {getattr(self, name)}, which only architecture modern has")
        self.encoder_config(vocab_size=64, pad_token_id=0)

    def encoder_config(self, *, vocab_size: int, pad_token_id: int) -> EncoderConfig:
        """The network as encoderkit describes it."""
        return preset(
            self.architecture,
            "tiny",
            vocab_size=vocab_size,
            pad_token_id=pad_token_id,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_positions=max(self.max_tokens, 128),  # the fixed probe's
            hidden_dropout=self.dropout,
            attention_dropout=self.dropout,
            **({} if self.window_tokens is None else {"window_tokens": self.window_tokens}),
        )


Side = Opponent | PretrainSettings


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """Equal minutes for each side, one after another on this machine."""

    store: str  # folder made by encoderkit-pretrain prepare
    out: str = "runs/race"  # folder of the race; what is done in it is not done again
    minutes: float = 10.0  # of training, for each side and seed; the probe is measured outside of them
    seeds: int = 3  # 0, 1, ...
    sides: list[str] = field(default_factory=lambda: list(SIDES))
    recipes: str | None = None  # folder of SIDE.yaml; None: pretrain/recipes/race
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of all sides
    points: int = 10  # of each curve
    minimal_pairs: str | None = None  # file that the finished models are scored on, such as BLiMP's
    num_pairs: int | None = None  # of the file, those with the smallest hashes; None: all

    def __post_init__(self) -> None:
        check_range("minutes", self.minutes, 0.01)
        check_range("seeds", self.seeds, 1, 100)
        check_range("points", self.points, 1, 1000)
        check_range("num_pairs", self.num_pairs, 1)
        check_sides(self.sides)


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """A search over a side's settings."""

    side: str  # bert, modernbert or encoderkit
    store: str  # folder made by encoderkit-pretrain prepare
    out: str = "runs/race-tuning"  # folder of the search; trials that are in its log are not run again
    trials: int = 8  # settings that are tried for half of the minutes; the first is the recipe as it is
    minutes: float = 10.0  # of training for the best two
    recipes: str | None = None  # folder of SIDE.yaml, what trials change; None: pretrain/recipes/race
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 1000  # of the choice of settings, and of each training; none that races

    def __post_init__(self) -> None:
        check_range("trials", self.trials, 1)
        check_range("minutes", self.minutes, 0.02)  # half of them is the shortest budget that there is
        check_sides([self.side])


def check_sides(sides: list[str]) -> None:
    """Raise InputError for a side that there is not."""
    if not sides:
        raise InputError(f"sides is empty; expected some of {', '.join(SIDES)}")
    for side in sides:
        if side not in SIDES:
            raise InputError(f"no side is called {side!r}; expected {', '.join(SIDES)}")
        if sides.count(side) > 1:
            raise InputError(f"sides has {side} twice; name it once")


def recipe_of(side: str, recipes: str | None) -> Path:
    """The YAML file of a side. Raises InputError where there is none."""
    path = Path(recipes or RECIPES) / f"{side}.yaml"
    if not path.is_file():
        raise InputError(f"{path} is not there; expected the settings of {side}")
    return path
