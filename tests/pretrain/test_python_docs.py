"""python-docs on a made-up installation: deterministic, without duplicates, with splits that share nothing."""

import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import python_docs
from encoderkit.pretrain.corpora import CorpusSpec, open_corpus
from encoderkit.pretrain.python_docs import corpus_hash, docstring_examples, mask_package, python_documents, split_of

LONG = "This sentence is long enough to be kept, and it says something. " * 4


def say(something):
    """A docstring about something."""
    return f"{LONG}It is about {something}."


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A standard library of one module and two packages, `alpha` of 40 modules and `beta` with what must be skipped."""
    stdlib, site = tmp_path / "lib", tmp_path / "lib/site-packages"
    (site / "alpha").mkdir(parents=True)
    (site / "beta/tests").mkdir(parents=True)
    (stdlib / "plain.py").write_text(f'"""{say("plain")}"""\nraise SystemExit("imported")\n')
    for i in range(40):
        (site / f"alpha/m{i}.py").write_text(
            f'"""{say(f"alpha {i}")}"""\n\ndef f():\n    """{say(f"function {i}")}"""\n\n'
            f'class C:\n    """{say("the same class everywhere")}"""\n'
        )
    (site / "alpha/__init__.py").write_text("")
    (site / "beta/__init__.py").write_text(f'"""{say("beta, Beta and beta_x, not alphabeta")}"""\n')
    (site / "beta/broken.py").write_text('"""' + LONG + '"""\nprint "python 2"\n')
    (site / "beta/tests/test_x.py").write_text(f'"""{say("tests")}"""\n')
    (site / "beta/guide.rst").write_text(say("the guide"))
    (site / "beta/bad.md").write_bytes(b"\xff" * 500)
    paths = {"stdlib": str(stdlib), "purelib": str(site), "platlib": str(site)}
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: paths)
    python_docs._all_documents.cache_clear()
    yield site
    python_docs._all_documents.cache_clear()


def test_documents_are_modules_with_their_docstrings_in_order(installation):
    documents = {d.id: d for d in python_documents()}
    assert sorted(documents) == list(documents)
    assert documents["plain.py"].package == "plain"
    assert documents["beta/guide.rst"].package == "beta"
    assert not any("tests" in name or "broken" in name or "bad" in name for name in documents)
    assert len(documents) == 43
    module = documents["alpha/m7.py"].text
    assert module.index("alpha 7") < module.index("function 7")
    assert sum("the same class" in d.text for d in documents.values()) == 1


def test_splits_share_nothing_and_make_the_whole(installation):
    train, test = list(python_documents(split="train")), list(python_documents(split="test"))
    assert test
    assert sorted([*train, *test], key=lambda d: d.id) == list(python_documents())
    assert all(split_of(d.id) == "test" for d in test)
    assert not {s for d in train for s in d.text.split("\n\n\n")} & {s for d in test for s in d.text.split("\n\n\n")}
    pretraining = " ".join(d.text for d in open_corpus(CorpusSpec(source="python-docs:train")))
    for _, _, module in docstring_examples(split="test"):
        text = next(d.text for d in test if d.id == module)
        assert text not in pretraining


def test_examples_do_not_name_their_package(installation):
    examples = docstring_examples(packages=["alpha", "beta"])
    assert {package for _, package, _ in examples} == {"alpha", "beta"}
    assert len(examples) == 82
    for text, package, _ in examples:
        assert package not in text.lower().replace("alphabeta", "")
    assert len(docstring_examples(max_package_examples=2)) == 4  # 2 of alpha, 1 of beta, 1 of plain


def test_names_are_masked_as_words():
    masked = mask_package("Torch tensors of torch.nn and PyTorch, not torching", "torch")
    assert masked == "package tensors of package.nn and package, not torching"
    assert mask_package("numpydoc, numpy_x and np.array", "numpy") == "numpydoc, package_x and package.array"


def test_caps_bound_a_package_and_the_whole(installation):
    capped = list(python_documents(max_package_characters=3000))
    assert 0 < sum(len(d.text) for d in capped if d.package == "alpha") <= 3000


def test_hash_follows_the_text(installation):
    before = corpus_hash()
    python_docs._all_documents.cache_clear()
    assert corpus_hash() == before
    (installation / "beta/guide.rst").write_text(say("another guide"))
    python_docs._all_documents.cache_clear()
    assert corpus_hash() != before


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="unknown split dev"):
        list(open_corpus(CorpusSpec(source="python-docs:dev")))
