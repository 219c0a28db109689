import math
import time

import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.clock import Clock
from encoderkit.pretrain.schedule import Stage, factor, mask_rate
from encoderkit.pretrain.settings import Budget, Checkpoints, Data, Log, Masking, PretrainSettings, Schedule


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


def test_warmup_and_decay_do_not_overlap():
    Schedule(name="wsd", warmup=0.7, decay=0.3)
    Schedule(name="linear", warmup=0.9)  # decay is of wsd alone
    with pytest.raises(InputError, match=r"schedule.warmup is 0.5 and schedule.decay 0.6; expected at most 1"):
        Schedule(name="wsd", warmup=0.5, decay=0.6)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_schedules_stay_between_zero_and_one(name):
    for warmup in (0.0, 0.3, 1.0):
        schedule = Schedule(name=name, warmup=warmup, decay=min(0.2, 1 - warmup))
        values = [factor(schedule, step / 97) for step in range(98)]
        assert min(values) >= 0
        assert max(values) <= 1


def test_mask_rate_moves_linearly():
    assert mask_rate(Masking(rate=0.3, final_rate=0.15), 0.5) == pytest.approx(0.225)
    assert mask_rate(Masking(rate=0.3), 0.5) == 0.3


def staged(**budget):
    data = Data(max_tokens=512, row_tokens=1024, length_curriculum=[(0.5, 128), (0.75, 256)])
    return PretrainSettings(data=data, batch_tokens=4096, batch_ramp=[(0.25, 1024)], budget=Budget(**budget))


def walk(clock):
    """Every stage of a run, and its number of steps."""
    stages, step = [clock.stage], 0
    while clock.progress(step) < 1:
        if (due := clock.due_stage(step)) != clock.stage:
            stages.append(due)
            clock.stage = due
        step += 1
    return stages, step


def test_length_and_batch_size_by_steps():
    stages, steps = walk(Clock(staged(steps=100)))
    assert stages == [Stage(128, 1), Stage(128, 4, 25, 25), Stage(256, 4, 50, 125), Stage(512, 4, 75, 225)]
    assert steps == 100


def test_length_and_batch_size_by_tokens():
    # 25 rows of one a step are a quarter of the tokens; then 4 rows a step.
    stages, steps = walk(Clock(staged(tokens=100 * 1024)))
    assert stages == [Stage(128, 1), Stage(128, 4, 25, 25), Stage(256, 4, 32, 53), Stage(512, 4, 38, 77)]
    assert steps == 25 + 19
    assert stages[-1].row(steps) == 101  # whole steps


def test_length_and_batch_size_by_time():
    clock = Clock(staged(minutes=1))
    clock._shared.value = 29.9
    clock.stage = clock.due_stage(7)
    assert clock.stage == Stage(128, 4, 7, 7)
    clock._shared.value = 45.0
    clock.stage = clock.due_stage(9)
    assert clock.stage == Stage(512, 4, 9, 15)
    assert clock.due_stage(10) is clock.stage


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"length_curriculum": [(0.5, 64), (0.4, 96)]}, {}, r"shares \[0.5, 0.4\]; expected rising"),
        ({"length_curriculum": [(1.0, 64)]}, {}, "expected rising ones between 0 and 1"),
        ({"length_curriculum": [(0.5, 256)]}, {}, "data.length_curriculum is 256; expected from 8 to 128"),
        ({"length_curriculum": [(0.5, 64)], "layout": "padded"}, {}, "data.layout is padded"),
        ({}, {"batch_ramp": [(0.5, 1000)]}, "batch_ramp is 1000; expected a multiple of data.row_tokens = 1024"),
        ({}, {"batch_ramp": [(0.0, 1024)]}, "batch_ramp has the shares"),
    ],
)
def test_stages_that_cannot_be_are_refused(data, changes, message):
    with pytest.raises(InputError, match=message):
        PretrainSettings(data=Data(**data), **changes)


class TwoGpus:
    """An accelerator that notes when the host would wait for its devices."""

    num_processes, is_main_process, device = 2, True, "cpu"

    def __init__(self):
        self.waits = 0

    def reduce(self, tensor, reduction):
        self.waits += 1
        return tensor


class OneAfterAnother(TwoGpus):
    """Ranks that take turns: a sum is the first one's tensor, as the others bring zeros."""

    def reduce(self, tensor, reduction):
        if self.is_main_process:
            self.first = tensor
        else:
            assert not tensor.any()
        return self.first


@pytest.mark.parametrize(("budget", "waits"), [({"steps": 25}, 2), ({"minutes": 1}, 25)])
def test_ranks_agree_on_the_time_at_log_lines_only_where_it_is_not_the_budget(budget, waits):
    clock, gpus = Clock(PretrainSettings(budget=Budget(**budget))), TwoGpus()
    clock.start(0.0)
    for step in range(1, 26):
        clock.tick(gpus, step)
    assert gpus.waits == waits


@pytest.mark.parametrize(("seconds", "at"), [(0.5, [6, 12, 18, 24, 30, 36, 42, 48, 54, 60]), (1.5, [6, 24, 42, 60])])
def test_validations_take_a_tenth_of_the_minutes_at_most(seconds, at):
    clock, other = Clock(PretrainSettings(budget=Budget(minutes=1))), Clock(PretrainSettings(budget=Budget(minutes=1)))
    ranks, due = OneAfterAnother(), []
    for second in range(1, 61):
        before = clock.progress(second - 1)
        for each, is_main_process in ((clock, True), (other, False)):
            each._began, ranks.is_main_process = time.perf_counter() - second, is_main_process
            each.tick(ranks, second)
        asked = [each.validation_due(second, before) for each in (clock, other)]
        assert asked[0] == asked[1]
        if asked[0]:
            due.append(second)
            clock.validated(seconds)
            other.validated(0.0)  # measures its own time, and follows the first one
    assert due == at


def test_ranks_agree_on_saves_by_time_where_others_are_by_steps():
    """One rank comes to the first step 20 s before the other."""
    checkpoints, ranks = Checkpoints(every_steps=13, every_minutes=1), OneAfterAnother()
    clocks = [Clock(PretrainSettings(budget=Budget(steps=100), checkpoints=checkpoints)) for _ in range(2)]
    due = []
    for step in range(1, 100):
        asked = []
        for clock, own, ranks.is_main_process in zip(clocks, (6 * step, 6 * step - 20), (True, False)):
            clock._began = time.perf_counter() - own
            clock.tick(ranks, step)
            asked.append(clock.checkpoint_due(step))
        assert asked[0] == asked[1], step
        due += [step] * asked[0]
    assert set(range(13, 100, 13)) < set(due)


def test_one_process_saves_by_time_between_lines_of_the_log():
    checkpoints = Checkpoints(every_minutes=0.01)
    clock = Clock(PretrainSettings(budget=Budget(steps=25), log=Log(every_steps=1000), checkpoints=checkpoints))
    alone = TwoGpus()
    alone.num_processes = 1
    clock.start(0.0)
    time.sleep(0.65)
    clock.tick(alone, 7)
    assert clock.checkpoint_due(7)


def test_a_checkpoint_is_due_by_time_only_where_ranks_agreed():
    clock = Clock(PretrainSettings(budget=Budget(steps=100)))
    clock.start(0.0)
    clock._began -= 3600
    due = []
    for step in range(1, 22):
        clock.tick(TwoGpus(), step)
        if clock.checkpoint_due(step):
            due.append(step)
    assert due == [10]
