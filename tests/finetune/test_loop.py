"""The loop: it learns, repeats bit for bit, keeps the best epoch, and writes what transformers can open."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from encoderkit.encoder.checkpoint import load_classifier
from encoderkit.encoder.precision import resolve_precision
from encoderkit.finetune import loop
from encoderkit.finetune.encoding import EncodedTexts, encode
from encoderkit.finetune.inference import compute_by_length, score_texts
from encoderkit.finetune.loop import epoch_order, finetune
from encoderkit.finetune.predict import predict
from encoderkit.finetune.run_folder import held
from encoderkit.finetune.settings import FinetuneSettings, PredictSettings
from encoderkit.finetune.tasks import Columns, TaskData
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.settings import TaskOptimizer

pytestmark = pytest.mark.usefixtures("no_plots")
LOGITS_FP32 = 2e-6  # one forward pass in fp32 in another order of summation


def settings_for(model, task_files, out, **changes):
    data = TaskData(**{split: str(task_files / f"{split}.jsonl") for split in ("train", "validation", "test")})
    fields = {
        "model": model,
        "data": data,
        "out": str(out),
        "epochs": 12,
        "batch_size": 16,
        "max_tokens": 32,
        "precision": "fp32",
        "optimizer": TaskOptimizer(name="adamw", lr=4e-3),
    }
    return FinetuneSettings(**{**fields, **changes})


@pytest.fixture(scope="module")
def trained(model_folder, task_files, tmp_path_factory):
    """A finished run for each architecture, plot and all: no_plots comes after it."""
    return finetune(settings_for(model_folder, task_files, tmp_path_factory.mktemp("run") / "out"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_learns_a_task_that_can_be_learned(trained):
    assert trained.scores["test"]["accuracy"] > 0.9
    losses = [line["loss"] for line in read_lines(trained.out / "log.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] / 3


def test_run_folder_is_whole(trained):
    assert {path.name for path in trained.out.iterdir()} == {
        "config.yaml", "epochs.png", "final", "lock", "log.jsonl", "metrics.json", "predictions.jsonl", "report.md"
    }  # fmt: skip
    metrics = json.loads((trained.out / "metrics.json").read_text())
    assert metrics["labels"] == ["blue", "green", "red"]
    assert metrics["test"] == trained.scores["test"]
    lines = read_lines(trained.out / "predictions.jsonl")
    assert [line["split"] for line in lines] == ["validation"] * 40 + ["test"] * 40
    right = [line["label"] == line["prediction"] for line in lines if line["split"] == "test"]
    assert np.mean(right) == pytest.approx(trained.scores["test"]["accuracy"])
    assert "accuracy" in (trained.out / "report.md").read_text()


def test_predict_on_the_saved_folder_gives_the_run_s_predictions(trained, task_files, tmp_path):
    out = tmp_path / "predictions.jsonl"
    predict(PredictSettings(model=str(trained.out / "final"), file=str(task_files / "test.jsonl"), out=str(out)))
    expected = [line for line in read_lines(trained.out / "predictions.jsonl") if line["split"] == "test"]
    for ours, theirs in zip(read_lines(out), expected, strict=True):
        assert (ours["row"], ours["prediction"]) == (theirs["row"], theirs["prediction"])
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=LOGITS_FP32)


def test_final_folder_gives_transformers_the_same_logits(trained, task_files):
    folder = trained.out / "final"
    native = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in read_lines(task_files / "test.jsonl")]
    model = load_classifier(folder)
    encoded = encode(tokenizer, texts, None, max_tokens=32, token_types=model.config.token_types > 1)
    logits_NC = score_texts(
        model, encoded, precision=resolve_precision("fp32", torch.device("cpu")), max_batch_tokens=99
    )
    with torch.inference_mode():
        native_NC = native(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(logits_NC, native_NC, atol=LOGITS_FP32, rtol=LOGITS_FP32)
    assert native.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert tokenizer.model_max_length == 32


def test_packed_equals_one_by_one(trained, task_files, tokenizer):
    model = load_classifier(trained.out / "final")
    rows = read_lines(task_files / "test.jsonl")
    types = model.config.token_types > 1
    encoded = encode(tokenizer, [r["text"] for r in rows], [r["other"] for r in rows], max_tokens=32, token_types=types)
    fp32 = resolve_precision("fp32", torch.device("cpu"))
    packed, single = (score_texts(model, encoded, precision=fp32, max_batch_tokens=tokens) for tokens in (10_000, 1))
    torch.testing.assert_close(packed, single, atol=LOGITS_FP32, rtol=LOGITS_FP32)


@pytest.mark.parametrize("some_read", [True, False])
def test_outputs_come_in_the_order_of_the_inputs(some_read):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 99, length).tolist() for length in rng.integers(1, 9, 60)]
    reads = [[i == 0 or bool(rng.random() < 0.5) for i in range(len(sequence))] for sequence in ids]
    encoded = EncodedTexts.from_sequences(ids, None, reads=reads if some_read else None, sizes=[1, 2, 3] * 10)
    batches = []
    outputs_MC = compute_by_length(
        lambda batch: batch.input_ids[batch.target_positions, None],
        encoded,
        torch.device("cpu"),
        resolve_precision("fp32", torch.device("cpu")),
        24,
        tell=batches.append,
    )
    read = [i for sequence, is_read in zip(ids, reads) for i, r in zip(sequence, is_read) if r]
    assert outputs_MC.flatten().tolist() == (read if some_read else [sequence[0] for sequence in ids])
    assert sum(batches) == sum(map(len, ids))
    assert len(batches) > 5


def test_like_lengths_are_computed_together_and_the_longest_first():
    rng = np.random.default_rng(0)
    encoded = EncodedTexts.from_sequences([[1] * length for length in rng.integers(1, 30, 60)], None)
    lengths = []

    def note(batch):
        lengths.extend(batch.segments.lengths.tolist())
        return torch.zeros(len(batch.target_positions), 1)

    cpu = torch.device("cpu")
    compute_by_length(note, encoded, cpu, resolve_precision("fp32", cpu), 64)
    assert lengths == sorted(encoded.lengths().tolist(), reverse=True)


def test_two_runs_write_the_same_numbers(modern_folder, task_files, tmp_path):
    files = []
    for name in ("first", "second"):
        run = finetune(settings_for(modern_folder, task_files, tmp_path / name, epochs=2, dropout=0.1))
        files.append(
            [(run.out / "final" / "model.safetensors").read_bytes(), (run.out / "predictions.jsonl").read_bytes()]
            + [{k: v for k, v in line.items() if k != "time"} for line in read_lines(run.out / "log.jsonl")]
        )
        torch.rand(3)  # what the process drew before must not matter
    assert files[0] == files[1]
    other = finetune(settings_for(modern_folder, task_files, tmp_path / "other", epochs=2, dropout=0.1, seed=1))
    assert (other.out / "final" / "model.safetensors").read_bytes() != files[0][0]


@pytest.mark.parametrize("weighted", [{}, {"class_weights": "balanced", "label_smoothing": 0.1}])
def test_micro_batches_do_not_change_the_step(modern_folder, task_files, tmp_path, weighted):
    options = {"epochs": 1, **weighted}
    whole = finetune(settings_for(modern_folder, task_files, tmp_path / "whole", **options))
    split = finetune(settings_for(modern_folder, task_files, tmp_path / "split", micro_batch_tokens=33, **options))
    losses = [[line["loss"] for line in read_lines(run.out / "log.jsonl") if "loss" in line] for run in (whole, split)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)  # six steps of Adam apart


def test_the_best_epoch_is_restored(modern_folder, task_files, tmp_path):
    """A learning rate that wrecks the model late: what is saved is what was best, not what was last."""
    rows = read_lines(task_files / "validation.jsonl")
    wrong = tmp_path / "wrong.jsonl"  # validation that punishes what train teaches: the first epochs are the best
    wrong.write_text(
        "".join(
            json.dumps({**r, "label": {"red": "blue", "blue": "green", "green": "red"}[r["label"]]}) + "\n"
            for r in rows
        )
    )
    data = TaskData(train=str(task_files / "train.jsonl"), validation=str(wrong))
    run = finetune(settings_for(modern_folder, task_files, tmp_path / "run", data=data))
    by_epoch = [line["validation"] for line in read_lines(run.out / "log.jsonl") if "validation" in line]
    accuracies = [scores["accuracy"] for scores in by_epoch]
    assert run.best_epoch == 1 + accuracies.index(max(accuracies))
    assert run.best_epoch < len(accuracies)
    assert accuracies[-1] < max(accuracies)
    predictions = predict(
        PredictSettings(model=str(run.out / "final"), file=str(wrong), out=str(tmp_path / "again.jsonl"))
    )
    right = [ours["prediction"] == row["label"] for ours, row in zip(predictions, read_lines(wrong), strict=True)]
    assert np.mean(right) == pytest.approx(max(accuracies))


def test_untrained_starts_from_other_weights(modern_folder, task_files, tmp_path):
    still = TaskOptimizer(name="adamw", lr=0.0)  # nothing moves: final/ holds the weights that training started from
    for untrained in (False, True):
        out = tmp_path / f"untrained-{untrained}"
        finetune(settings_for(modern_folder, task_files, out, epochs=1, untrained=untrained, optimizer=still))
        name = "model.embeddings.tok_embeddings.weight"
        start = load_file(out / "final" / "model.safetensors")[name]
        before = load_file(f"{modern_folder}/model.safetensors")[name]
        assert torch.equal(start, before) is not untrained


def test_pairs_can_be_learned(model_folder, task_files, tmp_path):
    data = TaskData(train=str(task_files / "train.jsonl"))
    columns = Columns(text_b="other", label="same")
    changes = {"data": data, "columns": columns, "epochs": 2, "metric": "f1"}
    run = finetune(settings_for(model_folder, task_files, tmp_path / "run", **changes))
    assert run.metric == "f1"
    losses = [line["loss"] for line in read_lines(run.out / "log.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    native = transformers.AutoModelForSequenceClassification.from_pretrained(run.out / "final").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.out / "final")
    rows, answers = read_lines(task_files / "train.jsonl"), read_lines(run.out / "predictions.jsonl")
    asked = [rows[answer["row"] - 1] for answer in answers]  # validation is held out of train
    text, other = ([row[name] for row in asked] for name in ("text", "other"))
    with torch.inference_mode():
        native_NC = native(**tokenizer(text, other, padding=True, return_tensors="pt")).logits.softmax(1)
    names = native.config.id2label.values()
    ours_NC = torch.tensor([[answer["probabilities"][name] for name in names] for answer in answers])
    torch.testing.assert_close(ours_NC, native_NC, atol=LOGITS_FP32, rtol=LOGITS_FP32)


def test_long_inputs_are_cut_and_counted(tokenizer):
    encoded = encode(tokenizer, ["cat " * 30, "dog"], ["bird " * 9, "cat"], max_tokens=20, token_types=True)
    assert np.diff(encoded.starts).tolist() == [20, 5]
    assert (encoded.truncated, encoded.cut_tokens) == (1, 30 + 9 + 3 - 20)
    bird = tokenizer.convert_tokens_to_ids("bird")
    assert (encoded.token_ids[:20] == bird).sum() >= 8  # the longer text is cut first
    assert encoded.token_types is not None
    assert encoded.token_types[:20].sum() == (encoded.token_ids[:20] == bird).sum() + 1


def test_pieces_cover_all_rows_in_order(tokenizer):
    encoded = encode(tokenizer, ["cat " * n for n in (1, 5, 30, 2, 2)], None, max_tokens=64, token_types=False)
    pieces = list(encoded.pieces(np.array([4, 2, 0, 1, 3]), 12))
    assert [piece.tolist() for piece in pieces] == [[4], [2], [0, 1], [3]]


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((0, 1), (0, 2), (1, 1), (1, 2))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == epoch_order(50, 0, 1).tolist()


def test_bf16_learns_and_keeps_fp32_weights(modern_folder, task_files, tmp_path, monkeypatch):
    monkeypatch.setattr("encoderkit.encoder.precision.has_bf16", lambda device: True)  # slow without, and the same
    runs = {
        precision: finetune(settings_for(modern_folder, task_files, tmp_path / precision, precision=precision))
        for precision in ("fp32", "bf16")
    }
    metrics = json.loads((runs["bf16"].out / "metrics.json").read_text())
    assert metrics["precision"] == "bf16"
    assert runs["bf16"].scores["test"]["accuracy"] > 0.9
    assert runs["bf16"].scores["test"]["loss"] != runs["fp32"].scores["test"]["loss"]
    kept = load_file(runs["bf16"].out / "final" / "model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    assert any((weight != weight.bfloat16()).any() for weight in kept.values())  # updates finer than bf16 are kept


def test_a_loss_that_is_not_finite_stops_the_run(modern_folder, task_files, tmp_path):
    settings = settings_for(
        modern_folder,
        task_files,
        tmp_path / "run",
        optimizer=TaskOptimizer(name="adamw", lr=10.0, clip=0, weight_decay=1e30),
    )
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+; lower optimizer.lr"):
        finetune(settings)
    assert not (tmp_path / "run" / "final").exists()


def test_bad_settings_are_refused_before_anything_is_written(modern_folder, task_files, tmp_path):
    with pytest.raises(InputError, match=r"max_tokens is 100, but .* takes at most 64"):
        finetune(settings_for(modern_folder, task_files, tmp_path / "run", max_tokens=100))
    with pytest.raises(InputError, match="no such"):
        finetune(settings_for("./nowhere", task_files, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        finetune(settings_for(modern_folder, task_files, tmp_path / "used"))


def test_an_attention_backend_that_cannot_serve_is_told_before_the_weights_are_read(
    modern_folder, task_files, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "load_classifier", lambda *_, **__: pytest.fail("the model was built"))
    with pytest.raises(InputError, match="xformers cannot serve here"):
        finetune(settings_for(modern_folder, task_files, tmp_path / "run", attention="xformers"))


def test_a_run_folder_in_use_names_its_holder(modern_folder, task_files, tmp_path):
    with held(tmp_path / "run"), pytest.raises(InputError, match=rf"in use by process {os.getpid()} on "):
        finetune(settings_for(modern_folder, task_files, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_strangers_settings_are_not_unfolded(modern_folder, task_files, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: &a [1, 1]\nb: [*a, *a]\n")
    with pytest.raises(InputError, match=r"config.yaml line 1: &a: anchors and aliases are not read"):
        finetune(settings_for(modern_folder, task_files, tmp_path / "run", resume=True))


def test_a_run_is_not_resumed_on_other_rows(modern_folder, task_files, tmp_path, monkeypatch):
    data, out = shutil.copytree(task_files, tmp_path / "data"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_classifier", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(settings_for(modern_folder, data, out, epochs=2))
    file = data / "validation.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match=r"began with other rows than .*train\.jsonl"):
        finetune(settings_for(modern_folder, data, out, epochs=2, resume=True))


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_stopped_run_leaves_a_checkpoint_unless_told_not_to(
    checkpoints, modern_folder, task_files, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "save_classifier", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(settings_for(modern_folder, task_files, tmp_path / "run", epochs=2, checkpoints=checkpoints))
    assert (tmp_path / "run" / "checkpoints").exists() == checkpoints


def test_the_report_tells_how_new_rows_are_answered(modern_folder, task_files, tmp_path):
    pair = Columns(text="text", text_b="other", label="same")
    finetune(settings_for(modern_folder, task_files, tmp_path / "run", epochs=1, columns=pair))
    command = f"`encoderkit-finetune predict {tmp_path}/run/final --file ROWS.jsonl --columns.text_b other`"
    assert command in (tmp_path / "run" / "report.md").read_text()


def test_final_folder_appears_whole(modern_folder, task_files, tmp_path, monkeypatch):
    """A stop while it is written leaves none, and the resumed run writes it."""
    real = loop.save_classifier

    def stopped(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_classifier", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings_for(modern_folder, task_files, out, epochs=2))
    assert not (out / "final").exists()
    finetune(settings_for(modern_folder, task_files, out, epochs=2, resume=True))
    assert (out / "final" / "model.safetensors").is_file()
    assert not [path for path in out.iterdir() if "partial" in path.name]
