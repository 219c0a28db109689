import pytest
import torch

from encoderkit.encoder import precision
from encoderkit.encoder.precision import bf16_speedup, resolve_precision
from encoderkit.kernels.errors import InputError

CPU = torch.device("cpu")


def this_cpu(monkeypatch, *, able: bool, speedup: float) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: able)
    monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)


@pytest.mark.parametrize(
    ("able", "speedup", "name", "reason"),
    [
        (True, 1.8, "bf16", "bf16 products measured 1.8 times as fast as fp32 on this CPU"),
        (True, 0.6, "fp32", "bf16 products measured 0.6 times as fast as fp32 on this CPU"),
        (False, 9.0, "fp32", "this CPU has no bf16 instructions"),
    ],
)
def test_auto_is_what_multiplies_faster(monkeypatch, able, speedup, name, reason):
    this_cpu(monkeypatch, able=able, speedup=speedup)
    chosen = resolve_precision("auto", CPU)
    assert (chosen.name, chosen.reason) == (name, reason)


def test_a_named_precision_is_not_measured(monkeypatch):
    this_cpu(monkeypatch, able=True, speedup=0.6)
    assert resolve_precision("bf16", CPU).dtype == torch.bfloat16
    this_cpu(monkeypatch, able=False, speedup=9.0)
    with pytest.raises(InputError, match="precision is bf16, but this CPU has no bf16 instructions; use fp32 or auto"):
        resolve_precision("bf16", CPU)


def test_the_measured_speedup_is_that_of_the_faster_times(monkeypatch):
    """A clock that gives fp32 products 3 s and bf16 products 2 s; the first calls are not timed."""
    now = iter([t for trial in range(12) for t in ((0.0, 3.0, 0.0, 2.0) if trial > 1 else (0.0, 0.0))])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(now))
    bf16_speedup.cache_clear()
    assert bf16_speedup() == 1.5
    bf16_speedup.cache_clear()
