"""The route is the faster one, if it is exact; torch's setting is left alone while measuring."""

import json

import pytest
import torch

from encoderkit.kernels import matrix_route, measured
from encoderkit.kernels.matrix_route import SETTINGS, TRIALS, fastest_route, use_route


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCODERKIT_CACHE", str(tmp_path))
    before = torch.get_float32_matmul_precision()
    fastest_route.cache_clear()
    yield
    fastest_route.cache_clear()
    torch.set_float32_matmul_precision(before)


def clock_of(mkl: float, onednn: float):
    """A clock by which products take these seconds."""
    now = iter([t for trial in range(TRIALS) for t in ((0.0, mkl, 0.0, onednn) if trial > 1 else (0.0, 0.0))])
    return lambda: next(now)


@pytest.mark.parametrize(("mkl", "onednn", "chosen"), [(2.0, 1.0, "onednn"), (1.1, 1.0, "mkl"), (1.0, 2.0, "mkl")])
def test_the_faster_one_is_taken_where_it_is_clearly_faster(monkeypatch, mkl, onednn, chosen):
    monkeypatch.setattr(matrix_route.time, "perf_counter", clock_of(mkl, onednn))
    monkeypatch.setattr(matrix_route, "EXACT", float("inf"))  # this chip may round to bf16
    route = fastest_route()
    assert route.name == chosen
    assert f"oneDNN measured {mkl / onednn:.1f} times as fast as MKL" in route.reason


def test_the_next_process_takes_the_same_route_unmeasured(monkeypatch):
    monkeypatch.setattr(matrix_route, "EXACT", float("inf"))
    monkeypatch.setattr(matrix_route.time, "perf_counter", clock_of(2.0, 1.0))
    first = fastest_route()
    fastest_route.cache_clear()  # as in another process
    monkeypatch.setattr(matrix_route.time, "perf_counter", clock_of(1.0, 2.0))
    assert fastest_route() == first
    measured.file().write_text(json.dumps({measured.machine(): {"matrix route": ["blas", "by hand"]}}))
    fastest_route.cache_clear()
    assert fastest_route().name == "mkl"


def test_a_faster_one_that_rounds_is_left(monkeypatch):
    """Products that are rounded to bf16 under the setting that allows it."""
    real = torch.Tensor.__matmul__

    def rounding(a, b):
        product = real(a, b)
        medium = torch.get_float32_matmul_precision() == "medium" and product.dtype == torch.float32
        return product.bfloat16().float() if medium else product

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    monkeypatch.setattr(matrix_route.time, "perf_counter", clock_of(2.0, 1.0))
    assert fastest_route().name == "mkl"


def test_measuring_leaves_the_setting_alone_and_using_sets_it():
    torch.set_float32_matmul_precision("high")
    fastest_route()
    assert torch.get_float32_matmul_precision() == "high"
    for name, setting in SETTINGS.items():
        use_route(name)
        assert torch.get_float32_matmul_precision() == setting
