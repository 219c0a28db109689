import copy

import pytest
import torch

from encoderkit.encoder import precision
from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.precision import bf16_speedup, resolve_precision, use_fp8
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


def test_fp8_is_refused_where_there_is_none():
    with pytest.raises(InputError, match="precision is fp8, but this CPU has no fp8 instructions; use bf16, fp32 or"):
        resolve_precision("fp8", CPU)


def test_fp8_keeps_parameters_and_comes_close():
    """Products rounded to e4m3 (3 bits of mantissa: steps of 1/16 at most) beside bf16 ones."""
    pytest.importorskip("torchao", reason="the extra fp8 is not installed")
    torch.manual_seed(0)
    model = MaskedLM(preset("modern", "tiny", vocab_size=100))
    rounded = copy.deepcopy(model)
    use_fp8(rounded.encoder.blocks, emulate=True)
    assert rounded.state_dict().keys() == model.state_dict().keys()
    batch = TokenBatch.from_sequences([list(range(5, 47))], targets=[{p: p for p in range(0, 42, 3)}])
    results = []
    for each in (model, rounded):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = each(batch).loss
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in each.encoder.blocks.parameters()])))
    (loss, gradient), (loss8, gradient8) = results
    assert loss8 == pytest.approx(loss, rel=0.01)
    assert loss8 != loss
    assert gradient8.dtype == torch.float32
    assert (gradient8 - gradient).norm() < 0.15 * gradient.norm()


def test_the_measured_speedup_is_that_of_the_faster_times(monkeypatch, tmp_path):
    """A clock that gives fp32 products 3 s and bf16 products 2 s; the first calls are not timed."""
    monkeypatch.setenv("ENCODERKIT_CACHE", str(tmp_path))
    now = iter([t for trial in range(12) for t in ((0.0, 3.0, 0.0, 2.0) if trial > 1 else (0.0, 0.0))])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(now))
    bf16_speedup.cache_clear()
    assert bf16_speedup() == 1.5
    bf16_speedup.cache_clear()  # as in another process, which does not measure: the clock has run out
    assert bf16_speedup() == 1.5
    bf16_speedup.cache_clear()
