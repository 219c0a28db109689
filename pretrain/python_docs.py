"""python-docs: the documentation inside the standard library and the installed packages, real English on every machine.

Docstrings are read by `ast` and .rst and .md files as text; nothing is imported. A document is what one module says, in
order; a docstring that was seen before is left out. The corpus differs from machine to machine: its hash is
reported, and no score on it compares across machines.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpora import Document

MIN_DOCSTRING = 40  # characters; shorter ones are "Return self." and the like
MIN_DOCUMENT = 200  # characters
MAX_FILE_BYTES = 1 << 20  # larger sources are generated tables
TEST_SHARE = 10  # one module in ten belongs to the split `test`
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FOLDERS |= {"_vendor", "vendored", "vendor", "externals", "third_party", "node_modules"}
SEPARATOR = "\n\n\n"  # between the docstrings of one document; no docstring holds it
# Other words that give a package away, beside its own name.
NICKNAMES = {
    "numpy": ("np",),
    "pandas": ("pd",),
    "PIL": ("pillow",),
    "sklearn": ("scikit-learn", "scikit_learn", "scikit"),
    "torch": ("pytorch",),
    "transformers": ("huggingface", "hugging face"),
    "datasets": ("huggingface", "hugging face"),
    "matplotlib": ("mpl", "pyplot", "plt"),
    "sympy": ("sym",),
    "aiohttp": ("aio",),
}


def python_documents(*, split: str | None = None, max_package_characters: int = 400_000) -> Iterator[Document]:
    """Documents in the order of their ids, `package/module.py`.

    split: None for all, "train", or "test": one module in ten, chosen by the hash of its id, so that a task made from
    the test modules was never pretrained on in the split "train". max_package_characters: what one package gives at
    most.
    """
    if split not in (None, "train", "test"):
        raise InputError(f"python-docs split is {split!r}; expected train or test")
    yield from (d for d in _all_documents(max_package_characters) if split is None or split_of(d.id) == split)


def corpus_hash(*, split: str | None = None, max_package_characters: int = 400_000) -> str:
    """sha256 of the ids and texts of a split."""
    digest = hashlib.sha256()
    for document in python_documents(split=split, max_package_characters=max_package_characters):
        digest.update(f"{document.id}\0{document.text}\0".encode())
    return digest.hexdigest()


def split_of(module_id: str) -> str:
    """`train` or `test`, by the hash of a module's id."""
    return "test" if _hash(module_id) % TEST_SHARE == 0 else "train"


def docstring_examples(
    *, split: str | None = None, packages: Sequence[str] | None = None, max_package_examples: int = 500
) -> list[tuple[str, str, str]]:
    """(text, package, module id) of single docstrings: which package does a docstring come from?

    The package's name and nicknames are masked in the text by the word `package`, for about 28% of docstrings name
    their own. split: as in python_documents. packages: those wanted; None for all. At most max_package_examples of
    each package and split, chosen by hash. In a fixed order.
    """
    by_package: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for document in python_documents(split=split):
        if document.id.endswith(".py") and (packages is None or document.package in packages):
            for text in document.text.split(SEPARATOR):
                by_package[str(document.package)].append((text, str(document.package), document.id))
    examples = []
    for package in sorted(by_package):
        chosen = sorted(by_package[package], key=lambda example: _hash(example[2] + example[0]))[:max_package_examples]
        examples += [(mask_package(text, package), package, module) for text, package, module in chosen]
    return examples


def mask_package(text: str, package: str) -> str:
    """The text with the package's name and nicknames replaced by the word `package`."""
    names = sorted({package, package.strip("_"), *NICKNAMES.get(package, ())}, key=len, reverse=True)
    words = "|".join(re.escape(name) for name in names if name)
    return re.sub(rf"(?<![a-z0-9])({words})(?![a-z0-9])", "package", text, flags=re.IGNORECASE)


@functools.lru_cache(maxsize=2)
def _all_documents(max_package_characters: int) -> tuple[Document, ...]:
    seen: set[bytes] = set()
    documents = []
    for package, files in sorted(_package_files().items()):
        used = 0
        # Files in the order of a hash: a capped package then gives a sample of its modules.
        for identity, path in sorted(files, key=lambda file: (_hash(file[0]), file[0])):
            text = _module_text(path, seen)
            if len(text) >= MIN_DOCUMENT:
                used += len(text)
                if used > max_package_characters:
                    break
                documents.append(Document(identity, text, package))
    return tuple(sorted(documents, key=lambda document: document.id))


def _package_files() -> dict[str, list[tuple[str, Path]]]:
    """package -> (id, path) of its .py, .rst and .md files."""
    paths = sysconfig.get_paths()
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for root in dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")):
        for top in sorted(root.iterdir()) if root.is_dir() else []:
            if top.name in SKIPPED_FOLDERS or top.name.endswith((".dist-info", ".egg-info", ".libs")):
                continue
            if top.is_file() and top.suffix == ".py":
                found[top.stem].append((top.name, top))
            elif top.is_dir() and (top / "__init__.py").is_file():
                found[top.name] += [(path.relative_to(root).as_posix(), path) for path in _walk(top)]
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in SKIPPED_FOLDERS and not path.name.startswith("."):
                yield from _walk(path)
        elif path.suffix in (".py", ".rst", ".md") and not path.name.startswith(("test_", "LICENSE")):
            yield path


def _module_text(path: Path, seen: set[bytes]) -> str:
    """The docstrings of a module, or the text of a documentation file; empty where there is none that can be read."""
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
        if path.suffix != ".py":
            texts = [raw.decode()]
        elif b'"""' in raw or b"'''" in raw:
            texts = _docstrings(raw)
        else:
            return ""
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ""  # templates, Python 2 and damaged files are no documents
    kept = []
    for text in (re.sub(r"\n{3,}", "\n\n", text).strip() for text in texts):
        if len(text) < MIN_DOCSTRING or "\0" in text or (not text.isascii() and _has_surrogates(text)):
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(text)
    return SEPARATOR.join(kept)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _docstrings(source: bytes) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    found = []
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                found.append(inspect.cleandoc(text))
        todo.extend(reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]))
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
