"""The final model may be the mean of the newest checkpoints."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import differences, make_settings

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import loop
from encoderkit.pretrain.averaging import mean_weights, newest_due
from encoderkit.pretrain.checkpoint import whole_checkpoints
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.run_folder import read_log
from encoderkit.pretrain.settings import Checkpoints
from encoderkit.pretrain.stopping import Stopped

AVERAGED = Checkpoints(every_steps=6, every_minutes=None, keep=3, average=3)


@pytest.fixture(scope="module")
def averaged(small_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("averaged") / "run"
    pretrain(make_settings(small_store, out, checkpoints=AVERAGED))
    return out


def test_final_is_the_mean_of_the_newest_checkpoints(averaged):
    newest = whole_checkpoints(averaged / "checkpoints")[:3]
    assert [checkpoint.step for checkpoint in newest] == [20, 18, 12]
    final, name = load_file(averaged / "final" / "model.safetensors"), "model.final_norm.weight"
    parts = [checkpoint.tensors("model")["encoder.final_norm.weight"].double() for checkpoint in newest]
    assert torch.equal(final[name], (sum(parts) / 3).float())
    assert not torch.equal(final[name], parts[0].float())
    assert read_log(averaged / "log.jsonl")[-1]["averaged_steps"] == [20, 18, 12]
    assert "the mean of the steps 20, 18, 12" in (averaged / "report.md").read_text()


def test_a_checkpoint_that_a_signal_asked_for_is_not_averaged(averaged, small_store, tmp_path, monkeypatch):
    settings, train_step = make_settings(small_store, tmp_path / "run", checkpoints=AVERAGED), loop.train_step

    def stopping(job, batches):
        if job.state.step in (13, 14):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(job, batches)

    monkeypatch.setattr(loop, "train_step", stopping)
    for resume in (False, True):
        with pytest.raises(Stopped):
            pretrain(settings, resume=resume)
    pretrain(settings, resume=True)
    assert differences(averaged, tmp_path / "run") == []
    assert [checkpoint.step for checkpoint in newest_due(tmp_path / "run" / "checkpoints", 3)] == [20, 18, 12]


def test_the_mean_of_one_checkpoint_is_its_weights(averaged):
    (newest,) = whole_checkpoints(averaged / "checkpoints")[:1]
    mean, weights = mean_weights([newest]), newest.tensors("model")
    assert all(torch.equal(mean[name], weights[name]) for name in weights)


def test_fewer_kept_than_averaged_are_refused():
    with pytest.raises(InputError, match=r"checkpoints.keep is 2; expected at least checkpoints.average = 3"):
        Checkpoints(average=3)
