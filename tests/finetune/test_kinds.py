"""Every kind of task through the one loop: it learns, resumes bit for bit, and trains what it is told to train."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import load_classifier
from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.config import preset
from encoderkit.finetune import loop
from encoderkit.finetune.examples import QuestionExample
from encoderkit.finetune.loop import finetune
from encoderkit.finetune.predict import predict
from encoderkit.finetune.settings import FinetuneSettings, Lora, PredictSettings, QuestionAnswering
from encoderkit.finetune.task_head import Limits
from encoderkit.finetune.task_heads import HEADS
from encoderkit.finetune.tasks import Columns, TaskData
from encoderkit.finetune.trainable import add_adapters, layer_rates
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.optimizer import build_optimizers
from encoderkit.pretrain.settings import TaskOptimizer

pytestmark = pytest.mark.usefixtures("no_plots")
COLOURS = ["red", "blue", "green"]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(task_files, tmp_path_factory):
    """The rows of task_files as every kind of task: kind -> split -> file. What is asked for is the colour."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for split in ("train", "validation"):
        texts = read(task_files / f"{split}.jsonl")
        rows = {kind: [] for kind in ("multi_label", "regression", "tagging", "multiple_choice", "question_answering")}
        for i, row in enumerate(texts):
            text, colour = row["text"], row["label"]
            words = text.split()
            rows["multi_label"].append({"text": text, "labels": [colour] + ["one"] * ("the" in words)})
            rows["regression"].append({"text": text, "score": COLOURS.index(colour) + 0.5})
            tags = [
                f"{'I' if i and words[i - 1] in COLOURS else 'B'}-c" if w in COLOURS else "O"
                for i, w in enumerate(words)
            ]
            rows["tagging"].append({"tokens": words, "tags": tags})
            choices = COLOURS[: 2 + i % 2] if colour != "green" else COLOURS
            rows["multiple_choice"].append(
                {"context": text, "question": "is", "choices": choices, "label": choices.index(colour)}
            )
            answers = {"text": [colour], "answer_start": [text.index(colour)]}
            rows["question_answering"].append(
                {"id": f"{split}{i}", "question": "is", "context": text, "answers": answers}
            )
        for kind, of_kind in rows.items():
            found.setdefault(kind, {})[split] = write(folder / f"{kind}-{split}.jsonl", of_kind)
    return found


def settings_for(model, files, kind, out, **changes):
    fields = {
        "model": model,
        "kind": kind,
        "data": TaskData(**files[kind]),
        "out": str(out),
        "epochs": 6,
        "batch_size": 16,
        "max_tokens": 32,
        "precision": "fp32",
        "optimizer": TaskOptimizer(name="adamw", lr=4e-3),
    }
    return FinetuneSettings(**{**fields, **changes})


@pytest.mark.parametrize(
    ("kind", "metrics", "least"),
    [
        ("multi_label", ["f1_micro", "f1_macro", "accuracy"], 0.9),
        ("regression", ["pearson", "spearman"], 0.9),
        ("tagging", ["seqeval_f1", "accuracy"], 0.9),
        ("multiple_choice", ["accuracy"], 0.65),  # guessing gives 0.42
        ("question_answering", ["squad_f1", "exact_match"], 0.9),
    ],
)
def test_every_kind_learns_and_predicts_what_it_measured(modern_folder, files, tmp_path, kind, metrics, least):
    epochs = 12 if kind == "multiple_choice" else 8
    run = finetune(settings_for(modern_folder, files, kind, tmp_path / "run", epochs=epochs))
    assert run.metric == metrics[0]
    assert set(run.scores["validation"]) == {"loss", *metrics}
    assert run.score > least
    written = read(run.out / "predictions.jsonl")
    again = predict(PredictSettings(model=str(run.out / "final"), file=files[kind]["validation"]))
    for ours, theirs in zip(again, written, strict=True):
        if kind == "regression":
            assert ours["prediction"] == pytest.approx(theirs["prediction"], abs=1e-5)
        else:
            assert ours["prediction"] == theirs["prediction"]
    if kind == "question_answering":
        assert again == predict(PredictSettings(model=str(run.out / "final"), file=as_official(files, tmp_path)))
    assert metrics[0] in (run.out / "report.md").read_text()
    assert not (run.out / "checkpoints").exists()


