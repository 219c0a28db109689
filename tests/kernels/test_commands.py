"""python -m encoderkit.kernels."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from encoderkit.kernels import measured
from encoderkit.kernels.__main__ import main
from encoderkit.kernels.bench import bench_attention
from encoderkit.kernels.info import GPU_RESULTS


def test_help_imports_no_torch():
    code = (
        "import sys; from encoderkit.kernels.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("xformers", "varlen", "torch", "reference"))
    assert str(measured.file()) in shown.replace("\n", "")
    waiting = [name for name, result in GPU_RESULTS.items() if result is None]
    assert (shown.count("not yet run on GPU") > 0) == bool(waiting)


def test_info_measures_again_when_asked(capsys, monkeypatch):
    from encoderkit.kernels import matrix_route

    monkeypatch.setattr(matrix_route, "_measure", lambda: ["mkl", "first"])
    assert main(["info", "--measure"]) == 0
    assert "by mkl (first)" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setattr(matrix_route, "_measure", lambda: ["onednn", "second"])
    matrix_route.fastest_route.cache_clear()
    assert main(["info"]) == 0
    assert "by mkl (first)" in capsys.readouterr().out.replace("\n", "")
    assert main(["info", "--measure"]) == 0
    assert "by onednn (second)" in capsys.readouterr().out.replace("\n", "")
    measured.forget()
    matrix_route.fastest_route.cache_clear()


def test_bench_writes_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("encoderkit.kernels.bench.TOKENS", {"cpu": 64})
    monkeypatch.setattr("encoderkit.kernels.bench.bench_loss", lambda device, dtype: [])
    assert main(["bench", "--lengths", "32", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"padded SDPA", "padded eager", "torch"}
    assert "speedup" in capsys.readouterr().out


def test_bench_covers_windows_that_are_narrower_than_the_sequences(monkeypatch):
    monkeypatch.setattr("encoderkit.kernels.bench.TOKENS", {"cpu": 256})
    rows = bench_attention("cpu", [32, 128], torch.float32, repeats=1)
    assert {(row["length"], row["window"]) for row in rows} == {(32, None), (128, None), (128, 64)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_without_a_gpu_is_refused(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no GPU here; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "expected at least 2"),
        (["--json", "missing/folder/x.json"], "there is no folder"),
        (["--json", "/"], "--json / is a folder; expected a file"),
        (["--json", "/dev/null/x.json"], "there is no folder /dev/null"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["bench", "--json", str(tmp_path / "x.json")]) == 2
    assert "x.json cannot be written; give another file" in capsys.readouterr().err
