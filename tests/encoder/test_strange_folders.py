"""Folders of strangers, damaged ones and what has no counterpart here: refused in one line, nothing executed."""

import json

import pytest
import safetensors.torch
import torch
import transformers

from encoderkit.encoder.checkpoint import load, save
from encoderkit.encoder.config import preset
from encoderkit.encoder.containment import check_source
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError


def make_model(architecture: str) -> MaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "max_positions": 200}
    return MaskedLM(preset(architecture, "tiny", vocab_size=331, **sizes)).eval()


def test_pickled_weights_that_run_code_are_refused(tmp_path):
    save(make_model("bert"), tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert torch.equal(load(tmp_path).decoder_bias, weights["cls.predictions.bias"])
    torch.save({**weights, "cls.predictions.bias": RunsCode(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not a model that transformers can open"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_outside_the_folder_is_read(tmp_path):
    save(make_model("bert"), tmp_path / "other")
    for name, fill in {
        "index": lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"cls.predictions.bias": "../other/model.safetensors"}})
        ),
        "link": lambda f: (f / "model.safetensors").symlink_to(tmp_path / "other" / "model.safetensors"),
        "template": lambda f: link(f / "additional_chat_templates" / "x.jinja", tmp_path / "other" / "config.json"),
        "weights below": lambda f: link(f / "below" / "w.safetensors", tmp_path / "other" / "model.safetensors"),
        "adapter": lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}'),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
        fill(folder)
        with pytest.raises(InputError, match=rf"{folder}: .*(expected files of the folder|outside the folder|another)"):
            load(folder)


def link(file, target):
    file.parent.mkdir()
    file.symlink_to(target)


SECRET = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "secret"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"vocab": "secret.txt"}),
        ("tokenizer_config.json", {"init_inputs": ["secret.txt"]}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "GemmaTokenizer", "vocab_file": "v.json", "merges_file": "m.txt"},
        ),
        ("special_tokens_map.json", {"vocab": "secret.txt"}),
        ("special_tokens_map.json", {"vocab_file": "secret.txt"}),
        ("special_tokens_map.json", {"tokenizer_file": "tokenizer.json"}),
    ],
)
def test_vocabularies_outside_the_folder_are_not_read(name, fields, tmp_path):
    """Arguments of a tokenizer's class, which come from files of the folder."""
    (tmp_path / "secret.txt").write_text("".join(f"{token}\n" for token in SECRET))
    (tmp_path / "v.json").write_text(json.dumps({token: i for i, token in enumerate(SECRET)}))
    (tmp_path / "m.txt").write_text("#version: 0.2\n")
    transformers.BertTokenizer(str(tmp_path / "secret.txt")).save_pretrained(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    check_source(str(folder))
    outside = json.dumps({"tokenizer_class": "BertTokenizer", **fields})
    for file in ("secret.txt", "v.json", "m.txt", "tokenizer.json"):
        outside = outside.replace(f'"{file}"', json.dumps(str(tmp_path / file)))
    (folder / name).write_text(outside)
    with pytest.raises(InputError, match=rf"^{folder}: {name} (has|names) .*; expected"):
        check_source(str(folder))
    assert "secret" in transformers.AutoTokenizer.from_pretrained(folder).get_vocab()  # the payload is live


def test_paths_that_old_tokenizers_left_behind_are_let_through(tmp_path):
    left = {"tokenizer_file": "/root/tokenizer.json", "special_tokens_map_file": "/root/map.json", "init_inputs": []}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(left))
    check_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors.index.json", {"weight_map": ["a"]}, "has a weight_map of type list; expected an object"),
        ("model.safetensors.index.json", {"weight_map": {"a": []}}, r"names \[\]; expected files"),
        ("tokenizer_config.json", {"fast_tokenizer_files": 5}, "has 5; expected a list of files"),
        ("tokenizer_config.json", {"gguf_file": "/x.gguf"}, "has gguf_file /x.gguf; expected a vocabulary"),
        ("config.json", None, "cannot be read: No such file or directory"),
    ],
)
def test_malformed_folders_are_told_in_one_line(name, content, message, tmp_path):
    if content is None:
        (tmp_path / name).symlink_to("nothing")
    else:
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"^{tmp_path}: .*{name} {message}[^\n]*$"):
        check_source(str(tmp_path))


def test_the_hubs_own_links_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    model = make_model("bert")
    save(model, snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert torch.equal(load(snapshot).decoder_bias, model.decoder_bias)


def test_attention_from_the_hub_is_not_fetched(tmp_path, monkeypatch):
    from transformers.modeling_utils import PreTrainedModel

    save(make_model("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    evil = {"_attn_implementation": "someone/kernel:run", "attn_implementation": "someone/kernel:run"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **evil}))
    asked = []
    real = PreTrainedModel.get_correct_attn_implementation
    monkeypatch.setattr(
        PreTrainedModel,
        "get_correct_attn_implementation",
        lambda self, name, *rest, **more: asked.append(name) or real(self, name, *rest, **more),
    )
    load(tmp_path)
    assert asked
    assert not any("someone" in str(name) for name in asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "model.hidden_size 64 over model.num_heads 5"),
        ({"layer_norm_eps": -1.0}, "model.norm_eps is -1.0; expected a positive number"),
        ({"max_position_embeddings": 10**13}, "model.max_positions is 10000000000000; expected at most 67,108,864"),
        ({"is_decoder": True}, "is_decoder is True; expected False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; expected 'absolute'"),
    ],
)
def test_odd_configurations_are_told_with_their_folder(change, message, tmp_path):
    save(make_model("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=rf"^{tmp_path}: {message}"):
        load(tmp_path)


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'gelu' or"),
        ({"model_type": "gpt2"}, "model type 'gpt2'; expected one of bert, roberta, xlm-roberta, modernbert"),
    ],
)
def test_unknown_architecture_is_refused_by_name(change, message, tmp_path):
    save(make_model("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_two_dropouts_of_hidden_layers_are_refused(tmp_path):
    save(make_model("modern"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "embedding_dropout": 0.1, "mlp_dropout": 0.2}))
    with pytest.raises(InputError, match=r"embedding_dropout is 0\.1, mlp_dropout 0\.2; expected one number"):
        load(tmp_path)


def test_missing_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load(tmp_path / "nothing")


def test_missing_weights_are_told(tmp_path):
    save(make_model("bert"), tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for encoder.blocks.1.feed_forward.down.weight"):
        load(tmp_path)
