"""Files from a stranger: nothing in them is executed, nothing outside their folder is read.

Each payload is shown to be live: with the guard taken away (by a monkeypatch, or by asking the library beneath without
it) it runs, reads or fills memory. What a loader allows in detail is tested beside it:
tests/encoder/test_strange_folders.py, tests/pretrain/test_checkpoint.py, test_command_line.py (YAML), test_corpora.py.
"""

import contextlib
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
import yaml

from encoderkit.encoder import containment
from encoderkit.encoder.checkpoint import load, load_classifier, load_transformers
from encoderkit.finetune.__main__ import main as finetune
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import tokenizer as tokenizer_module
from encoderkit.pretrain.__main__ import main as pretrain
from encoderkit.pretrain.checkpoint import _sealed
from encoderkit.pretrain.corpus_files import file_hash
from encoderkit.pretrain.store import Store, describe_files
from encoderkit.pretrain.tokenizer import load_tokenizer


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def command(main, *argv):
    """A loader of a folder: the command with {} for it; InputError where the command told of bad input."""

    def opened(folder, things, out):
        paths = {name: str(path) for name, path in vars(things).items()}
        words = [word.format(folder, out=out, **paths) for word in argv]
        if status := main(words):
            raise InputError(f"status {status}") if status == 2 else AssertionError(f"status {status}")

    return opened


def sentence(folder, things, out):
    pytest.importorskip("sentence_transformers")
    pairs = ("--data.train={task}", "--columns.text=text", "--columns.text_b=text", "--max_tokens=16")
    command(finetune, "sentence", "{}", *pairs, "--out={out}")(folder, things, out)


SMALL = ["--batch_tokens=1024", "--micro_batch_tokens=1024", "--data.workers=0"]
MODELS = {
    "load": lambda folder, things, out: load(folder),
    "load_transformers": lambda folder, things, out: load_transformers(folder),
    "eval": command(pretrain, "eval", "{}", "--store", "{store}"),
    "pretrain": command(
        pretrain, "run", "--model.init_from={}", "--data.store={store}", "--budget.steps=1", "--out={out}", *SMALL
    ),
    "fill": command(finetune, "fill", "{}", "--text", "a [MASK]"),
    "finetune": command(
        finetune, "run", "{}", "--data.train", "{task}", "--epochs", "1", "--max_tokens", "16", "--out", "{out}"
    ),
    "sentence": sentence,
}
CLASSIFIERS = {
    "load_classifier": lambda folder, things, out: load_classifier(folder),
    "predict": command(finetune, "predict", "{}", "--texts", "a cat"),
}
LOADERS = [*((name, "model", loader) for name, loader in MODELS.items())]
LOADERS += [(name, "classifier", loader) for name, loader in CLASSIFIERS.items()]
each_loader = pytest.mark.parametrize(("kind", "opened"), [row[1:] for row in LOADERS], ids=[row[0] for row in LOADERS])


