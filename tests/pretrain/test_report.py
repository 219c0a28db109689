"""The report, its plot and the model card, from the files of a run folder."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import yaml

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.report import Run, write_model_card, write_report
from encoderkit.pretrain.run_folder import RunFolder
from encoderkit.pretrain.settings import Budget, PretrainSettings

pytestmark = pytest.mark.usefixtures("real_plots")


@pytest.fixture
def run(tmp_path):
    """A run folder as the loop leaves it: 200 steps, 10 validations, an end."""
    about = {"parameters": 4_567_890, "vocab_size": 8192, "unigram_entropy": 6.6, "ln_vocab": math.log(8192)}
    with RunFolder.create(PretrainSettings(out=str(tmp_path / "first"), budget=Budget(steps=200))) as folder:
        folder.describe(
            **about, rows_per_epoch=400,
            model={"architecture": "modern", "num_layers": 7, "hidden_size": 256, "num_heads": 4},
            data={"hash": "abc123", "tokens": 1_234_567, "sources": [{"name": "a|b.txt", "documents": 17}],
                  "dropped": {"blank": 3}},
            reasons={"precision": "fp32: no bf16 here", "global": "torch: the only one on CPU"},
        )  # fmt: skip
        folder.log.append({"kind": "start", "step": 0, "tokens": 0, "batch_rows": 8, **about})
        for step in range(1, 201):
            loss = 3.0 + 6.0 * math.exp(-step / 40) + 0.1 * math.sin(step)
            times = {"data": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.1}
            folder.log.append({
                "kind": "train", "step": step, "tokens": step * 8000, "loss": loss, "accuracy": 0.3, "grad_norm": 1.0,
                "lr": 2e-3 * (1 - step / 200), "mask_rate": 0.3, "padding": 0.02,
                "time": {"elapsed": step * 1.1, "tokens_per_second": 8000 / 1.1, "utilisation": None, **times},
            })  # fmt: skip
            if step % 20 == 0:
                folder.log.append({"kind": "validation", "step": step, "tokens": step * 8000, "loss": loss - 0.3,
                                   "accuracy": 0.4, "time": {"elapsed": step * 1.1}})  # fmt: skip
        folder.log.append({"kind": "end", "step": 200, "tokens": 1_600_000, "loss": 2.75, "accuracy": 0.45,
                           "time": {"elapsed": 230.0}})  # fmt: skip
        (folder.path / "final").mkdir()
        yield folder


def test_report_tells_what_a_reader_asks(run):
    write_report(run.path)
    text = (run.path / "report.md").read_text()
    for expected in (
        "# Pretraining: first",
        "| model | modern (7 layers, 256 wide, 4 heads) |",
        "| parameters | 4,567,890 |",
        "| tokens seen | 1,600,000 |",
        "| passes over the data | 4.00 |",
        "| time | 3 min 50 s |",
        "| tokens/s | 7,273 (median of the log lines) |",
        "| row padding | 2.00% |",
        "| global attention | torch: the only one on CPU |",
        "| uniform guess (ln V) | 9.0109 | 8,192.0 |",
        "| training unigram | 6.6000 |",
        "| **this model** | **2.7500** | 15.6 | 45.00% |",
        "| backward | 120.0 | 52.2% |",
        "![training and held-out loss against tokens](loss.png)",
        "- tokens: 1,234,567",
        Path(sys.orig_argv[0]).name,  # the command
    ):
        assert expected in text
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (run.path / "loss.svg").read_text()


def test_passes_count_the_rows_of_each_batch_size(run):
    run.log.append({"kind": "stage", "step": 101, "tokens": 800_000, "max_tokens": 128, "batch_rows": 16})
    write_report(run.path)
    assert "| passes over the data | 6.00 |" in (run.path / "report.md").read_text()  # 100 steps of 8 rows, 100 of 16


def test_same_log_gives_the_same_files(run):
    write_report(run.path)
    before = {name: (run.path / name).read_bytes() for name in ("report.md", "loss.png", "loss.svg")}
    write_report(run.path)
    assert {name: (run.path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("step", [0, 1, 57])
def test_stopped_run_has_a_report(run, step):
    run.log.cut_back(step)
    write_report(run.path)
    assert f"The run has not ended; this is step {step:,}." in (run.path / "report.md").read_text()


def test_model_card_opens_as_a_hub_card(run):
    (run.path / "final" / "config.json").write_text('{"model_type": "modernbert"}')
    write_model_card(Run.read(run.path), run.path / "final")
    text = (run.path / "final" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "fill-mask"
    assert "modernbert" in front["tags"]
    for expected in ("# first", "4,567,890 parameters", "pretrained from scratch", "2.7500", "- tokens: 1,234,567"):
        assert expected in text
    assert 'pipeline("fill-mask", model="path/to/this/folder")' in text


def test_model_card_tells_of_code_and_origin(run):
    (run.path / "final" / "config.json").write_text('{"model_type": "encoderkit", "auto_map": {}}')
    told = Run.read(run.path)
    told.settings["model"]["init_from"] = "bert-base-uncased"
    write_model_card(told, run.path / "final", "Exported from step 7.")
    text = (run.path / "final" / "README.md").read_text()
    assert 'model="path/to/this/folder", trust_remote_code=True)' in text
    assert "continued from bert-base-uncased with encoderkit on 1,600,000 tokens. Exported from step 7." in text


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.yaml; expected a run folder"):
        Run.read(tmp_path)
