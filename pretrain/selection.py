"""Which documents are trained on, held out or dropped, with a ledger in which none is missing.

Everything here is a function of the documents in their order, never of a machine or a start: a prepare that goes on
after a kill, and every machine that takes a share, reads all documents again and decides the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from encoderkit.pretrain.corpora import Corpora, Document, Reading

SHARE_PARTS = 1_000_000  # the share of held-out documents is taken to this precision

Drop = Callable[[Document], str | None]  # why a document is dropped, or None


@dataclass
class Amount:
    """Documents and their characters."""

    documents: int = 0
    characters: int = 0

    def add(self, documents: int, characters: int) -> None:
        """Count some more."""
        self.documents += documents
        self.characters += characters

    def as_dict(self) -> dict[str, int]:
        """For the manifest."""
        return {"documents": self.documents, "characters": self.characters}


@dataclass
class Selection:
    """The documents to train on, when iterated over; the others go to hold_out or are dropped.

    kept_apart: held-out documents from sources of their own. share: of the documents, or of the groups where documents
    have one. drop: filters for both; the first reason counts.
    """

    corpora: Corpora
    kept_apart: Corpora | None
    share: float | None
    hold_out: Callable[[Document], None]
    drop: list[Drop] = field(default_factory=list)
    repeated: Amount = field(default_factory=Amount)
    held_out: Amount = field(default_factory=Amount)
    trained: Amount = field(default_factory=Amount)
    dropped: Reading = field(default_factory=Reading)

    def __iter__(self) -> Iterator[Document]:
        for document in self._kept(self.kept_apart) if self.kept_apart else ():
            self._hold_out(document)
        for document in self._training(self._kept(self.corpora)):
            self.repeated.add(document.copies - 1, (document.copies - 1) * len(document.text))
            for _ in range(document.copies):
                self.trained.add(1, len(document.text))
                yield document

    def ledger(self, *, stopped: bool = False) -> dict[str, Any]:
        """Documents and characters: read + repeated = trained + held out + dropped, for every reason.

        stopped: whether the reading stopped before the end; then some of them may be left, read and not yet sorted.
        """
        documents, characters = Counter(self.dropped.dropped), Counter(self.dropped.dropped_characters)
        read = Amount()
        for corpora in filter(None, (self.corpora, self.kept_apart)):
            documents += corpora.reading.dropped
            characters += corpora.reading.dropped_characters
            read.add(corpora.num_documents, corpora.num_characters)
            read.add(corpora.reading.dropped.total(), corpora.reading.dropped_characters.total())
        dropped = {reason: Amount(documents[reason], characters[reason]).as_dict() for reason in sorted(documents)}
        left = {
            unit: getattr(read, unit)
            + getattr(self.repeated, unit)
            - getattr(self.held_out, unit)
            - getattr(self.trained, unit)
            - sum(amount[unit] for amount in dropped.values())
            for unit in ("documents", "characters")
        }
        assert all(n == 0 or (stopped and n > 0) for n in left.values()), f"documents do not add up: {left}"
        amounts = {"read": read, "repeated": self.repeated, "trained": self.trained, "held_out": self.held_out}
        told = {name: amount.as_dict() for name, amount in amounts.items()}
        return told | {"dropped": dropped} | ({"left": left} if stopped else {})

    def _kept(self, corpora: Corpora) -> Iterator[Document]:
        for document in corpora:
            reason = next(filter(None, (drop(document) for drop in self.drop)), None)
            if reason is None:
                yield document
            else:
                self.dropped.drop(reason, document.text)

    def _hold_out(self, document: Document) -> None:
        self.held_out.add(1, len(document.text))
        self.hold_out(document)

    def _training(self, documents: Iterator[Document]) -> Iterator[Document]:
        """One of each 1 / share documents is held out, the one whose id has the smallest hash; groups by their hash.

        Where 1 / share is no whole number, blocks are as long as the one before, or longer by one document.
        """
        share = Fraction(self.share or 1).limit_denominator(SHARE_PARTS)
        block: list[Document] = []
        in_blocks = due = 0  # documents that may be held out one by one, and how many of them are, with this block
        for document in documents:
            if not self.share:
                yield document
            elif document.group is not None:
                if _hash(document.group) < self.share * 2**64:
                    self._hold_out(document)
                else:
                    yield document
            else:
                block.append(document)
                in_blocks += 1
            if block and int(in_blocks * share) > due:
                yield from self._without_one(block)
                block, due = [], due + 1
        # The last block is short: it gives one if it is the only one.
        yield from block if self.held_out.documents else self._without_one(block)

    def _without_one(self, block: list[Document]) -> list[Document]:
        if not block:
            return []
        chosen = min(range(len(block)), key=lambda i: (hashlib.sha256(block[i].id.encode()).digest(), i))
        self._hold_out(block[chosen])
        return block[:chosen] + block[chosen + 1 :]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
