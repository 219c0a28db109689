"""What every test shares: no network, few threads, runs that draw nothing, and reasons for what is skipped."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors of tests are small; set before torch is imported
if "ENCODERKIT_CACHE" not in os.environ:  # what is measured while tests run is no measurement; xdist's workers inherit
    os.environ["ENCODERKIT_CACHE"] = tempfile.mkdtemp(prefix="encoderkit-cache-")
    atexit.register(shutil.rmtree, os.environ["ENCODERKIT_CACHE"], ignore_errors=True)

import pytest
import torch
from hypothesis import settings

settings.register_profile("encoderkit", deadline=None, derandomize=True, database=None)
settings.load_profile("encoderkit")

# Files of few and slow tests. xdist hands files out in this order, and one of these at the end keeps one core waiting.
SLOW = [
    "reliability/test_torture.py",
    "pretrain/test_batch_properties.py",
    "pretrain/test_prepare_properties.py",
    "finetune/test_bench.py",
    "pretrain/test_bench_ranks.py",
    "pretrain/test_bench_prepare.py",
    "pretrain/test_parallel.py",
    "pretrain/test_launching.py",
    "encoder/test_model.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first; skip tests marked gpu where torch sees no CUDA device."""
    turns = {Path(__file__).parent / name: turn for turn, name in enumerate(SLOW)}
    items.sort(key=lambda item: turns.get(item.path, len(SLOW)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def _alike() -> None:
    """The same random tensors and fp32 products in every run, in whatever order the tests come."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # a run of the test before may have chosen another way


@pytest.fixture(scope="session", autouse=True)
def _plain_runs() -> Iterator[Callable]:
    """Pretraining runs draw no plots, and ask git once where they come from; gives what draws.

    For the session: runs that several tests share begin before what is set for one test.
    """
    from encoderkit.pretrain import report, run_folder

    draws = report.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda run: None)
        patch.setattr(run_folder, "_source", cache(run_folder._source))
        yield draws


@pytest.fixture
def real_plots(_plain_runs: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretraining runs draw their plots."""
    monkeypatch.setattr("encoderkit.pretrain.report.plot", _plain_runs)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public data for measurements that ENCODERKIT_DATA names; tests that ask for it skip without."""
    folder = os.environ.get("ENCODERKIT_DATA")
    if not folder:
        pytest.skip("needs public data; set ENCODERKIT_DATA to its folder")
    return Path(folder)
