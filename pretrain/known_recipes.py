"""Peak learning rates that published encoders were trained with, and how far a recipe is from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from encoderkit.pretrain.settings import OptimizerName


@dataclass(frozen=True)
class KnownRecipe:
    """lr: peak. batch_tokens: tokens of an optimizer step. source: where the figures stand."""

    name: str
    parameters: float
    optimizer: Literal["adamw", "lamb", "muon"]  # muon: of the matrices, in units of AdamW's update size
    lr: float
    batch_tokens: int
    source: str


KNOWN_RECIPES = (
    KnownRecipe("encoderkit modern-4x256", 4.4e6, "adamw", 2e-3, 2_048, "pretrain/recipes"),
    KnownRecipe("Ettin 17M", 17e6, "adamw", 3e-3, 4_718_592, "Weller et al. 2025, arXiv:2507.11412"),
    KnownRecipe("Ettin 68M", 68e6, "adamw", 3e-3, 4_718_592, "Weller et al. 2025, arXiv:2507.11412"),
    KnownRecipe("BERT base", 110e6, "adamw", 1e-4, 131_072, "Devlin et al. 2019, arXiv:1810.04805"),
    KnownRecipe("cramming", 120e6, "adamw", 1e-3, 1_048_576, "Geiping and Goldstein 2022, arXiv:2212.14034"),
    KnownRecipe("RoBERTa base", 125e6, "adamw", 6e-4, 4_194_304, "Liu et al. 2019, arXiv:1907.11692"),
    KnownRecipe("MosaicBERT base", 137e6, "adamw", 5e-4, 524_288, "Portes et al. 2023, arXiv:2312.17482"),
    KnownRecipe("ModernBERT base", 149e6, "adamw", 8e-4, 4_718_592, "Warner et al. 2024, arXiv:2412.13663"),
    KnownRecipe("BERT large", 340e6, "adamw", 1e-4, 131_072, "Devlin et al. 2019, arXiv:1810.04805"),
    KnownRecipe("RoBERTa large", 355e6, "adamw", 4e-4, 4_194_304, "Liu et al. 2019, arXiv:1907.11692"),
    KnownRecipe("ModernBERT large", 395e6, "adamw", 5e-4, 5_046_272, "Warner et al. 2024, arXiv:2412.13663"),
    KnownRecipe("encoderkit modern-4x256", 4.4e6, "muon", 4e-3, 2_048, "pretrain/recipes"),
    KnownRecipe("BERT large by LAMB", 340e6, "lamb", 5e-3, 4_194_304, "You et al. 2020, arXiv:1904.00962"),
)
NEAR_SIZE = 4.0  # models this many times as large or small are comparable
FAR_RATE = (
    4.0  # rates this many times those of comparable models are far: twice 4e-3 was worse, 5x stayed at the unigram
)


def comparable(optimizer: OptimizerName, parameters: int) -> list[KnownRecipe]:
    """Known recipes for models of about this size, or for the nearest size; rates may be AdamW's where updates are.

    Liu et al. 2025 size Muon's updates so that rates tuned for AdamW carry over; StableAdamW's are AdamW's at most.
    """

    def distance(recipe: KnownRecipe) -> float:
        return abs(math.log(recipe.parameters / parameters))

    names = {"stable_adamw": ("adamw",), "muon": ("muon", "adamw")}.get(optimizer, (optimizer,))
    kept = [recipe for recipe in KNOWN_RECIPES if recipe.optimizer in names]
    reach = max(math.log(NEAR_SIZE), min(map(distance, kept)))
    return [recipe for recipe in kept if distance(recipe) <= reach]
