"""The layout of the source tree: fixed folders, mapped packages, imports in one direction, --help without torch.

Everything here is read by ast and configparser; nothing of encoderkit is imported.
"""

from __future__ import annotations

import ast
import configparser
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["kernels", "encoder", "pretrain", "finetune"]  # each may import those before it
FOLDERS = {*LAYERS, "tests"}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
HEAVY = {"torch", "transformers", "datasets", "accelerate", "evaluate", "xformers", "matplotlib", "sklearn"}
VAGUE = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module and the line: `from a.b import c` gives a.b and a.b.c; relative ones begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            yield name, node.lineno
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(folder: str, source: str) -> list[str]:
    """Imports in a file of folder that the layout forbids."""
    allowed = LAYERS[: LAYERS.index(folder) + 1] if folder in LAYERS else LAYERS
    found = []
    for name, line in imports(ast.parse(source)):
        parts = name.split(".")
        if name.startswith("."):
            found.append(f"line {line}: {name} is relative")
        elif parts[0] in FOLDERS:
            found.append(f"line {line}: {name} lacks the prefix encoderkit")
        elif parts[0] == "encoderkit" and len(parts) > 1 and parts[1] not in allowed:
            found.append(f"line {line}: {folder} may not import {name}")
    return found


def module_level_imports(source: str) -> Iterator[str]:
    """Modules that importing this source imports: function bodies and `if TYPE_CHECKING` are left out."""

    def visit(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield node
            for part in ("body", "orelse", "finalbody"):
                yield from visit(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from visit(handler.body)

    for node in visit(ast.parse(source).body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (name for name, _ in imports(node))


def file_of(module: str) -> Path | None:
    """The source file of a module of encoderkit."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def heavy_path(start: Path) -> list[str]:
    """The chain of module-level imports from start to a heavy package; empty where there is none."""
    waiting, seen = [[start]], {start}
    while waiting:
        chain = waiting.pop()
        for name in module_level_imports(chain[-1].read_text()):
            if name.split(".")[0] in HEAVY:
                return [*(str(path.relative_to(ROOT)) for path in chain), name]
            file = file_of(name) if name.startswith("encoderkit.") else None
            if file is not None and file not in seen:
                seen.add(file)
                waiting.append([*chain, file])
    return []


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def test_top_level_folders_are_fixed():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert found == FOLDERS


def test_top_level_files_are_fixed():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("needs a git checkout")
    named = {"README.md", "SECURITY.md", "CHANGELOG.md", "LICENSE", "Makefile"}
    named |= {"pyproject.toml", "setup.cfg", "constraints.txt", ".gitignore"}
    assert {name for name in found.stdout.splitlines() if "/" not in name} <= named


def test_kernels_and_tests_have_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow the package kernels of Hugging Face
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_files_are_named_after_their_idea():
    assert [str(path) for path in SOURCES if path.name in VAGUE] == []


@pytest.mark.parametrize("folder", ["encoder", "pretrain", "finetune"])
def test_init_refuses_a_bare_import(folder):
    code = compile((ROOT / folder / "__init__.py").read_text(), folder, "exec")
    with pytest.raises(ImportError, match=f"import encoderkit.{folder}, not {folder}"):
        exec(code, {"__name__": folder})
    exec(code, {"__name__": f"encoderkit.{folder}"})


def test_setup_lists_every_package():
    folders = {path.parent.relative_to(ROOT) for path in SOURCES if path.relative_to(ROOT).parts[0] in LAYERS}
    expected = {".".join(("encoderkit", *folder.parts)) for folder in folders}
    options = read_setup()["options"]
    assert set(options["packages"].split()) == expected
    mapping = dict(line.replace(" ", "").split("=") for line in options["package_dir"].strip().splitlines())
    assert all(mapping[f"encoderkit.{folder}"] == folder for folder in LAYERS)


# These two are copied into model folders, where one finds the other beside it and encoderkit may be missing.
EXPORTED = [ROOT / "encoder" / f"{name}_encoderkit.py" for name in ("configuration", "layers", "modeling")]


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path not in EXPORTED], ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_are_absolute_and_point_left(path):
    assert wrong_imports(path.relative_to(ROOT).parts[0], path.read_text()) == []


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.name)
def test_exported_files_import_nothing_of_ours_but_each_other(path):
    names = {name for name, _ in imports(ast.parse(path.read_text()))}
    beside = {name for name in names if name.startswith(".")}
    assert {name.split(".")[1] for name in beside} <= {other.stem for other in EXPORTED}
    assert {name.split(".")[0] for name in names - beside} <= {"torch", "transformers", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "from encoderkit.encoder.config import EncoderConfig"),
        ("encoder", "def f():\n    import encoderkit.pretrain.loop"),
        ("pretrain", "from encoderkit import finetune"),
        ("pretrain", "from . import settings"),
        ("pretrain", "from kernels.errors import InputError"),
        ("tests", "import encoder"),
    ],
)
def test_wrong_imports_are_seen(folder, source):
    assert wrong_imports(folder, source) != []


LIGHT = [
    path
    for path in SOURCES
    if path.relative_to(ROOT).parts[0] in LAYERS
    and (path.name in ("__main__.py", "__init__.py", "errors.py", "config.py") or path.stem.endswith("settings"))
]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_settings_import_nothing_heavy(path):
    assert heavy_path(path) == []


def test_heavy_imports_are_seen(tmp_path):
    assert heavy_path(ROOT / "pretrain" / "checkpoint.py")[-1].startswith("torch")
    assert list(module_level_imports("try:\n    import torch\nexcept ImportError:\n    pass")) == ["torch"]
    assert list(module_level_imports("def f():\n    import torch")) == []


def test_constraints_name_every_requirement():
    constraints = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pinned = {line.partition("==")[0] for line in constraints if "==" in line}
    setup = read_setup()
    wanted = setup["options"]["install_requires"].split("\n")
    wanted += [line for extra in setup["options.extras_require"].values() for line in extra.split("\n")]
    names = {line.split(";")[0].split(">")[0].strip().lower() for line in wanted if line.strip()}
    assert names - pinned == set()
