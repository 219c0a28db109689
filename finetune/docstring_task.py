"""A task that every machine has: which package does a docstring come from, with the packages' names masked out?

Test examples come from modules that `python-docs:train`, the pretraining text, leaves out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.python_docs import docstring_examples

# Packages that encoderkit brings along or that are common, in order of preference: of different fields first.
CANDIDATES = (
    "numpy", "pandas", "sympy", "torch", "transformers", "matplotlib", "scipy", "networkx", "sklearn", "aiohttp",
    "pygments", "PIL", "huggingface_hub", "accelerate", "datasets", "rich", "asyncio", "email", "xml", "http",
)  # fmt: skip

Example = tuple[str, str, str]  # text, package, module


def write_task(
    folder: Path, *, num_packages: int = 8, train: int = 32, validation: int = 16, test: int = 50, min_test: int = 20
) -> dict[str, int]:
    """Write train.jsonl, validation.jsonl and test.jsonl; returns how many rows each has.

    num_packages: the first candidates that have train + validation examples and at least min_test test examples. train,
    validation, test: examples of each package; train and validation share no module. Rows: text, label, module.
    Raises InputError where fewer than two packages have enough documentation.
    """
    known = _by_package(docstring_examples(split="train", packages=CANDIDATES))
    unseen = _by_package(docstring_examples(split="test", packages=CANDIDATES))
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    packages: list[str] = []
    for package in CANDIDATES:
        first, second = _parts(known[package], train, validation)
        if len(packages) == num_packages or len(second) < validation or len(unseen[package]) < min_test:
            continue
        packages.append(package)
        splits["train"] += first
        splits["validation"] += second
        splits["test"] += unseen[package][:test]
    if len(packages) < 2:
        raise InputError(
            f"python-docs: {len(packages)} packages with enough documentation; expected at least 2 of "
            f"{', '.join(CANDIDATES)}: install some of them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in splits.items():
        lines = (json.dumps({"text": t, "label": p, "module": m}, ensure_ascii=False) + "\n" for t, p, m in examples)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", errors="replace")
    return {name: len(examples) for name, examples in splits.items()}


def _by_package(examples: list[Example]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        found[example[1]].append(example)
    return found


def _parts(examples: list[Example], train: int, validation: int) -> tuple[list[Example], list[Example]]:
    """The first train examples, and validation more of other modules; the second part is short where there are few."""
    first = examples[:train]
    seen = {module for _, _, module in first}
    return first, [example for example in examples[train:] if example[2] not in seen][:validation]
