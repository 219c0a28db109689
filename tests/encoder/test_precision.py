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


def test_speedup_is_measured_once():
    assert bf16_speedup() > 0
    before = bf16_speedup.cache_info().hits
    bf16_speedup()
    assert bf16_speedup.cache_info().hits == before + 1
