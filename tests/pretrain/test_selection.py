"""Selection: the ledger balances whatever is held out, repeated or dropped, and a choice never depends on the rest."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.pretrain.corpora import Document, Reading
from encoderkit.pretrain.duplicates import FILTERS
from encoderkit.pretrain.selection import Selection

DOCUMENTS = st.lists(
    st.builds(
        Document,
        id=st.text("abc0123456789", min_size=1, max_size=6),
        text=st.sampled_from([f"text of kind {i}" for i in range(8)]),
        group=st.none() | st.sampled_from("abcdef"),
        copies=st.integers(1, 3),
    ),
    max_size=60,
)


@dataclass
class Listed:
    """Corpora of given documents."""

    documents: list[Document]
    reading: Reading = field(default_factory=Reading)
    num_documents: int = 0
    num_characters: int = 0

    def __iter__(self):
        for document in self.documents:
            self.num_documents += 1
            self.num_characters += len(document.text)
            yield document
        self.reading.drop("blank", "  ")


def select(documents, share, kind, apart=None):
    held = []
    drop = [make() for make in FILTERS[kind]]
    selection = Selection(Listed(documents), apart and Listed(apart), share, held.append, drop)
    return list(selection), held, selection.ledger()


@settings(max_examples=500, deadline=None)
@given(DOCUMENTS, st.sampled_from([0.5, 0.1, 0.01]), st.sampled_from(["keep", "exact"]))
def test_every_document_is_trained_on_held_out_or_dropped(documents, share, kind):
    trained, held, ledger = select(documents, share, kind)
    assert ledger["read"]["documents"] == len(documents) + 1
    gone = sum(amount["documents"] for amount in ledger["dropped"].values())
    assert len(documents) + 1 + ledger["repeated"]["documents"] == len(trained) + len(held) + gone
    assert ledger["trained"]["characters"] == sum(len(document.text) for document in trained)
    assert ledger["dropped"]["blank"] == {"documents": 1, "characters": 2}
    by_group = {document.group for document in held if document.group} & {d.group for d in trained if d.group}
    assert not by_group
    if kind == "exact":
        assert len({document.text for document in held}) == len(held)
        assert not {document.text for document in held} & {document.text for document in trained}


@settings(max_examples=500, deadline=None)
@given(DOCUMENTS, DOCUMENTS)
def test_what_comes_later_changes_nothing_before(documents, later):
    alone = [document for document in documents if document.group is None]
    grouped = [document for document in documents if document.group is not None]
    documents = grouped + alone[: len(alone) // 10 * 10]  # whole blocks, of which each holds one out
    trained, held, _ = select(documents, 0.1, "keep", apart=None)
    more, more_held, _ = select(documents + later, 0.1, "keep", apart=None)
    assert trained == more[: len(trained)] or not documents
    assert held == more_held[: len(held)] or not documents


def test_held_out_sources_come_first_so_that_their_duplicates_are_dropped():
    trained, held, ledger = select(
        [Document("a", "same"), Document("b", "other")], None, "exact", [Document("h", "same")]
    )
    assert [document.id for document in trained] == ["b"]
    assert [document.id for document in held] == ["h"]
    assert ledger["dropped"]["exact duplicate"]["documents"] == 1


@pytest.mark.parametrize("share", [0.5, 0.4, 0.35, 0.3, 0.15, 0.07, 0.01])
def test_the_share_that_was_asked_for_is_held_out(share):
    documents = [Document(f"d{i}", f"text {i}") for i in range(2000)]
    _, held, _ = select(documents, share, "keep")
    assert len(held) == round(share * 2000)
    assert len(select(documents[:1000], share, "keep")[1]) == round(share * 1000)
