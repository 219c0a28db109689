"""Settings of the commands tokenizer, prepare, merge, contamination, eval and export. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpus_files import Documents, InvalidUtf8
from encoderkit.pretrain.settings import MOST_WORKERS, check_range


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """Where text is read, and how."""

    sources: list[str] = field(
        default_factory=list,  # files, folders, globs, URLs, hub names NAME[:CONFIG[:SPLIT]], python-docs;
    )  # x@2 reads x twice, x@0.5 half of its documents; x@40% y@60%: shares of the mixture's characters
    text_column: str = "text"  # column that holds the text, in tables and hub data sets
    documents: Documents = "blank-line"  # what makes one document in .txt, .md and .rst
    invalid_utf8: InvalidUtf8 = "refuse"  # bytes that are not UTF-8; replace: by U+FFFD, counted

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("sources is empty; expected files, folders, globs, hub names or python-docs")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(_Sources):
    """Train a tokenizer on text."""

    out: str  # folder to write; opens with AutoTokenizer.from_pretrained
    kind: Literal["wordpiece", "bpe"] = "wordpiece"  # wordpiece as BERT's, or byte-level bpe as RoBERTa's
    vocab_size: int = 8192  # token types, special tokens included
    lowercase: bool = True

    def __post_init__(self) -> None:
        check_range("vocab_size", self.vocab_size, 16, 10_000_000)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(_Sources):
    """Tokenize text once into a store."""

    tokenizer: str  # tokenizer folder or hub name
    out: str  # store folder to write
    held_out: str = "0.01"  # share of the documents kept for the probe, or a source that holds them
    max_documents: int | None = None  # read at most so many of each source, such as the first million of a long stream
    duplicates: Literal["keep", "exact", "near"] = "keep"  # what is dropped: nothing, the same text, nearly the same
    sentences: str = "en"  # language of the sentence splitter, a code such as en, de or zh; none finds no sentences
    held_out_by: str | None = None  # column whose equal values go to one side: with a share, that share of the values
    workers: int = 0  # processes that tokenize; 0 takes all cores
    shard: str | None = None  # i/n: tokenize the i-th of n shares, from 1; merge puts the n folders together
    arrived: str | None = None  # folder for a store of what another prepare into out has tokenized so far; it goes on

    def __post_init__(self) -> None:
        check_range("max_documents", self.max_documents, 1)
        if self.shard is not None:
            found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
            if not found or not 1 <= int(found[1]) <= int(found[2]):
                raise InputError(f"shard is {self.shard!r}; expected i/n with i from 1 to n, such as 1/4")
        check_range("workers", self.workers, 0, MOST_WORKERS)
        if self.arrived is not None and Path(self.arrived).resolve() == Path(self.out).resolve():
            raise InputError(f"arrived is {self.arrived}, and so is out, which is still written; give another folder")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Put the shares of several machines together to one store."""

    folders: list[str] = field(default_factory=list)  # what prepare --shard 1/n to n/n wrote, in any order
    out: str  # store folder to write

    def __post_init__(self) -> None:
        if not self.folders:
            raise InputError("folders is empty; expected the folders that prepare --shard 1/n to n/n wrote")


@dataclass(frozen=True, kw_only=True)
class ContaminationSettings(_Sources):
    """Find evaluation texts in a corpus, by the runs of words that both hold."""

    against: list[str]  # evaluation files or data sets; every column of text is looked for
    out: str | None = None  # file for the whole report, JSON; names every evaluation text and where it was found
    ngram: int = 13  # words of a run, 13 as in GPT-3 (arXiv:2005.14165); shorter texts are not looked for

    def __post_init__(self) -> None:
        check_range("ngram", self.ngram, 1, 1000)
        super().__post_init__()
        if not self.against:
            raise InputError("against is empty; expected evaluation files or hub data sets")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Score a masked language model at the fixed probe of a store's held-out documents."""

    model: str  # folder or hub name of any masked language model with a tokenizer
    store: str  # folder made by prepare
    seed: int = 0  # of the choice of masked tokens
    batch_tokens: int = 4096  # tokens that the model sees at once, padding included

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_range("batch_tokens", self.batch_tokens, 128)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write a run's checkpoint as a model folder that transformers opens, with its card."""

    run: str  # run folder
    out: str  # folder to write
    checkpoint: str = "last"  # last, best (of those kept, at the fixed probe), a step, or average-N of the newest N
    format: Literal["auto", "native", "code"] = "auto"  # a class of transformers, or with modelling code in the folder
    push_to_hub: str | None = None  # hub repository to send it to, user/name
    private: bool = False  # whether a new repository is private

    def __post_init__(self) -> None:
        if not re.fullmatch(r"last|best|\d+|average-\d+", self.checkpoint):
            raise InputError(f"checkpoint is {self.checkpoint!r}; expected last, best, a step or average-N")
