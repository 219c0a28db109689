"""The command export: which state of a run, the folder with its card, the hub, and what it refuses."""

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_run import make_settings

from encoderkit.encoder.checkpoint import load
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.checkpoint import whole_checkpoints
from encoderkit.pretrain.export import push
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.settings import Checkpoints


@pytest.fixture(scope="module")
def run(small_store, tmp_path_factory):
    """A finished run with checkpoints of the steps 12, 18 and 20."""
    out = tmp_path_factory.mktemp("runs") / "first"
    pretrain(make_settings(small_store, out, checkpoints=Checkpoints(every_steps=6, every_minutes=None, keep=3)))
    return out


def weights_of(run, step):
    return next(c for c in whole_checkpoints(run / "checkpoints") if c.step == step).tensors("model")


def test_last_is_the_final_model(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    ours, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run / "final"))
    assert ours.keys() == final.keys()
    assert all(torch.equal(ours[name], final[name]) for name in ours)
    assert "step 20 of first, the last; held-out loss" in capsys.readouterr().out
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Exported from step 20 of first, the last." in card
    assert "**this model**" in card
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "model"))
    assert len(fill("the red [MASK] sees a cat")) == 5


@pytest.mark.parametrize(("checkpoint", "steps"), [("12", [12]), ("average-2", [18, 20]), ("average-3", [12, 18, 20])])
def test_a_step_and_an_average(run, tmp_path, checkpoint, steps):
    assert main(["export", str(run), "--checkpoint", checkpoint, "--out", str(tmp_path / "model")]) == 0
    model = load(tmp_path / "model")
    for name in ("encoder.blocks.1.feed_forward.down.weight", "decoder_bias"):
        mean = torch.stack([weights_of(run, step)[name] for step in steps]).double().mean(0)
        assert torch.equal(model.state_dict()[name], mean.float())


def test_best_is_the_lowest_at_the_probe(run, tmp_path, monkeypatch):
    """The step before the last is made the best one by a measurement that says so."""
    import encoderkit.pretrain.export as export

    losses = {tuple(weights_of(run, step)["decoder_bias"].tolist()): step for step in (12, 18, 20)}
    real = export.HeldOut.score

    def measured(held_out, model, device):
        score = real(held_out, model, device)
        if losses[tuple(model.decoder_bias.tolist())] != 18:
            return score
        return dataclasses.replace(score, probe=dataclasses.replace(score.probe, loss=1.0))

    monkeypatch.setattr(export.HeldOut, "score", measured)
    assert main(["export", str(run), "--checkpoint", "best", "--out", str(tmp_path / "model")]) == 0
    assert torch.equal(load(tmp_path / "model").decoder_bias, weights_of(run, 18)["decoder_bias"])


def test_folder_with_code_opens_as_told_in_its_card(run, tmp_path):
    assert main(["export", str(run), "--format", "code", "--out", str(tmp_path / "model")]) == 0
    assert "trust_remote_code=True" in (tmp_path / "model" / "README.md").read_text()
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "model"), trust_remote_code=True)
    assert len(fill("the red [MASK] sees a cat")) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "13"], "checkpoint is 13; the run has whole checkpoints of the steps 20, 18, 12"),
        (["--checkpoint", "average-9"], "checkpoint is average-9; the run has 3 whole checkpoints that were due"),
        (["--checkpoint", "newest"], "checkpoint is 'newest'; expected last, best, a step or average-N"),
    ],
)
def test_what_is_not_there_is_told(run, tmp_path, capsys, arguments, message):
    assert main(["export", str(run), *arguments, "--out", str(tmp_path / "model")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    assert main(["export", str(run), "--out", str(tmp_path)]) == 2
    assert "in use; give --out a new or empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_store_made_anew_since_the_run_is_not_used(run, tmp_path, monkeypatch, capsys):
    from encoderkit.pretrain.store import Store

    monkeypatch.setattr(Store, "hash", property(lambda self: "another"))
    assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    assert "not scored: " in capsys.readouterr().out
    assert "this model" not in (tmp_path / "model" / "README.md").read_text()
    assert main(["export", str(run), "--checkpoint", "best", "--out", str(tmp_path / "best")]) == 2
    assert "was made anew since the run" in capsys.readouterr().err


def test_asked_to_send_it_sends(run, tmp_path, monkeypatch, capsys):
    import encoderkit.pretrain.export as export

    sent = []
    monkeypatch.setattr(export, "push", lambda *arguments: sent.append(arguments) or "there")
    out = tmp_path / "model"
    assert main(["export", str(run), "--out", str(out), "--push_to_hub", "me/model", "--private", "true"]) == 0
    assert sent == [(out, "me/model", True)]
    assert "sent to there" in capsys.readouterr().out


def test_hub_gets_the_whole_folder(tmp_path, monkeypatch):
    import huggingface_hub

    sent = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            sent.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            sent.append((repo_id, sorted(p.name for p in folder_path.iterdir())))

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(tmp_path, "me/model", private=True) == "https://hub/me/model"
    assert sent == [("me/model", True, True), ("me/model", ["config.json"])]


def test_hub_that_refuses_is_told(tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def create_repo(self, *args, **kwargs):
            raise OSError("no token")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(InputError, match=r"push_to_hub me/model: no token; .* is written, log in and send it again"):
        push(tmp_path, "me/model", private=False)