@pytest.fixture
def hostile(things, tmp_path):
    """A copy of a good folder, to be made hostile."""

    def copy(kind):
        return shutil.copytree(getattr(things, kind), tmp_path / "hostile")

    return copy


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@each_loader
def test_pickles_are_not_run(name, kind, opened, hostile, things, tmp_path):
    folder = hostile(kind)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save({"bert.pooler.dense.bias": RunsCode(tmp_path / "ran")}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    of_weights = (MODELS["load"], MODELS["load_transformers"], CLASSIFIERS["load_classifier"])
    is_read = name != "tokenizer.json" or opened not in of_weights
    with pytest.raises(InputError) if is_read else contextlib.nullcontext():
        opened(folder, things, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    if name == "pytorch_model.bin":  # the payload is live
        torch.load(folder / name, weights_only=False)
        assert (tmp_path / "ran").exists()


EVIL = """
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
open({ran!r}, "w").close()
class EvilConfig(BertConfig):
    model_type = "evil"
class Evil(BertForMaskedLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForMaskedLM": "evil.Evil",
    "AutoModelForPreTraining": "evil.Evil",
    "AutoModelForSequenceClassification": "evil.Evil",
    "AutoTokenizer": [None, "evil.EvilTokenizer"],
}


@pytest.mark.parametrize("model_type", ["bert", "evil"])
@each_loader
def test_code_in_the_folder_is_not_run(model_type, kind, opened, hostile, things, tmp_path, monkeypatch):
    folder = hostile(kind)
    (folder / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    change_json(folder / "config.json", auto_map=AUTO_MAP, model_type=model_type)
    change_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer")
    if model_type == "evil":
        with pytest.raises(InputError):
            opened(folder, things, tmp_path / "out")
    else:
        opened(folder, things, tmp_path / "out")  # a Bert, read by transformers' own class
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)  # the payload is live
    assert (tmp_path / "ran").exists()


@each_loader
def test_attention_is_not_fetched_from_the_hub(kind, opened, hostile, things, tmp_path, monkeypatch):
    folder = hostile(kind)
    evil = "someone/kernel:run"
    change_json(
        folder / "config.json", _attn_implementation=evil, attn_implementation=evil, _attn_implementation_internal=evil
    )
    fetched = []

    def fetch(name, *rest, **more):
        fetched.append(name)
        raise ImportError(name)

    for module in ("integrations.hub_kernels", "modeling_utils", "modeling_flash_attention_utils"):
        monkeypatch.setattr(f"transformers.{module}.load_and_register_attn_kernel", fetch, raising=False)
    opened(folder, things, tmp_path / "out")
    assert fetched == []
    with pytest.raises(ImportError):  # the payload is live where the folder is asked
        transformers.BertModel.from_pretrained(folder)
    assert fetched == [evil]


def point_index_outside(folder, other):
    """Weights by an index that names another folder's file."""
    (folder / "model.safetensors").rename(other / "secret.safetensors")
    names = dict.fromkeys(pa_names(other / "secret.safetensors"), "../other/secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def link_outside(folder, other):
    (folder / "model.safetensors").rename(other / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(other / "secret.safetensors")


def name_tokenizer_outside(folder, other):
    """transformers picks the newest of these names and joins it to the folder."""
    (folder / "tokenizer.json").rename(other / "tokenizer.4.0.0.json")
    change_json(folder / "tokenizer_config.json", fast_tokenizer_files=["../other/tokenizer.4.0.0.json"])


def link_tokenizer_outside(folder, other):
    (folder / "tokenizer.json").rename(other / "secret.json")
    (folder / "tokenizer.json").symlink_to(other / "secret.json")


def pa_names(path):
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("attack", [point_index_outside, link_outside, name_tokenizer_outside, link_tokenizer_outside])
@each_loader
def test_other_folders_are_not_read(attack, kind, opened, hostile, things, tmp_path, monkeypatch):
    folder, other = hostile(kind), tmp_path / "other"
    other.mkdir()
    attack(folder, other)
    with pytest.raises(InputError):
        opened(folder, things, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for module in (containment, tokenizer_module):  # the payload is live: unguarded, all is read
        monkeypatch.setattr(module, "check_inside", lambda folder: None)
    opened(folder, things, tmp_path / "out")


def test_weights_by_another_name_stay_inside(hostile, tmp_path):
    """transformers' own guard; config.json may name the file of the weights."""
    folder = hostile("model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    change_json(folder / "config.json", transformers_weights="../outside.safetensors")
    with pytest.raises(InputError, match=r"must reference a file inside|no such"):
        load(folder)


def test_huge_json_is_not_parsed(hostile, monkeypatch):
    folder = hostile("model")
    monkeypatch.setattr(containment, "LARGEST_JSON", 10_000)
    (folder / "tokenizer.json").write_text(" " * 20_000)
    with pytest.raises(InputError, match=r"tokenizer.json has 20,000 bytes; expected at most 10,000"):
        load_tokenizer(folder)


@pytest.mark.parametrize("argv", ["pretrain run --config", "pretrain prepare --config", "finetune run --config"])
def test_yaml_runs_nothing(argv, tmp_path, capsys):
    main, name, option = argv.split()
    text = f"out: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n"
    (tmp_path / "c.yaml").write_text(text)
    assert {"pretrain": pretrain, "finetune": finetune}[main]([name, option, str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml line 1: tag tag:yaml.org,2002:python/object/apply:os.mkdir is not read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    yaml.unsafe_load(text)  # the payload is live
    assert (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def run(things, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    sizes = ["--model.num_layers=1", "--model.hidden_size=32", "--model.num_heads=2", "--model.intermediate_size=32"]
    argv = ["run", "--data.store", str(things.store), "--budget.steps=2", "--checkpoints.every_steps=1", *sizes]
    assert pretrain([*argv, *SMALL, "--precision=fp32", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("argv", [["run", "--resume"], ["export", "--out", "{out}", "--run"], ["doctor", "--run"]])
def test_a_strangers_run_folder_runs_nothing(argv, run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    ran = f"!!python/object/apply:os.mkdir ['{tmp_path}/ran']\n"
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("seed: 0\n", f"seed: {ran}"))
    argv = [word.format(out=tmp_path / "out") for word in argv]
    assert pretrain([*argv, str(folder)]) == 2
    assert "tag tag:yaml.org,2002:python/object/apply:os.mkdir is not read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer-0.safetensors", "state.json", "manifest.json"])
def test_pickles_in_a_checkpoint_are_not_run(name, run, tmp_path):
    """Its checksums are no guard here: a stranger writes them too."""
    folder = shutil.copytree(run, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        (path / name).write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
        if name != "manifest.json":
            manifest = json.loads((path / "manifest.json").read_text())
            del manifest["seal"]
            manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": file_hash(path / name)}
            (path / "manifest.json").write_text(_sealed(manifest))
    assert pretrain(["run", "--resume", str(folder)]) != 0
    assert not (tmp_path / "ran").exists()


def seal_store(folder):
    """Checksums as a stranger would write them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = describe_files(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_strangers_store(things, tmp_path):
    folder = shutil.copytree(things.store, tmp_path / "store")
    np.save(folder / "unigram_counts.npy", np.array([RunsCode(tmp_path / "ran")], dtype=object), allow_pickle=True)
    seal_store(folder)
    with pytest.raises(InputError, match=r"unigram_counts.npy is damaged"):
        _ = Store.open(folder).unigram_counts
    assert not (tmp_path / "ran").exists()
    np.load(folder / "unigram_counts.npy", allow_pickle=True)  # the payload is live
    assert (tmp_path / "ran").exists()

    for damage in ("names a file outside", "lists that end before they begin"):
        shutil.rmtree(folder)
        shutil.copytree(things.store, folder)
        tokens = next((folder / "tokens").glob("*.arrow"))
        if damage.startswith("names"):
            tokens.rename(tmp_path / "outside.arrow")
            manifest = json.loads((folder / "manifest.json").read_text())
            entry = manifest["files"].pop(f"tokens/{tokens.name}")
            manifest["files"]["../outside.arrow"] = entry
            (folder / "manifest.json").write_text(json.dumps(manifest))
        else:
            table = pa.ipc.open_stream(pa.memory_map(str(tokens)))
            batches = list(table)
            columns = []
            for column in batches[0].columns:
                offsets = column.offsets.to_numpy().copy()
                offsets[1] = 2**31 - 1
                columns.append(pa.ListArray.from_arrays(pa.array(offsets), column.values))
            with pa.OSFile(str(tmp_path / "new.arrow"), "wb") as sink:
                schema = pa.schema([pa.field(n, c.type) for n, c in zip(batches[0].schema.names, columns)])
                with pa.ipc.new_stream(sink, schema) as writer:
                    writer.write_batch(pa.record_batch(columns, schema=schema))
            batches, table = None, None
            (tmp_path / "new.arrow").rename(tokens)
            seal_store(folder)
        with pytest.raises(InputError, match=r"outside the store|damaged"):
            Store.open(folder)
