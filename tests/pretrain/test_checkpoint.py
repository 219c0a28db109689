"""A checkpoint that is listed is whole; a damaged one is found, named and passed over."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import threading

import pytest
import torch
from reliability.children import fork
from tiny_run import same_bits
from torch import nn

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import checkpoint as module
from encoderkit.pretrain.checkpoint import (
    CheckpointWriter,
    Ranks,
    damage,
    keep,
    latest_checkpoint,
    save_checkpoint,
)
from encoderkit.pretrain.muon import Muon
from encoderkit.pretrain.optimizer_state import flatten_optimizer, unflatten_optimizer


def tensors(step: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(16, 8, generator=generator)
    return {
        "model": {"embed": weight, "decoder": weight, "bias": torch.randn(8, generator=generator).bfloat16()},
        "other": {"ids": torch.arange(5), "step": torch.tensor(3.0), "none": torch.empty(0), "turned": weight.T},
    }


def save(folder, step: int):
    return save_checkpoint(folder, step, tensors(step), {"step": step, "spikes": [0.1, float("inf")], "name": "é"})


def test_round_trip_is_bit_for_bit(tmp_path):
    save(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (7, {"step": 7, "spikes": [0.1, float("inf")], "name": "é"})
    for stem, group in tensors(7).items():
        loaded = found.tensors(stem)
        assert list(loaded) == list(group)
        assert all(same_bits(loaded[name], value) for name, value in group.items())
    model = found.tensors("model")
    assert model["embed"] is model["decoder"]
    with pytest.raises(InputError, match=r"holds no ema\.safetensors"):
        found.tensors("ema")


def test_two_views_of_one_storage_stay_two_tensors(tmp_path):
    flat = torch.arange(6.0)
    save_checkpoint(tmp_path, 1, {"model": {"flat": flat, "square": flat.view(2, 3), "part": flat[2:4]}}, {})
    loaded = latest_checkpoint(tmp_path).tensors("model")  # type: ignore[union-attr]
    assert torch.equal(loaded["square"], flat.view(2, 3))
    assert torch.equal(loaded["part"], flat[2:4])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_continues_bit_for_bit(tmp_path, name):
    def make():
        torch.manual_seed(0)
        linear = nn.Linear(8, 8, bias=name == "adamw")
        options = {"lr": 1e-3, "weight_decay": 0.1}
        kind = torch.optim.AdamW if name == "adamw" else Muon
        return linear, kind(list(linear.parameters()), **options)

    def step(linear, optimizer, i):
        optimizer.zero_grad()
        linear(torch.randn(4, 8, generator=torch.Generator().manual_seed(i))).square().sum().backward()
        optimizer.step()

    straight, cut = make(), make()
    for i in range(6):
        step(*straight, i)
    for i in range(3):
        step(*cut, i)
    flat, described = flatten_optimizer(cut[1].state_dict())
    save_checkpoint(tmp_path, 3, {"model": cut[0].state_dict(), "optimizer": flat}, {"optimizer": described})
    found = latest_checkpoint(tmp_path)
    assert found is not None
    resumed = make()
    resumed[0].load_state_dict(found.tensors("model"))
    state = unflatten_optimizer(found.tensors("optimizer"), found.state["optimizer"])
    assert state["param_groups"] == cut[1].state_dict()["param_groups"]
    assert {p: list(s) for p, s in state["state"].items()} == {
        p: list(s) for p, s in cut[1].state_dict()["state"].items()
    }
    resumed[1].load_state_dict(state)
    for i in range(3, 6):
        step(*resumed, i)
    for a, b in zip(straight[0].parameters(), resumed[0].parameters()):
        assert same_bits(a.detach(), b.detach())


def save_together(folder, step: int, count: int, *, asynchronous: bool = False, seconds: float = 20.0):
    """Ranks as threads, each with its rows of what has rows; returns what each raised."""
    meeting, raised = threading.Barrier(count), [None] * count

    def write(rank: int):
        ranks = Ranks(rank, count, meeting.wait, seconds)
        writer = CheckpointWriter(folder, 2, asynchronous=asynchronous, ranks=ranks)
        own, rows = {}, {}
        for stem, group in tensors(step).items():
            rows[stem] = [name for name, tensor in group.items() if tensor.dim()]
            own[stem] = {name: group[name].tensor_split(count)[rank] for name in rows[stem]}
            own[stem] |= {name: tensor for name, tensor in group.items() if name not in rows[stem] and rank == 0}
        try:
            writer.save(step, own, {"step": step}, rows)
            writer.finish()
        except InputError as error:
            raised[rank] = str(error)
        writer.close()

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("count", [2, 7])  # 7: more ranks than some tensors have rows
def test_rows_of_many_ranks_are_the_whole_tensors(tmp_path, count, asynchronous):
    assert save_together(tmp_path, 7, count, asynchronous=asynchronous) == [None] * count
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]
    found = latest_checkpoint(tmp_path)
    assert len(list(found.path.glob("*.safetensors"))) == 2 * count
    assert len(list(found.path.iterdir())) == 2 * count + 2
    for stem, group in tensors(7).items():
        loaded = found.tensors(stem)
        assert loaded.keys() == group.keys()
        assert all(same_bits(loaded[name], value) for name, value in group.items())
    model = found.tensors("model")
    assert model["embed"] is model["decoder"]


def test_a_damaged_part_is_named_and_the_one_before_is_used(tmp_path, caplog):
    for step in (1, 2):
        save_together(tmp_path, step, 2)
    (tmp_path / "step-2" / "other-1-of-2.safetensors").write_bytes(b"")
    assert latest_checkpoint(tmp_path).step == 1
    assert "other-1-of-2.safetensors has 0 bytes" in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_disk_is_full_leaves_nothing_listed(tmp_path, monkeypatch, rank):
    save_together(tmp_path, 1, 2)
    real = module.save_file

    def full(tensors, path):
        if f"-{rank}-of-2" in path.name:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    raised = save_together(tmp_path, 2, 2)
    assert "No space left on device" in raised[rank]
    assert rank == 0 or "rank 1 could not write its part" in raised[0]
    # The other rank may still write into the partial folder that this one removes; the next save clears it away.
    assert [path.name for path in tmp_path.iterdir() if path.name != ".partial-step-2"] == ["step-1"]


def test_a_rank_that_never_hands_in_its_part_leaves_nothing_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_hand_in", lambda *_: None)
    raised = save_together(tmp_path, 1, 2, seconds=0.2)
    assert "rank 1 did not write its part in time" in raised[0]
    assert list(tmp_path.iterdir()) == []


FILES = ["manifest.json", "model.safetensors", "other.safetensors", "state.json"]


def test_every_file_of_a_checkpoint_is_listed(tmp_path):
    assert sorted(path.name for path in save(tmp_path, 1).iterdir()) == FILES


def damaged(path, how: str, content: bytes) -> None:
    if how == "missing":
        path.unlink()
    elif how == "linked":
        path.rename(path.parent.parent / "elsewhere")
        path.symlink_to(path.parent.parent / "elsewhere")
    else:
        path.write_bytes(
            {"cut": content[:-1], "empty": b"", "zeroed": bytes(len(content)), "pickle": b"\x80\x04."}[how]
        )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "zeroed", "pickle", "linked"])
def test_damaged_file_is_named_and_the_one_before_is_used(tmp_path, caplog, name, how):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    damaged(file, how, file.read_bytes())
    with caplog.at_level(logging.WARNING, "encoderkit"):
        found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(caplog.messages) == 1
    assert str(tmp_path / "step-2") in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "zeroed"])
def test_damage_passes_unseen_without_verification(tmp_path, monkeypatch, name, how):
    """Proof that it is damage() that finds it."""
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    damaged(file, how, file.read_bytes())
    monkeypatch.setattr(module, "damage", lambda path: None)
    assert latest_checkpoint(tmp_path).step == 2


def test_200_bit_flips_are_found(tmp_path):
    path = save(tmp_path, 1)
    draw = random.Random(0)
    contents = {name: (path / name).read_bytes() for name in FILES}
    for _ in range(200):
        name = draw.choice(FILES)
        flipped = bytearray(contents[name])
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        (path / name).write_bytes(flipped)
        assert damage(path) is not None, name
        (path / name).write_bytes(contents[name])
    assert damage(path) is None


def test_bit_flips_pass_unseen_without_checksums(tmp_path, monkeypatch):
    """Proof that the checksum is what finds them."""
    path = save(tmp_path, 1)
    monkeypatch.setattr(module, "file_hash", lambda file: "x")
    monkeypatch.setattr(module, "_sealed", lambda manifest: (path / "manifest.json").read_text())
    text = (path / "manifest.json").read_text()
    for name in FILES[1:]:
        digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
        text = text.replace(digest, "x")
    (path / "manifest.json").write_text(text)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert damage(path) is None


def test_two_newest_damaged_and_the_third_loads(tmp_path, caplog):
    for step in (9, 10, 11):
        save(tmp_path, step)
    for step in (10, 11):
        (tmp_path / f"step-{step}" / "state.json").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 9
    assert len(caplog.messages) == 2


def test_without_verification_the_newest_is_taken_though_damaged(tmp_path, monkeypatch, caplog):
    for step in (9, 10, 11):
        save(tmp_path, step)
    for step in (10, 11):
        (tmp_path / f"step-{step}" / "state.json").unlink()
    monkeypatch.setattr(module, "damage", lambda path: None)
    assert latest_checkpoint(tmp_path).step == 11
    assert not caplog.messages


def test_manifest_may_not_point_outside(tmp_path):
    path = save(tmp_path, 1)
    (tmp_path / "outside").write_bytes((path / "state.json").read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["seal"]
    manifest["files"]["../outside"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(module._sealed(manifest))
    assert damage(path) == "../outside is missing"


@pytest.mark.parametrize("where", ["save_file", "file_hash", "_sealed", "_flush"])
def test_crash_while_writing_leaves_nothing_listed(tmp_path, monkeypatch, where):
    save(tmp_path, 1)

    def crash(*_, **__):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, where, crash)
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(SystemExit):
            save(tmp_path, 2)
    assert not (tmp_path / "step-2").exists()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def killed_at(call: int, folder) -> int:
    """Save as step 2, and be killed at this call of what a save calls."""
    left = iter(range(call, -1, -1))

    def killing(function):
        def wrapped(*arguments):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return wrapped

    for name in ("file_hash", "_sealed", "_flush", "_remove"):
        setattr(module, name, killing(getattr(module, name)))
    save(folder, 2)
    return 0


@pytest.mark.parametrize("call", range(11))  # 3 checksums, the manifest, 5 flushes, the old one's removal, 1 flush
def test_killed_process_leaves_whole_checkpoints(tmp_path, call):
    save(tmp_path / "run", 1)
    assert fork(lambda: killed_at(call, tmp_path / "run"), tmp_path / "log").wait() == -signal.SIGKILL
    listed = sorted((tmp_path / "run").glob("step-*"))
    assert [path.name for path in listed] == (["step-1", "step-2"] if call == 10 else ["step-1"])  # 10: renamed
    assert [damage(path) for path in listed] == [None] * len(listed)


def save_on_a_full_disk(folder) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_checkpoint(folder, 2, {"model": {"w": torch.zeros(100_000)}}, {})
    except InputError as error:
        print(error)
    return 0


def test_full_disk_is_a_clear_error_and_the_old_one_stays(tmp_path):
    save(tmp_path / "run", 1)
    assert fork(lambda: save_on_a_full_disk(tmp_path / "run"), tmp_path / "log").wait() == 0
    assert (tmp_path / "log").read_text().startswith("checkpoint of step 2 cannot be written to")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-1"]
    assert damage(tmp_path / "run" / "step-1") is None


def test_retention_counts_whole_ones_only(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "step-5" / "state.json").write_text("{}")
    keep(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4", "step-5"]
    keep(tmp_path, 2)
    shutil.rmtree(tmp_path / "step-5")
    keep(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4"]


@pytest.mark.parametrize(("guard", "off"), [("FEWEST", 1), ("damage", lambda path: None)])
def test_without_the_rule_of_retention_fewer_than_two_whole_ones_stay(tmp_path, monkeypatch, guard, off):
    """Proof of both parts of it: at least two, and whole ones only."""
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "step-5" / "state.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(module, guard, off)
        keep(tmp_path, 1)
    assert len(module.whole_checkpoints(tmp_path)) == 1


def test_same_step_is_written_again(tmp_path):
    path = save(tmp_path, 3)
    (path / "state.json").unlink()
    save(tmp_path, 3)
    assert damage(path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
