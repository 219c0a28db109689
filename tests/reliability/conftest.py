"""A store and an uninterrupted run that the interrupted ones are compared with."""

from __future__ import annotations

import pytest
from tiny_run import make_settings, make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("reliability"))


@pytest.fixture(scope="session")
def whole_run(store, tmp_path_factory):
    from encoderkit.pretrain.loop import pretrain

    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(make_settings(store, out))
    return out
