"""Asynchronous saving, the best checkpoint, full disks, memory that is short, and weights in fp32."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reliability.killing import save_in_place
from tiny_run import differences, make_settings, stop_before, write_recipe

from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import checkpoint as module
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.checkpoint import CheckpointWriter, damage, keep, latest_checkpoint, save_checkpoint
from encoderkit.pretrain.initial_model import plan_model
from encoderkit.pretrain.job import build_job
from encoderkit.pretrain.loop import pretrain, train_step
from encoderkit.pretrain.settings import Checkpoints, Log
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import load_tokenizer

ASYNCHRONOUS = Checkpoints(every_steps=6, every_minutes=None, asynchronous=True)


def steps(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_a_run_that_saves_asynchronously_is_the_same(whole_run, store, tmp_path, monkeypatch):
    """Also where each step changes the weights while the step before is written."""
    real = module.save_file
    monkeypatch.setattr(module, "save_file", lambda *arguments: time.sleep(0.2) or real(*arguments))
    pretrain(make_settings(store, tmp_path / "run", checkpoints=ASYNCHRONOUS))
    assert differences(whole_run, tmp_path / "run") == []
    assert steps(tmp_path / "run" / "checkpoints") == steps(whole_run / "checkpoints")
    for path in (whole_run / "checkpoints").glob("step-*"):
        other = tmp_path / "run" / "checkpoints" / path.name
        assert (path / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_without_a_copy_later_steps_would_be_in_the_checkpoint(tmp_path, monkeypatch):
    """Proof that it is the copy that keeps them out."""
    written, begin, real = [], threading.Event(), module._untie

    def saved(folder, step, tensors, state, ranks):
        begin.wait()
        written.append(float(tensors["model"].tensors["w"][0]))

    monkeypatch.setattr(module, "save_checkpoint", saved)
    for copies in (True, False):
        if not copies:
            monkeypatch.setattr(module, "_untie", lambda group, copy: real(group, False))
        begin.clear()
        weight = torch.zeros(4)
        writer = CheckpointWriter(tmp_path, 2, asynchronous=True)
        writer.save(1, {"model": {"w": weight}}, {})
        weight += 1
        begin.set()
        writer.finish()
        writer.close()
    assert written == [0.0, 1.0]


def test_asynchronous_checkpoints_are_committed_in_order_and_a_crash_lists_none_in_part(tmp_path, monkeypatch):
    listed, real = [], module.save_file

    def slow(*arguments):
        time.sleep(0.1)
        listed.append(steps(tmp_path))
        real(*arguments)

    monkeypatch.setattr(module, "save_file", slow)
    writer = CheckpointWriter(tmp_path, 9, asynchronous=True)
    for step in (1, 2, 3):
        writer.save(step, {"model": {"w": torch.ones(4)}}, {})
    writer.finish()
    assert listed == [[], [1], [1, 2]]
    assert steps(tmp_path) == [1, 2, 3]
    writer.close()


def test_without_waiting_for_the_one_before_commits_lose_their_order(tmp_path, monkeypatch):
    """Proof that it is the waiting that keeps it, where a later checkpoint is written faster."""
    committed: list[int] = []

    def faster_and_faster(folder, step, tensors, state, ranks):
        time.sleep(0.3 / step)
        committed.append(step)

    monkeypatch.setattr(module, "save_checkpoint", faster_and_faster)
    for waits, order in ((True, [1, 2, 3]), (False, [3, 2, 1])):
        committed.clear()
        writer = CheckpointWriter(tmp_path, 9, asynchronous=True)
        if not waits:
            writer.close()
            writer._thread = ThreadPoolExecutor(3)
            monkeypatch.setattr(CheckpointWriter, "finish", lambda writer: None)
        for step in (1, 2, 3):
            writer.save(step, {"model": {"w": torch.ones(4)}}, {})
        writer.close()
        assert committed == order


def test_an_asynchronous_save_that_fails_is_told_at_the_next_one(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, 2, asynchronous=True)
    monkeypatch.setattr(module, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer.save(1, {"model": {"w": torch.ones(4)}}, {})
    with pytest.raises(InputError, match="checkpoint of step 1 cannot be written"):
        writer.save(2, {"model": {"w": torch.ones(4)}}, {})
    writer.close()
    assert steps(tmp_path) == []


def test_on_a_slow_disk_a_step_waits_a_tenth_of_a_synchronous_save_at_most(tmp_path, monkeypatch):
    real = module._flush
    monkeypatch.setattr(module, "_flush", lambda path: time.sleep(0.2) or real(path))
    tensors = {"model": {str(i): torch.ones(1 << 18) for i in range(8)}}  # 8 MB
    seconds = {}
    for asynchronous in (False, True):
        writer = CheckpointWriter(tmp_path / str(asynchronous), 2, asynchronous=asynchronous)
        began = time.perf_counter()
        writer.save(1, tensors, {})
        seconds[asynchronous] = time.perf_counter() - began
        writer.finish()
        writer.close()
    assert seconds[True] < 0.1 * seconds[False]


def test_the_best_stays_beside_the_newest(tmp_path):
    for step, score in ((1, 3.0), (2, 1.0), (3, 0.5), (4, None), (5, 2.0), (6, 9.0)):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(4)}}, {"score": score})
    (tmp_path / "step-3" / "model.safetensors").write_bytes(b"")  # better, and damaged
    keep(tmp_path, 2)
    assert steps(tmp_path) == [2, 5, 6]
    keep(tmp_path, 3)
    assert steps(tmp_path) == [2, 5, 6]


def test_a_run_keeps_the_checkpoint_with_the_lowest_held_out_loss(store, tmp_path, monkeypatch):
    import encoderkit.pretrain.loop as loop
    from encoderkit.pretrain.probe import HeldOutScore, ProbeScore

    losses = dict.fromkeys(range(21), 4.0)
    losses[6] = 2.0
    monkeypatch.setattr(loop, "validate", lambda job: HeldOutScore(ProbeScore(losses[job.state.step], 0.5, 9), None))
    settings = make_settings(store, tmp_path / "run", log=Log(every_steps=4, validate_every_steps=6))
    pretrain(settings)
    assert steps(tmp_path / "run" / "checkpoints") == [6, 18, 20]


def test_by_default_the_best_validation_is_saved_though_no_save_is_due(store, tmp_path, monkeypatch):
    """Validations at a tenth, two tenths and so on; saves by minutes, which do not come."""
    import encoderkit.pretrain.loop as loop
    from encoderkit.pretrain.probe import HeldOutScore, ProbeScore

    losses = {**dict.fromkeys(range(21), 4.0), 2: 5.0, 6: 3.0, 8: float("nan")}
    monkeypatch.setattr(loop, "validate", lambda job: HeldOutScore(ProbeScore(losses[job.state.step], 0.5, 9), None))
    saving = Checkpoints(every_minutes=60, keep=2)
    settings = make_settings(store, tmp_path / "run", checkpoints=saving)
    with stop_before(15):
        pretrain(settings)
    assert steps(tmp_path / "run" / "checkpoints") == [4, 6]
    pretrain(settings, resume=True)
    assert steps(tmp_path / "run" / "checkpoints") == [6, 20]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").state["run"]["best"] == 3.0


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    whole_run, store, tmp_path, monkeypatch, capsys
):
    recipe = write_recipe(make_settings(store, tmp_path / "run"), tmp_path / "recipe.yaml")
    real = module.save_file

    def full(tensors, path):
        if ".partial-step-12" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        assert main(["run", "--config", str(recipe)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: checkpoint of step 12 cannot be written")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-6"]
    assert main(["run", "--resume", str(tmp_path / "run")]) == 0
    assert differences(whole_run, tmp_path / "run") == []


def test_a_save_in_place_lists_a_part_when_the_disk_is_full(tmp_path, monkeypatch):
    """Proof that it is the other name that keeps it out."""

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    tensors = {"model": {"w": torch.ones(4)}}
    for save, error, listed in ((save_checkpoint, InputError, [1]), (save_in_place, OSError, [1, 2])):
        save(tmp_path, 1, tensors, {})
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_file", full)
            with pytest.raises(error):
                save(tmp_path, 2, tensors, {})
        assert steps(tmp_path) == listed
    assert damage(tmp_path / "step-2") is not None


def test_out_of_memory_names_the_settings_to_change_and_they_keep_the_batch(store, tmp_path, monkeypatch, capsys):
    import encoderkit.pretrain.loop as loop

    recipe = write_recipe(make_settings(store, tmp_path / "run"), tmp_path / "recipe.yaml")
    real = loop.train_step

    def short(job, batches):
        if job.state.step == 8 and len(batches[0].input_ids) > 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(job, batches)

    monkeypatch.setattr(loop, "train_step", short)
    assert main(["run", "--config", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "step 9: out of memory with micro_batch_tokens 256; resume with --micro_batch_tokens 128 or" in told
    assert "--gradient_checkpointing true, which keeps batch_tokens 512" in told
    assert main(["run", "--resume", str(tmp_path / "run"), "--micro_batch_tokens", "128"]) == 0
    end = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert end["step"] == 20


def test_a_model_that_does_not_fit_leaves_its_folder_free(store, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    recipe = write_recipe(make_settings(store, tmp_path / "run"), tmp_path / "recipe.yaml")
    with monkeypatch.context() as patch:
        patch.setattr("encoderkit.pretrain.job.spread", full)
        for _ in range(2):  # the second time as the first
            assert main(["run", "--config", str(recipe)]) == 2
            assert "the model does not fit beside what is in memory; free it there" in capsys.readouterr().err
    assert [item.name for item in (tmp_path / "run").iterdir()] == ["lock"]


def frozen_share(settings, dtype: torch.dtype) -> float:
    """Share of the weights with a gradient that one step under bf16 leaves where they were."""
    job = build_job(settings, resume=False, in_memory=True)
    job.model.to(dtype)
    before = [parameter.detach().clone() for parameter in job.model.parameters()]
    gradients = []
    for optimizer in job.optimizers:
        optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in job.model.parameters()))
    for group in (group for optimizer in job.optimizers for group in optimizer.param_groups):
        group["lr"] = 3e-5
    train_step(job, next(job.loader))
    pairs = list(zip(before, job.model.parameters(), gradients[: len(before)], strict=True))
    with_gradient = sum(int((gradient != 0).sum()) for _, _, gradient in pairs)
    same = sum(int(((a == b) & (gradient != 0)).sum()) for a, b, gradient in pairs)
    return same / with_gradient


def test_weights_are_fp32_under_bf16_and_bf16_weights_would_freeze(store, tmp_path, monkeypatch):
    """At lr 3e-5 an update is smaller than half a bf16 step of most weights."""
    monkeypatch.setattr("encoderkit.encoder.precision.has_bf16", lambda device: True)  # slowly, it works everywhere
    monkeypatch.setattr("encoderkit.pretrain.step_log.peak_flops", lambda *_: None)  # very slowly
    optimizer = dataclasses.replace(make_settings(store, tmp_path).optimizer, name="adamw", lr=3e-5)
    settings = make_settings(store, tmp_path / "run", precision="bf16", optimizer=optimizer)
    assert frozen_share(settings, torch.float32) < 0.001
    assert frozen_share(settings, torch.bfloat16) > 0.5


def test_initial_weights_are_fp32(store, tmp_path):
    store = Store.open(store)
    settings = make_settings(store.folder, tmp_path / "run", precision="bf16")
    _, build = plan_model(settings, store, load_tokenizer(store.tokenizer_folder))
    model: MaskedLM = build()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_final_folder_appears_whole(store, tmp_path, monkeypatch):
    """A stop while the model folder is written leaves none, and the resumed run writes it."""
    import encoderkit.pretrain.loop as loop

    settings = make_settings(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_model_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings)
    assert not [path for path in (tmp_path / "run").iterdir() if "final" in path.name]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").step == 20
    pretrain(settings, resume=True)
    assert (tmp_path / "run" / "final" / "README.md").is_file()
    shutil.rmtree(tmp_path / "run")
