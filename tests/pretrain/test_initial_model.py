"""Going on with a pretrained model: its weights, more tokens, longer sequences, and what does not fit."""

import dataclasses
import json
import math
import shutil

import pytest
import tiny_run
import torch
import transformers
from tiny_run import read_log, stop_before

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import load, save
from encoderkit.encoder.config import RopeScaling, preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.initial_model import check_tokenizer, plan_model
from encoderkit.pretrain.job import build_job
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.settings import Budget, Model, PretrainSettings
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import load_tokenizer, train_tokenizer

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "max_positions": 128}


def make_settings(store, out, model, steps) -> PretrainSettings:
    return tiny_run.make_settings(store, out, model=model, budget=Budget(steps=steps))


@pytest.fixture(scope="module")
def bert(small_store, tmp_path_factory):
    """The final folder of a short run."""
    out = tmp_path_factory.mktemp("pretrained") / "bert"
    return pretrain(make_settings(small_store, out, Model(preset="bert", **SIZES), 8))


@pytest.fixture(scope="module", params=["bert", "roberta", "modern"])
def pretrained(request, bert, small_store, tmp_path_factory):
    if request.param == "bert":
        return bert
    out = tmp_path_factory.mktemp("pretrained") / request.param
    return pretrain(make_settings(small_store, out, Model(preset=request.param, **SIZES), 8))


def build(model: Model, store):
    store = Store.open(store)
    return plan_model(PretrainSettings(model=model), store, load_tokenizer(store.tokenizer_folder))[1]()


def test_continued_run_begins_where_the_pretrained_one_ended(pretrained, small_store, tmp_path):
    before = next(record for record in read_log(pretrained.parent) if record["kind"] == "end")
    pretrain(make_settings(small_store, tmp_path / "on", Model(init_from=str(pretrained)), 3))
    first = next(record for record in read_log(tmp_path / "on") if record["kind"] == "validation")
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(before["loss"], abs=1e-6)


def test_resumed_continued_run_does_not_need_what_it_began_with(bert, small_store, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    settings = make_settings(small_store, tmp_path / "whole", Model(init_from=str(folder)), 12)
    whole = pretrain(settings)
    settings = dataclasses.replace(settings, out=str(tmp_path / "cut"))
    with stop_before(9):
        pretrain(settings)
    shutil.rmtree(folder)
    resumed = pretrain(settings, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_new_tokens_begin_at_the_mean_of_their_pieces(pretrained, small_store, tmp_path):
    old = load_tokenizer(pretrained)
    longer = load_tokenizer(pretrained)
    assert longer.add_tokens(["catdog", "zzz999"]) == 2
    longer.save_pretrained(tmp_path / "tokenizer")
    text = "\n\n".join("the catdog sees a red house and the old tree likes zzz999" for _ in range(40))
    (tmp_path / "text.txt").write_text(text)
    prepare([str(tmp_path / "text.txt")], tokenizer=tmp_path / "tokenizer", out=tmp_path / "store", held_out=0.2)

    before, after = load(pretrained), build(Model(init_from=str(pretrained)), tmp_path / "store")
    assert after.config.vocab_size == before.config.vocab_size + 2 == len(longer)
    rows, new_rows = (model.encoder.embeddings.tokens.weight for model in (before, after))
    assert torch.equal(new_rows[: len(old)], rows[: len(old)])
    assert torch.equal(after.decoder_bias[: len(old)], before.decoder_bias)
    pieces = old("catdog", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    assert torch.equal(new_rows[len(old)], rows[pieces].mean(0))
    assert torch.equal(after.decoder_bias[len(old)], before.decoder_bias[pieces].mean())

    final = pretrain(make_settings(tmp_path / "store", tmp_path / "on", Model(init_from=str(pretrained)), 2))
    native = transformers.AutoModelForMaskedLM.from_pretrained(final)
    assert native.config.vocab_size == len(longer) == len(transformers.AutoTokenizer.from_pretrained(final))


def test_untied_decoder_gets_new_tokens_too(small_store, tmp_path):
    old, longer = (load_tokenizer(Store.open(small_store).tokenizer_folder) for _ in range(2))
    torch.manual_seed(0)
    before = MaskedLM(preset("bert", "tiny", vocab_size=len(old), tied_decoder=False, **SIZES)).eval()
    save(before, tmp_path / "before", old)
    longer.add_tokens(["catdog"])
    longer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n\n".join("the catdog sees a red house and the old tree" for _ in range(40)))
    prepare([str(tmp_path / "text.txt")], tokenizer=tmp_path / "tokenizer", out=tmp_path / "store", held_out=0.2)

    after = build(Model(init_from=str(tmp_path / "before")), tmp_path / "store").eval()
    assert not after.config.tied_decoder
    pieces = old("catdog", add_special_tokens=False)["input_ids"]
    for rows, new_rows in (
        (before.decoder.weight, after.decoder.weight),
        (before.encoder.embeddings.tokens.weight, after.encoder.embeddings.tokens.weight),
    ):
        assert torch.equal(new_rows[: len(old)], rows[: len(old)])
        assert torch.equal(new_rows[len(old)], rows[pieces].mean(0))
    assert not torch.equal(after.decoder.weight, after.encoder.embeddings.tokens.weight)
    save(after, tmp_path / "after", longer)
    again = load(tmp_path / "after")
    batch = TokenBatch.from_sequences([longer("the catdog sees a house")["input_ids"]])
    assert again.config == after.config
    assert torch.equal(again.logits(batch), after.logits(batch))
    save(again, tmp_path / "again", longer)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("after", "again")]
    assert files[0] == files[1]


def test_longer_sequences_leave_short_ones_alone(pretrained, small_store):
    before = load(pretrained)
    after = build(Model(init_from=str(pretrained), max_positions=300), small_store).eval()
    assert after.config.max_positions == 300
    short = TokenBatch.from_sequences([[2, 7, 4, 9, 3], [2, *[8] * 126, 3]])
    with torch.no_grad():
        assert torch.equal(after.logits(short), before.logits(short))
        assert after.logits(TokenBatch.from_sequences([[7] * 300])).isfinite().all()
    if before.config.positions == "learned":
        table = after.encoder.positions.table.weight
        assert torch.equal(table[128:256], table[:128])


def test_rotary_positions_can_be_stretched(small_store, tmp_path):
    tokenizer, folder = load_tokenizer(Store.open(small_store).tokenizer_folder), tmp_path / "model"
    save(MaskedLM(preset("modern", "tiny", vocab_size=len(tokenizer), **SIZES)), folder, tokenizer)
    scaling = RopeScaling(kind="linear", factor=2.0)
    model = build(
        Model(init_from=str(folder), max_positions=256, rope_scaling=scaling, hidden_dropout=0.2), small_store
    )
    assert (model.config.rope_scaling, model.config.hidden_dropout) == (scaling, 0.2)
    model = build(Model(init_from=str(folder), rope_base=1e6, local_rope_base=2e4), small_store)
    assert (model.config.rope_base, model.config.local_attention.rope_base) == (1e6, 2e4)


def test_encoder_without_a_head_begins_at_the_unigram(small_store, tmp_path):
    tokenizer = load_tokenizer(Store.open(small_store).tokenizer_folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    pretrain(make_settings(small_store, tmp_path / "run", Model(init_from=str(tmp_path / "encoder")), 1))
    start, first = (
        next(record for record in read_log(tmp_path / "run") if record["kind"] == kind)
        for kind in ("start", "validation")
    )
    assert first["loss"] == pytest.approx(start["unigram_entropy"], abs=0.1)
    assert first["loss"] < math.log(len(tokenizer)) - 0.5


def test_tokenizer_that_does_not_fit_is_refused(bert, tmp_path):
    texts = ["the quick brown fox jumps over the lazy dog and runs home again"] * 50
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    train_tokenizer("wordpiece", texts, 60, lowercase=True, out=tmp_path / "other")
    prepare([str(tmp_path / "text.txt")], tokenizer=tmp_path / "other", out=tmp_path / "store", held_out=0.2)
    with pytest.raises(InputError, match=r"its token .* in the store's tokenizer it is .*; prepare the store with"):
        pretrain(make_settings(tmp_path / "store", tmp_path / "run", Model(init_from=str(bert)), 1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda old, new: new.backend_tokenizer.normalizer.__setattr__("lowercase", False), "has another normalizer"),
        (lambda old, new: setattr(new, "mask_token", "the"), "its mask_token is '.MASK.', that of the store's"),
    ],
)
def test_tokenizer_that_cuts_otherwise_is_refused(change, message, bert):
    old, new = load_tokenizer(bert), load_tokenizer(bert)
    change(old, new)
    with pytest.raises(InputError, match=message):
        check_tokenizer(str(bert), old, new)


def test_folder_whose_model_and_tokenizer_differ_is_refused(bert, small_store, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "pad_token_id": 1}))
    with pytest.raises(InputError, match="its tokenizer pads with 0, its model with 1"):
        build(Model(init_from=str(tmp_path / "bert")), small_store)


