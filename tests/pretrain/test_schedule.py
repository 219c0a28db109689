import math

import pytest

from encoderkit.pretrain.schedule import factor, mask_rate
from encoderkit.pretrain.settings import Masking, Schedule


def test_linear_by_its_formula():
    schedule = Schedule(name="linear", warmup=0.2, final=0.1)
    assert factor(schedule, 0.1) == pytest.approx(0.5)
    assert factor(schedule, 0.2) == pytest.approx(1.0)
    assert factor(schedule, 0.6) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(schedule, 1.0) == pytest.approx(0.1)


def test_cosine_by_its_formula():
    schedule = Schedule(name="cosine", warmup=0.0)
    for progress in (0.0, 0.25, 0.7, 1.0):
        assert factor(schedule, progress) == pytest.approx((1 + math.cos(math.pi * progress)) / 2)


def test_warmup_stable_decay_by_its_formula():
    schedule = Schedule(name="wsd", warmup=0.1, decay=0.25)
    assert factor(schedule, 0.1) == factor(schedule, 0.5) == factor(schedule, 0.75) == pytest.approx(1.0)
    assert factor(schedule, 0.75 + 0.25 / 4) == pytest.approx(1 - math.sqrt(0.25))
    assert factor(schedule, 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_schedules_stay_between_zero_and_one(name):
    for warmup in (0.0, 0.3, 1.0):
        values = [factor(Schedule(name=name, warmup=warmup), step / 97) for step in range(98)]
        assert min(values) >= 0
        assert max(values) <= 1


def test_mask_rate_moves_linearly():
    assert mask_rate(Masking(rate=0.3, final_rate=0.15), 0.5) == pytest.approx(0.225)
    assert mask_rate(Masking(rate=0.3), 0.5) == 0.3
