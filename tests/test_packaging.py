"""What a wheel holds, and that it works beside the package `kernels` of Hugging Face."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("encoder", "pretrain", "finetune", "kernels", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, without the network."""
    for module in ("pip", "setuptools", "wheel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building a wheel needs {module}")
    folder = tmp_path_factory.mktemp("packaging")
    for name in KEPT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
         "-w", str(folder), str(folder / "source")],
        check=True, timeout=120,
    )  # fmt: skip
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_every_source_file_under_encoderkit(wheel):
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"encoderkit"}
    folders = ("encoder", "pretrain", "finetune", "kernels")
    expected = {f"encoderkit/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert expected - names == set()
    assert "encoderkit/kernels/__init__.py" not in names
    endings, ours = ("yaml", "md", "sh"), ("pretrain", "finetune")
    files = [path for folder in ours for ending in endings for path in (ROOT / folder).rglob(f"*.{ending}")]
    recipes = {f"encoderkit/{path.relative_to(ROOT)}" for path in files}
    assert recipes | {"encoderkit/kernels/README.md"} <= names


def test_wheel_has_both_commands(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "encoderkit-pretrain = encoderkit.pretrain.__main__:main" in text
    assert "encoderkit-finetune = encoderkit.finetune.__main__:main" in text


CHECK = """
import sys
import encoderkit.kernels.errors, encoderkit.pretrain.settings
for module in (encoderkit.kernels.errors, encoderkit.pretrain.settings):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
if sys.argv[2] == "beside":
    import kernels
    assert kernels.FOREIGN and "torch" not in sys.modules
"""


@pytest.mark.parametrize("foreign", ["alone", "beside"])
@pytest.mark.parametrize("where", ["elsewhere", "repository root"])
def test_installed_package_works_beside_the_foreign_kernels(wheel, tmp_path, foreign, where):
    site = tmp_path / "site"
    wheel.extractall(site)
    if foreign == "beside":
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text("FOREIGN = True\n")
    subprocess.run(
        [sys.executable, "-c", CHECK, str(site), foreign],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=ROOT if where == "repository root" else tmp_path,
        check=True,
        timeout=60,
    )
