"""A measurement is made once on a machine; a file that is damaged or cannot be written stands in nobody's way."""

import json
import os

import pytest
import torch

from encoderkit.kernels import measured
from encoderkit.kernels.measured import kept


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCODERKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Measure:
    """Gives 1.0, 2.0, ..."""

    count = 0.0

    def __call__(self):
        self.count += 1
        return self.count


def is_number(value):
    return isinstance(value, float)


def test_one_measurement_serves_all_that_ask(cache):
    measure = Measure()
    assert [kept("speed", measure, is_number) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert kept("other", measure, is_number) == 2.0
    assert json.loads(measured.file().read_text()) == {measured.machine(): {"speed": 1.0, "other": 2.0}}
    assert os.listdir(cache) == ["measured.json"]
    measured.forget()
    assert kept("speed", measure, is_number) == 3.0


def test_what_other_machines_keep_stays(cache):
    cache.mkdir()
    other = {"another machine": {"speed": 9.0}}
    measured.file().write_text(json.dumps(other))
    kept("speed", Measure(), is_number)
    measured.forget()
    assert json.loads(measured.file().read_text()) == other


def test_another_number_of_threads_is_measured_anew(monkeypatch):
    measure = Measure()
    kept("speed", measure, is_number)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert kept("speed", measure, is_number) == 2.0
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert kept("speed", measure, is_number) == 3.0
    assert len(json.loads(measured.file().read_text())) == 3


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\x00", '{"HERE": 3}', '{"HERE": {"speed": "fast"}}'])
def test_a_damaged_file_is_measured_again_and_mended(damage, cache):
    cache.mkdir()
    measured.file().write_text(damage.replace("HERE", measured.machine()))
    measure = Measure()
    assert [kept("speed", measure, is_number) for _ in range(2)] == [1.0, 1.0]


def test_a_folder_that_cannot_be_written_stops_nobody(cache):
    cache.write_text("a file in place of the folder")
    measure = Measure()
    assert [kept("speed", measure, is_number) for _ in range(2)] == [1.0, 2.0]
    measured.forget()


def test_the_folder_is_where_caches_are(monkeypatch):
    monkeypatch.delenv("ENCODERKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(measured.file()) == "/caches/encoderkit/measured.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(measured.file()) == "/home/me/.cache/encoderkit/measured.json"
