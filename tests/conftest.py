"""What every test shares: no network, few threads, and reasons for what is skipped."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def _alike() -> None:
    """The same random tensors and fp32 products in every run, in whatever order the tests come."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # a run of the test before may have chosen another way


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public data for measurements that ENCODERKIT_DATA names; tests that ask for it skip without."""
    folder = os.environ.get("ENCODERKIT_DATA")
    if not folder:
        pytest.skip("needs public data; set ENCODERKIT_DATA to its folder")
    return Path(folder)