def test_run_stopped_before_its_first_checkpoint_begins_anew(bert, small_store, tmp_path, monkeypatch):
    import encoderkit.pretrain.loop as loop

    settings = make_settings(small_store, tmp_path / "cut", Model(init_from=str(bert)), 3)
    monkeypatch.setattr(loop, "train_step", lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        pretrain(settings)
    monkeypatch.undo()
    pretrain(settings, resume=True)
    pretrain(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    cut, whole = (
        [(r["kind"], r["step"], r.get("loss")) for r in read_log(tmp_path / name)] for name in ("cut", "whole")
    )
    assert cut == whole


def test_a_trained_head_with_a_zero_bias_is_kept(small_store, tmp_path):
    tokenizer = load_tokenizer(Store.open(small_store).tokenizer_folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not build(Model(init_from=str(tmp_path)), small_store).decoder_bias.any()


def test_gradient_checkpointing_and_pairs_reach_the_job(bert, small_store, tmp_path):
    tokenizer = load_tokenizer(bert)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "pairs")
    tokenizer.save_pretrained(tmp_path / "pairs")
    settings = make_settings(small_store, tmp_path / "run", Model(init_from=str(tmp_path / "pairs")), 1)
    job = build_job(dataclasses.replace(settings, gradient_checkpointing=True), resume=False)
    job.run.close()
    assert job.model.encoder.checkpoint_blocks
    trained = {name.split(".")[0] for name, p in job.model.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "head", "decoder_bias"}  # an unused parameter would stop two ranks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "model.num_layers is 3, but model.init_from .* brings its own"),
        ({"preset": "bert"}, "model.preset is 'bert', but model.init_from"),
        ({"token_vectors": "cooccurrence"}, "model.token_vectors is 'cooccurrence', but model.init_from"),
        ({"max_positions": 64}, "model.max_positions is 64; model.init_from has 128, expected at least that"),
        ({"rope_base": 1e4}, "model.rope_base is set, but model.positions is learned"),
        ({"init_from": "./nowhere"}, "nowhere: no such model folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(changes, message, bert, small_store):
    with pytest.raises(InputError, match=message):
        build(Model(**{"init_from": str(bert), **changes}), small_store)
