"""Every kind of task: encoding, losses, answers, and the classes of transformers that open what is exported."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import classifier_kind, load_classifier, save_classifier
from encoderkit.encoder.classifier import CLASSIFIERS, ChoiceClassifier, SequenceClassifier, SpanClassifier
from encoderkit.encoder.config import LocalAttention, preset
from encoderkit.finetune.encoding import encode_windows, encode_words
from encoderkit.finetune.examples import ChoiceExample, QuestionExample, TaggedExample, TextExample
from encoderkit.finetune.settings import QuestionAnswering
from encoderkit.finetune.task_head import Limits
from encoderkit.finetune.task_heads import HEADS, head_of
from encoderkit.kernels.errors import InputError

LOGITS_FP32 = 2e-6  # one forward pass in fp32 in another order of summation
QUESTIONS = ["who sees the cat", "is the bird red", "the dog"]
CONTEXTS = ["the red dog sees a cat and the blue bird likes one tree " * 3, "a bird is blue", "two dog eats"]
SENTENCES = [["the", "redcat", "sees"], ["a", "\u0000", "dog"], ["bird"] * 40]


def padded(tokenizer, ids, types=None):
    batch = {"input_ids": ids} | ({} if types is None else {"token_type_ids": types})
    return tokenizer.pad(batch, return_tensors="pt")


def outputs(model, encoded):
    with torch.inference_mode():
        return model(encoded.batch(np.arange(len(encoded))))


@pytest.mark.parametrize("stride", [0, 7])
def test_packed_windows_give_the_logits_of_transformers_question_answering(model_folder, tokenizer, tmp_path, stride):
    model = load_classifier(model_folder, ["start", "end"], SpanClassifier, seed=3)
    save_classifier(model, tmp_path, tokenizer)
    native = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    types = model.config.token_types > 1
    windows = encode_windows(tokenizer, list(QUESTIONS), CONTEXTS, max_tokens=24, stride=stride, token_types=types)
    theirs = tokenizer(
        QUESTIONS,
        CONTEXTS,
        truncation="only_second",
        max_length=24,
        stride=stride,
        return_overflowing_tokens=True,
        padding=True,
        return_token_type_ids=types,
        return_tensors="pt",
    )
    origins = theirs.pop("overflow_to_sample_mapping")
    assert windows.encoded.origins.tolist() == origins.tolist()
    assert len(origins) > len(QUESTIONS)
    ours = outputs(model, windows.encoded)
    with torch.inference_mode():
        native_out = native(**theirs)
    real = theirs["attention_mask"].bool()
    for i, scores in enumerate((native_out.start_logits, native_out.end_logits)):
        torch.testing.assert_close(ours[:, i], scores[real], atol=LOGITS_FP32, rtol=LOGITS_FP32)
    again = load_classifier(tmp_path, kind=classifier_kind(tmp_path))
    assert torch.equal(outputs(again, windows.encoded), ours)


def test_exported_folders_give_the_logits_of_transformers_own_classes(model_folder, tokenizer, tmp_path):
    for kind, outputs_of in (("tagging", ["O", "B-x", "I-x"]), ("multiple_choice", ["score"])):
        head = HEADS[kind]
        model = load_classifier(model_folder, outputs_of, head.model_class, seed=3)
        save_classifier(model, tmp_path / kind, tokenizer)
        assert classifier_kind(tmp_path / kind) is head.model_class
        types = model.config.token_types > 1
        if kind == "tagging":
            native = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / kind).eval()
            encoded, _ = encode_words(tokenizer, SENTENCES[:1], max_tokens=30, token_types=types)
            batch = tokenizer(SENTENCES[:1], is_split_into_words=True, return_tensors="pt", return_token_type_ids=types)
            firsts = [1, 2, 3]  # redcat is one unknown token
            with torch.inference_mode():
                expected = native(**batch).logits[0, firsts]
            assert native.config.id2label == {0: "O", 1: "B-x", 2: "I-x"}
        else:
            native = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path / kind).eval()
            choices = ["red", "blue bird", "the green tree"]
            example = ChoiceExample(1, "the cat is", choices, 0)
            encoded = head([], Limits(30, types)).prepare(tokenizer, [example]).encoded
            assert (len(encoded), encoded.read_starts().tolist()) == (1, [0, 3])
            batch = tokenizer(
                ["the cat is"] * 3, choices, padding=True, return_tensors="pt", return_token_type_ids=types
            )
            with torch.inference_mode():
                expected = native(**{name: part[None] for name, part in batch.items()}).logits.T
        torch.testing.assert_close(outputs(model, encoded), expected, atol=LOGITS_FP32, rtol=LOGITS_FP32)


def test_heads_of_encoders_without_a_native_class_are_exported_with_code(tokenizer, tmp_path):
    config = preset(
        "bert", "tiny", vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
        positions="rope", feed_forward="swiglu", local_attention=LocalAttention(window_tokens=4, global_every=2),
    )  # fmt: skip
    batch = tokenizer(["the red cat", "a dog"], padding=True, return_tensors="pt")
    packed = TokenBatch.from_padded(batch["input_ids"], batch["attention_mask"])
    for head, kind in CLASSIFIERS.items():
        torch.manual_seed(0)
        model = kind(config, ["start", "end"] if head == "spans" else ["score"]).eval()
        save_classifier(model, tmp_path / head, tokenizer)
        assert (tmp_path / head / "modeling_encoderkit.py").exists()
        again = load_classifier(tmp_path / head, kind=kind)
        ours = TokenBatch.from_sequences(
            [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        )
        ours = packed if head in ("tokens", "spans") else ours
        with torch.inference_mode():
            assert torch.equal(model(ours), again(ours))
    native = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "spans").eval()
    choice = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path / "choice").eval()
    tokens = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "tokens").eval()
    real = batch["attention_mask"].bool()
    with torch.inference_mode():
        spans = load_classifier(tmp_path / "spans", kind=SpanClassifier)(packed)
        torch.testing.assert_close(native(**batch).start_logits[real], spans[:, 0], atol=LOGITS_FP32, rtol=LOGITS_FP32)
        assert choice(**{name: part[None] for name, part in batch.items()}).logits.shape == (1, 2)
        assert tokens(**batch).logits.shape == (2, 5, 1)


def test_a_folder_of_another_task_is_refused(modern_folder, tokenizer, tmp_path):
    with pytest.raises(InputError, match="holds ModernBertForMaskedLM; expected a fine-tuned model"):
        classifier_kind(modern_folder)
    save_classifier(load_classifier(modern_folder, ["score"], ChoiceClassifier), tmp_path, tokenizer)
    with pytest.raises(InputError, match="holds ModernBertForMultipleChoice; expected a model for Sequence"):
        load_classifier(tmp_path)


def test_words_are_tokenized_as_transformers_tokenizes_split_words(tokenizer):
    words = [["the", "red-cat", "sees"], ["a", "dog"]]
    encoded, read_words = encode_words(tokenizer, words, max_tokens=30, token_types=False)
    theirs = tokenizer(words, is_split_into_words=True)
    assert encoded.token_ids.tolist() == [i for ids in theirs["input_ids"] for i in ids]
    ids = [theirs.word_ids(i) for i in range(2)]
    firsts = [[w is not None and w != before for w, before in zip(row, [None, *row])] for row in ids]
    assert encoded.reads.tolist() == [first for row in firsts for first in row]
    assert read_words.tolist() == [0, 1, 2, 3, 4]
    every, every_word = encode_words(tokenizer, words, max_tokens=30, token_types=False, all_pieces=True)
    assert every.reads.tolist() == [word is not None for row in ids for word in row]
    assert every_word.tolist() == [0, 1, 1, 1, 2, 3, 4]


def test_long_sentences_are_cut_between_words_and_every_word_is_read(tokenizer):
    encoded, read_words = encode_words(tokenizer, SENTENCES, max_tokens=12, token_types=False)
    assert read_words.tolist() == list(range(46))
    assert encoded.lengths().max() <= 12
    assert encoded.origins.tolist() == [0, 1, 2, 2, 2, 2]
    unknown = tokenizer.unk_token_id  # what a control character becomes
    assert encoded.token_ids[encoded.starts[1] : encoded.starts[2]].tolist()[2] == unknown


def test_windows_cover_the_context_and_know_where_tokens_stand(tokenizer):
    windows = encode_windows(tokenizer, list(QUESTIONS), CONTEXTS, max_tokens=24, stride=7, token_types=False)
    encoded = windows.encoded
    assert encoded.lengths().max() <= 24
    seen = set()
    for i in np.flatnonzero(encoded.origins == 0):
        a, b = encoded.starts[i : i + 2]
        for token, (first, last) in zip(encoded.token_ids[a:b], windows.offsets[a:b]):
            if first >= 0:
                assert CONTEXTS[0][first:last] == tokenizer.convert_ids_to_tokens(int(token))
                seen.add(int(first))
    assert len(seen) == len(CONTEXTS[0].split())
    long = encode_windows(tokenizer, ["the cat " * 30], ["a dog"], max_tokens=32, stride=4, token_types=False)
    assert (long.encoded.truncated, long.encoded.cut_tokens) == (1, 60 - 8)
    assert long.encoded.lengths().tolist() == [8 + 2 + 3]


def question_head(tokenizer, examples, *, unanswerable=False, **qa):
    head = HEADS["question_answering"]([], Limits(24, False, qa=QuestionAnswering(**qa)), unanswerable=unanswerable)
    return head, head.prepare(tokenizer, examples)


def test_answers_become_the_tokens_that_hold_them(tokenizer):
    context = CONTEXTS[0]
    start = context.index("blue bird", 60)
    examples = [
        QuestionExample(1, "a", "who", context, [("blue bird", start)]),
        QuestionExample(2, "n", "who", context, []),
    ]
    head, prepared = question_head(tokenizer, examples)
    told = 0
    for i, (first, last) in enumerate(prepared.targets):
        a = prepared.encoded.starts[i]
        if prepared.encoded.origins[i] == 1 or first == 0:
            assert (first, last) == (0, 0)
            continue
        offsets = prepared.extra[a : prepared.encoded.starts[i + 1]]
        assert context[offsets[first][0] : offsets[last][1]] == "blue bird"
        told += 1
    assert told >= 1
    logits = torch.randn(len(prepared.encoded.token_ids), 2, generator=torch.Generator().manual_seed(0))
    everything = np.arange(len(prepared.encoded))
    ours = head.loss(
        logits, torch.from_numpy(prepared.targets), head.sizes(prepared.encoded, everything), training=True
    )
    by_hand = 0.0
    for i, row in enumerate(prepared.targets):
        part = logits[prepared.encoded.starts[i] : prepared.encoded.starts[i + 1]]
        by_hand += sum(float(F.cross_entropy(part[:, j][None], torch.tensor([row[j]]))) for j in (0, 1)) / 2
    assert float(ours) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("unanswerable", [False, True])
def test_the_best_span_is_the_best_of_all_spans(tokenizer, unanswerable):
    examples = [QuestionExample(i, f"q{i}", q, c, None) for i, (q, c) in enumerate(zip(QUESTIONS, CONTEXTS))]
    head, prepared = question_head(tokenizer, examples, unanswerable=unanswerable, n_best=24, max_answer_tokens=3)
    logits = torch.randn(len(prepared.encoded.token_ids), 2, generator=torch.Generator().manual_seed(1))
    answers = head.answers(prepared, logits)
    for number, (example, answer) in enumerate(zip(examples, answers)):
        best, null = (-np.inf, ""), np.inf
        for i in np.flatnonzero(prepared.encoded.origins == number):
            a, b = prepared.encoded.starts[i : i + 2]
            null = min(null, float(logits[a].sum()))
            for first in range(a, b):
                for last in range(first, min(first + 3, b)):
                    if prepared.extra[first, 0] >= 0 and prepared.extra[last, 0] >= 0:
                        text = example.context[prepared.extra[first, 0] : prepared.extra[last, 1]]
                        best = max(best, (float(logits[first, 0] + logits[last, 1]), text))
        if unanswerable:
            assert answer["best_span"] == best[1]
            assert answer["no_answer"] == pytest.approx(null - best[0], abs=1e-5)
            assert answer["prediction"] == ("" if null > best[0] else best[1])
        else:
            assert answer["prediction"] == best[1]
        assert sum(item["probability"] for item in answer["n_best"]) == pytest.approx(1, abs=1e-6)


def test_choices_of_different_numbers_are_compared_among_themselves(tokenizer):
    examples = [ChoiceExample(1, "the", ["cat", "dog"], 1), ChoiceExample(2, "a", ["red", "blue", "green", "two"], 2)]
    head = HEADS["multiple_choice"]([], Limits(16, False))
    prepared = head.prepare(tokenizer, examples)
    logits = torch.tensor([[0.1], [1.0], [2.0], [0.5], [3.0], [0.0]])
    sizes = head.sizes(prepared.encoded, np.arange(2))
    assert sizes == [2, 4]
    loss = head.loss(logits, torch.from_numpy(prepared.targets), sizes, training=True)
    by_hand = F.cross_entropy(logits[None, :2, 0], torch.tensor([1])) + F.cross_entropy(
        logits[None, 2:, 0], torch.tensor([2])
    )
    assert float(loss) == pytest.approx(float(by_hand))
    assert [answer["prediction"] for answer in head.answers(prepared, logits)] == [1, 2]
    long = ChoiceExample(1, "the cat " * 4, ["a dog", "a bird"], 0)
    cut = HEADS["multiple_choice"]([], Limits(8, False)).prepare(tokenizer, [long, *examples])
    assert cut.encoded.truncated == 1  # of three, though both of its choices were cut
    pieces = list(prepared.encoded.pieces(np.arange(2), 1))
    assert [piece.tolist() for piece in pieces] == [[0], [1]]  # a question's choices stay together


def test_weighted_and_smoothed_loss_is_torch_s_own(tokenizer):
    head = HEADS["classification"](["a", "b", "c"], Limits(16, False))
    targets = np.array([0, 0, 0, 1, 1, 2])
    head.balance(targets)
    assert head.weights.tolist() == pytest.approx([6 / 9, 6 / 6, 6 / 3])
    head.smoothing = 0.1
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    ours = head.loss(logits, torch.from_numpy(targets), [], training=True) / head.weight(targets, training=True)
    theirs = F.cross_entropy(logits, torch.from_numpy(targets), weight=head.weights, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    plain = head.loss(logits, torch.from_numpy(targets), [], training=False) / head.weight(targets, training=False)
    torch.testing.assert_close(plain, F.cross_entropy(logits, torch.from_numpy(targets)))


def test_several_labels_and_scores_have_transformers_losses(modern_folder, tokenizer, tmp_path):
    texts = ["the red cat", "a dog", "two bird"]
    for kind, names, found in (("multi_label", ["a", "b"], [(0,), (), (0, 1)]), ("regression", [], [1.0, 2.5, 0.0])):
        head = HEADS[kind](names, Limits(16, False))
        prepared = head.prepare(
            tokenizer, [TextExample(i, text, None, label) for i, (text, label) in enumerate(zip(texts, found))]
        )
        model = load_classifier(modern_folder, head.outputs, SequenceClassifier, seed=1)
        model.problem_type = head.problem_type
        save_classifier(model, tmp_path / kind, tokenizer)
        native = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / kind).eval()
        assert native.config.problem_type == head.problem_type
        assert head_of(load_classifier(tmp_path / kind)) is HEADS[kind]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        targets = torch.from_numpy(prepared.targets)
        with torch.inference_mode():
            theirs = native(**batch, labels=targets).loss
        ours = head.loss(outputs(model, prepared.encoded), targets, [], training=True) / head.weight(
            prepared.targets, training=True
        )
        torch.testing.assert_close(ours, theirs.float(), atol=LOGITS_FP32, rtol=LOGITS_FP32)


def test_tags_are_told_by_first_pieces_whatever_was_learned(tokenizer):
    examples = [TaggedExample(1, ["the", "red-cat"], [0, 1]), TaggedExample(2, ["dog"], [2])]
    for pieces in ("first", "all"):
        head = HEADS["tagging"](["O", "B-x", "I-x"], Limits(16, False, pieces))
        prepared = head.prepare(tokenizer, examples)
        assert prepared.targets.tolist() == ([0, 1, 2] if pieces == "first" else [0, 1, 1, 1, 2])
        logits = F.one_hot(torch.tensor([0, 1, 2] if pieces == "first" else [0, 1, 0, 0, 2]), 3).float()
        assert [a["prediction"] for a in head.answers(prepared, logits)] == [["O", "B-x"], ["I-x"]]
        assert json.dumps(head.answers(prepared, logits))
        assert prepared.targets_of(np.array([1])).tolist() == [2]