@pytest.mark.parametrize(("scale", "shift"), [(1000, -7), (1e-8, 0)])
def test_the_unit_of_scores_does_not_matter(modern_folder, files, tmp_path, scale, shift):
    found = {}
    for split, path in files["regression"].items():
        rows = [{**row, "score": scale * row["score"] + shift} for row in read(path)]
        found[split] = write(tmp_path / f"{split}.jsonl", rows)
    plain, scaled = (
        finetune(settings_for(modern_folder, data, "regression", tmp_path / name, epochs=2))
        for name, data in (("plain", files), ("scaled", {"regression": found}))
    )
    assert scaled.scores["validation"]["loss"] == pytest.approx(plain.scores["validation"]["loss"], rel=1e-3)
    written = [[line["prediction"] for line in read(run.out / "predictions.jsonl")] for run in (plain, scaled)]
    np.testing.assert_allclose((np.array(written[1]) - shift) / scale, written[0], atol=1e-3)


def test_a_model_of_one_output_answers_numbers(tokenizer, tmp_path):
    """As transformers does without a problem_type: cross-encoders are saved so."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["the red cat", "a dog sees the bird"]
    answers = predict(PredictSettings(model=str(tmp_path / "model"), texts=texts))
    with torch.no_grad():
        expected = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert [answer["prediction"] for answer in answers] == pytest.approx(expected, abs=2e-6)


def as_official(files, folder):
    """The validation questions as SQuAD's JSON of a test set: without answers."""
    rows = read(files["question_answering"]["validation"])
    paragraphs = [{"context": row["context"], "qas": [{"id": row["id"], "question": row["question"]}]} for row in rows]
    (folder / "test-v1.1.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))
    return str(folder / "test-v1.1.json")


def test_answers_do_not_begin_with_the_blank_of_their_first_token():
    head = HEADS["question_answering"]([], Limits(16, False))
    example = QuestionExample(1, "q", "which?", "the red cat sat", None)
    assert head._answer(example, [(2.0, 3, 11), (1.0, 4, 11), (0.5, 3, 4)], 0.0)["n_best"] == [
        {"text": "red cat", "probability": 1.0}
    ]


def test_a_run_whose_states_are_all_damaged_does_not_begin_again(modern_folder, files, tmp_path, monkeypatch):
    real = loop._step

    def stopping(run, inputs, optimizers):
        if list((tmp_path / "run" / "checkpoints").glob("step-*")):
            raise Stopped
        return real(run, inputs, optimizers)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", stopping)
        with pytest.raises(Stopped):
            finetune(settings_for(modern_folder, files, "regression", tmp_path / "run"))
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    next(state.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint is whole"):
        finetune(settings_for(modern_folder, files, "regression", tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "log.jsonl").stat().st_size


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("stop_after", "lora"), [(0, 0), (2, 0), (2, 4)])
def test_a_resumed_run_is_the_uninterrupted_run(modern_folder, files, tmp_path, monkeypatch, stop_after, lora):
    if lora:
        pytest.importorskip("peft")

    def settings(name, **changes):
        options = {"epochs": 4, "dropout": 0.1, "lora": Lora(rank=lora, dropout=0.1 if lora else 0.0), **changes}
        return settings_for(modern_folder, files, "question_answering", tmp_path / name, **options)

    whole = finetune(settings("whole"))
    steps, real = [0], loop._step

    def stopping(run, inputs, optimizers):
        steps[0] += 1
        if steps[0] > stop_after * 6 + 3:  # six steps an epoch, stopped within one
            raise Stopped
        return real(run, inputs, optimizers)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", stopping)
        with pytest.raises(Stopped):
            finetune(settings("cut"))
    with pytest.raises(InputError, match="go on with a run that was stopped by --resume"):
        finetune(settings("cut"))
    with pytest.raises(InputError, match=r"batch_size: 16 -> 8: not as the run began; resume with the same"):
        finetune(settings("cut", batch_size=8, resume=True))
    torch.rand(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + bool(stop_after))  # as another OMP_NUM_THREADS would; the state knows better
    resumed = finetune(settings("cut", resume=True))
    assert torch.get_num_threads() == threads
    assert resumed.scores == whole.scores
    for name in ("final/model.safetensors", "predictions.jsonl"):
        assert (resumed.out / name).read_bytes() == (whole.out / name).read_bytes()
    logs = [
        [{k: v for k, v in line.items() if k != "time"} for line in read(path)]
        for path in (whole.out / "log.jsonl", resumed.out / "log.jsonl")
    ]
    assert logs[0] == logs[1]
    with pytest.raises(InputError, match=r"the run in .* is over"):
        finetune(settings("cut", resume=True))


def test_predictions_of_several_files_name_theirs(modern_folder, files, tmp_path):
    own = files["regression"]
    several = {"regression": {"train": own["train"], "validation": [own["validation"], own["train"]]}}
    run = finetune(settings_for(modern_folder, several, "regression", tmp_path / "run", epochs=1))
    counts = [sum(line["file"] == own[split] for line in read(run.out / "predictions.jsonl")) for split in own]
    assert counts == [len(read(own[split])) for split in own]


def test_training_stops_when_nothing_gets_better(modern_folder, files, tmp_path):
    still = TaskOptimizer(name="adamw", lr=0.0)
    options = {"epochs": 9, "patience": 2, "optimizer": still}
    run = finetune(settings_for(modern_folder, files, "regression", tmp_path / "run", **options))
    lines = read(run.out / "log.jsonl")
    assert sum("validation" in line for line in lines) == 3  # the first, and two that are no better
    assert run.best_epoch == 1


def weights(run, name="model.safetensors"):
    return load_file(run.out / "final" / name)


def test_frozen_layers_keep_their_weights(modern_folder, files, tmp_path):
    options = {"epochs": 1, "frozen_layers": 1}
    run = finetune(settings_for(modern_folder, files, "tagging", tmp_path / "run", **options))
    before = load_file(f"{modern_folder}/model.safetensors")
    after = weights(run)
    for name, tensor in before.items():
        if name in after and "norm" not in name:
            frozen = "tok_embeddings" in name or "layers.0." in name
            assert torch.equal(tensor, after[name]) == frozen, name
    with pytest.raises(InputError, match="frozen_layers is 3, but the model has 2 layers"):
        finetune(settings_for(modern_folder, files, "tagging", tmp_path / "deep", frozen_layers=3))


def test_learning_rates_fall_from_layer_to_layer(modern_folder):
    model = load_classifier(modern_folder, ["a", "b"], SequenceClassifier)
    optimizers = build_optimizers(model, TaskOptimizer(name="adamw", lr=1e-3), rate=layer_rates(model, 0.5))
    rates = {id(p): group["peak_lr"] for group in optimizers[0].param_groups for p in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["classifier.weight"] == by_name["head.dense.weight"] == 1e-3
    assert by_name["encoder.final_norm.weight"] == 1e-3
    assert by_name["encoder.blocks.1.attention.qkv.weight"] == 5e-4
    assert by_name["encoder.blocks.0.feed_forward.up.weight"] == 2.5e-4
    assert by_name["encoder.embeddings.tokens.weight"] == 1.25e-4


def test_adapters_train_little_and_are_merged(modern_folder, files, tmp_path):
    pytest.importorskip("peft")
    options = {"epochs": 6, "lora": Lora(rank=4), "optimizer": TaskOptimizer(name="adamw", lr=2e-2)}
    run = finetune(settings_for(modern_folder, files, "tagging", tmp_path / "run", **options))
    before, after = load_file(f"{modern_folder}/model.safetensors"), weights(run)
    assert torch.equal(
        before["model.embeddings.tok_embeddings.weight"], after["model.embeddings.tok_embeddings.weight"]
    )
    change = after["model.layers.0.attn.Wqkv.weight"] - before["model.layers.0.attn.Wqkv.weight"]
    assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 4
    assert not any("lora" in name for name in after)
    again = predict(PredictSettings(model=str(run.out / "final"), file=files["tagging"]["validation"]))
    written = [line["prediction"] for line in read(run.out / "predictions.jsonl")]
    assert [line["prediction"] for line in again] == written
    assert run.score > 0.5


def test_adapters_of_every_block_learn_and_merge():
    """The last block too, which computes queries at the positions that are read only."""
    pytest.importorskip("peft")
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
    config = preset("bert", "tiny", vocab_size=64, hidden_dropout=0.0, attention_dropout=0.0, **sizes)
    model = SequenceClassifier(config, ["a", "b"])
    merge = add_adapters(model, Lora(rank=2), seed=0)
    batch = TokenBatch.from_sequences([[2, 5, 6, 3], [2, 7, 3]], token_types=[[0, 0, 1, 1], [0, 0, 0]])
    model(batch)[:, 0].sum().backward()
    adapters = {name: part for name, part in model.named_parameters() if "lora_B" in name}
    assert len(adapters) == 2 * 4
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in adapters.values())
    with torch.no_grad():
        for part in adapters.values():
            part.normal_()
        expected = model(batch)
        merge()
        assert not any("lora" in name for name, _ in model.named_parameters())
        torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_weighted_classes_and_all_pieces_change_what_is_learned(modern_folder, files, tmp_path):
    pieces = {}  # three of each word, as the tokenizer takes words apart at a hyphen
    for split, path in files["tagging"].items():
        rows = [{**row, "tokens": [f"{word}-{word}" for word in row["tokens"]]} for row in read(path)]
        pieces[split] = write(tmp_path / f"{split}.jsonl", rows)
    changes = ({}, {"class_weights": "balanced"}, {"label_smoothing": 0.2}, {"layer_decay": 0.5}, {"tag_pieces": "all"})
    runs = [
        finetune(settings_for(modern_folder, {"tagging": pieces}, "tagging", tmp_path / str(i), epochs=1, **options))
        for i, options in enumerate(changes)
    ]
    heads = [weights(run)["classifier.weight"] for run in runs]
    assert all(not torch.equal(heads[0], head) for head in heads[1:])
    for key, value in (("class_weights", "balanced"), ("label_smoothing", 0.1)):
        with pytest.raises(InputError, match=f"{key} is {value}, which is for classes; leave it out for regression"):
            settings_for(modern_folder, files, "regression", tmp_path / "x", **{key: value})


def test_questions_without_answer_are_learned_and_measured_as_squad_2(modern_folder, files, tmp_path):
    found = {}
    for split, path in files["question_answering"].items():
        rows = read(path)
        for row in rows[::2]:
            row["context"] = " ".join(word for word in row["context"].split() if word not in COLOURS)
            row["answers"] = {"text": [], "answer_start": []}
        found[split] = write(tmp_path / f"{split}.jsonl", [row for row in rows if row["context"]])
    found["test"] = files["question_answering"]["validation"]  # of which every question has an answer
    options = {"data": TaskData(**found, unanswerable=True), "epochs": 8, "qa": QuestionAnswering(stride=4)}
    run = finetune(settings_for(modern_folder, files, "question_answering", tmp_path / "run", **options))
    assert "no_answer_exact_match" not in run.scores["test"]
    assert "--file ROWS.jsonl --unanswerable true --qa.stride 4`" in (run.out / "report.md").read_text()
    scores = run.scores["validation"]
    assert scores["no_answer_exact_match"] > 0.8
    assert scores["has_answer_exact_match"] > 0.8
    assert scores["best_squad_f1"] >= scores["squad_f1"]

    def answers(threshold):
        qa = QuestionAnswering(stride=4, null_threshold=threshold)
        asked = PredictSettings(model=str(run.out / "final"), file=found["validation"], unanswerable=True, qa=qa)
        return predict(asked)

    with pytest.raises(InputError, match=r"qa.stride is 17; expected from 0 to 16"):
        predict(
            PredictSettings(model=str(run.out / "final"), file=found["validation"], qa=QuestionAnswering(stride=17))
        )
    plain, shifted = answers(0.0), answers(2.5)
    assert [row["prediction"] for row in plain] == ["" if row["no_answer"] > 0 else row["best_span"] for row in plain]
    assert [row["prediction"] for row in shifted] == [
        "" if row["no_answer"] > 2.5 else row["best_span"] for row in plain
    ]
    assert not any(row["prediction"] == "" for row in answers(1e9))
    assert all(row["prediction"] == "" for row in answers(-1e9))
    options["qa"] = QuestionAnswering(stride=4, null_threshold=1e9)
    never = finetune(settings_for(modern_folder, files, "question_answering", tmp_path / "never", **options))
    lines = read(never.out / "predictions.jsonl")
    assert all(line["prediction"] for line in lines)  # an article alone scores as no answer, but is one
    assert never.scores["validation"]["has_answer_exact_match"] >= scores["has_answer_exact_match"]


def run_rank(rank, port, settings, out):
    """One of two processes, as torchrun starts them; a fork, for which nothing is imported again."""
    torch.set_num_threads(1)  # threads do not survive the fork
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update(place)
    accelerate.state.AcceleratorState._reset_state(True)
    with open(out, "w") as file:
        finetune(settings, console=Console(file=file))


def test_two_processes_train_as_one(modern_folder, files, tmp_path):
    """Dropout 0: the same steps but for the order of summation, with uneven shares of the last batch."""
    options = {"epochs": 2, "batch_size": 19, "micro_batch_tokens": 64}
    one = finetune(settings_for(modern_folder, files, "multiple_choice", tmp_path / "one", **options))
    settings = settings_for(modern_folder, files, "multiple_choice", tmp_path / "two", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=run_rank, args=(rank, port, settings, tmp_path / f"rank-{rank}.txt")) for rank in ("0", "1")
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert "epoch 2/2" in (tmp_path / "rank-0.txt").read_text()
    assert (tmp_path / "rank-1.txt").read_text() == ""
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["validation"]["loss"] == pytest.approx(one.scores["validation"]["loss"], abs=1e-3)
    answers = [read(out / "predictions.jsonl") for out in (one.out, tmp_path / "two")]
    for mine, yours in zip(*answers, strict=True):
        assert mine["row"] == yours["row"]
        np.testing.assert_allclose(mine["probabilities"], yours["probabilities"], atol=1e-2)
    losses = [
        [line["loss"] for line in read(path / "log.jsonl") if "lr" in line] for path in (one.out, tmp_path / "two")
    ]
    np.testing.assert_allclose(*losses, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "columns", "words"),
    [
        ("tagging", Columns(label="tag"), ["no column tag", "present: tokens, tags"]),
        ("question_answering", Columns(text_b="passage"), ["no column passage", "id, question, context, answers"]),
        ("multiple_choice", Columns(choices=["a", "b"]), ["no column a, b", "context, question, choices, label"]),
    ],
)
def test_missing_columns_are_told_by_what_is_there(modern_folder, files, tmp_path, kind, columns, words):
    with pytest.raises(InputError) as caught:
        finetune(settings_for(modern_folder, files, kind, tmp_path / "run", columns=columns))
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "run").exists()
