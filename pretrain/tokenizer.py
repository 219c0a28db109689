"""Tokenizers: trained here as WordPiece (BERT) or byte-level BPE (RoBERTa), or opened from a folder or the hub.

Training is deterministic: the same text gives the same ids. The library counts in hash maps of random order, so the
alphabet and its ids are settled here, before it merges pairs.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from encoderkit.encoder.containment import check_inside
from encoderkit.kernels.errors import InputError, first_line
from encoderkit.pretrain.data_settings import TokenizerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
MAX_ALPHABET = 1000  # characters that get a type of their own in WordPiece, as in BERT's vocabularies


@dataclass(frozen=True, eq=False)
class TokenIds:
    """The token ids that packing and masking need.

    ordinary: (V',) int64, ascending: every id that may be predicted or inserted, so no special and no unused one.
    Tokens added for the words of a domain are ordinary.
    """

    vocab_size: int
    pad: int
    cls: int
    sep: int
    mask: int
    ordinary: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TokenIds:
        """The ids of a tokenizer that load_tokenizer accepted."""
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        vocab = tokenizer.get_vocab()
        special |= {i for token, i in vocab.items() if token.startswith(("[unused", "<unused", "madeupword"))}
        ordinary = np.array(sorted(set(vocab.values()) - special), dtype=np.int64)
        pad, first, sep, mask = (getattr(tokenizer, f"{role}_token_id") for role in ("pad", "cls", "sep", "mask"))
        return cls(num_ids(tokenizer), pad, first, sep, mask, ordinary)

    @functools.cached_property
    def is_ordinary(self) -> np.ndarray:
        """(V,) bool: whether an id may be predicted or inserted."""
        table = np.zeros(self.vocab_size, dtype=bool)
        table[self.ordinary] = True
        return table


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest token id and one: what the token table of a model needs; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str) -> None:
    """Raise InputError where the tokenizer has token ids that a model of this many types has not."""
    if num_ids(tokenizer) > vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {num_ids(tokenizer)} tokens and the model {vocab_size}; they do not belong "
            "together, use the tokenizer that the model was trained with"
        )


def train_tokenizer(
    kind: Literal["wordpiece", "bpe"], texts: Iterable[str], vocab_size: int, *, lowercase: bool, out: Path
) -> None:
    """Train a tokenizer and write it as a Hugging Face folder: [CLS] A [SEP], or [CLS] A [SEP] B [SEP].

    texts is read twice, so a one-shot iterator is held in memory. vocab_size counts the special tokens, ids 0 to 4.
    Raises InputError when the text does not give that many types, or out is in use.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"{out} is in use; give --out a new or empty folder")
    texts = list(texts) if isinstance(texts, Iterator) else texts
    trained = (_train_wordpiece if kind == "wordpiece" else _train_bpe)(texts, vocab_size, lowercase)
    found = trained.get_vocab_size()
    if found > vocab_size:
        raise InputError(f"vocab_size is {vocab_size}; its characters alone make {found} types, expected at least that")
    if found < vocab_size:
        raise InputError(
            f"vocab_size is {vocab_size}, but the text gives {found} types; ask for {found} or give more text"
        )
    _write_folder(trained, out)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> str:
    """sha256 of what decides the ids: tokenizer.json without truncation and padding, keys sorted."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    for passing in ("truncation", "padding"):
        content.pop(passing, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def load_tokenizer(folder_or_name: str | Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer for masked language modelling.

    Raises InputError when it cannot be opened, is not a fast one, or has no padding, unknown, [CLS], [SEP] or [MASK].
    """
    where = str(folder_or_name)
    path = Path(where)
    if (where.startswith((".", "/", "~")) or where.endswith("/") or where.count("/") > 1) and not path.is_dir():
        raise InputError(f"tokenizer {where}: no such folder; make one with encoderkit-pretrain tokenizer")
    if path.is_dir() and not any(
        (path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        raise InputError(
            f"tokenizer {where}: the folder holds no tokenizer.json; make one with encoderkit-pretrain tokenizer"
        )
    from transformers import AutoConfig, AutoTokenizer

    from encoderkit.encoder.configuration_encoderkit import EncoderkitConfig

    # transformers asks what kind of model a tokenizer is for; all of encoderkit.encoder.hub would take seconds.
    AutoConfig.register(EncoderkitConfig.model_type, EncoderkitConfig, exist_ok=True)

    try:
        if path.is_dir():
            check_inside(path)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=path.is_dir(), trust_remote_code=False)
    except InputError as error:
        raise InputError(f"tokenizer {where}: {error}") from error
    except Exception as error:  # whatever a damaged file or an unreachable hub raises
        raise InputError(
            f"tokenizer {where} cannot be opened, neither as a folder nor from the hub: {first_line(error)}"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer {where} has no tokenizer.json; expected a fast tokenizer")
    missing = [role for role in ROLES if getattr(tokenizer, role, None) is None]
    if missing:
        raise InputError(
            f"tokenizer {where} has no {', '.join(missing)}; masked language modelling needs {', '.join(ROLES)}"
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def run_tokenizer(settings: TokenizerSettings) -> None:
    """Train a tokenizer on corpora: the command encoderkit-pretrain tokenizer."""
    from encoderkit.pretrain.corpora import Corpora
    from encoderkit.pretrain.terminal import plain_console

    corpora = Corpora(
        settings.sources,
        text_column=settings.text_column,
        documents=settings.documents,
        invalid_utf8=settings.invalid_utf8,
    )
    out = Path(settings.out)
    train_tokenizer(settings.kind, corpora.texts(), settings.vocab_size, lowercase=settings.lowercase, out=out)
    plain_console().print(
        f"{out}: {settings.kind} tokenizer of {settings.vocab_size:,} types, from {corpora.num_documents:,} documents, "
        f"{corpora.num_characters:,} characters"
    )


def _train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = _alphabet(texts, tokenizer.normalizer, min(MAX_ALPHABET, max(64, vocab_size // 16)))
    # Types that continue a word would get ids in the order of a hash map; as "special" ones they get ours. Characters
    # that always stand alone, such as punctuation, never continue a word.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    continuing = [f"##{letter}" for letter in alphabet if len(split(f"a{letter}")) == 1 and not letter.isspace()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + continuing,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batched(texts), trainer)
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = decoders.WordPiece(prefix="##")
    return trained


def _train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batched(texts), trainer)
    return tokenizer


def _alphabet(texts: Iterable[str], normalizer, size: int) -> list[str]:
    """The most frequent characters of the normalised text, at most size of them, in code point order."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for batch in _batched(texts):
        codes, numbers = np.unique(np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32), return_counts=True)
        counts[codes] += numbers
    normalised: dict[str, int] = {}
    for code in np.flatnonzero(counts):
        for letter in normalizer.normalize_str(chr(code)).strip():
            normalised[letter] = normalised.get(letter, 0) + int(counts[code])
    ranked = sorted(normalised, key=lambda letter: (-normalised[letter], letter))
    return sorted(ranked[:size])


def _batched(texts: Iterable[str], characters: int = 1_000_000) -> Iterator[list[str]]:
    """Texts in lists of about this many characters."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    yield batch


def _write_folder(tokenizer: Tokenizer, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **dict(zip(ROLES, SPECIAL_TOKENS)),
    )
    fast.save_pretrained(str(out))
    # transformers 5 writes its new class name, which transformers 4 does not know; both open this one.
    config = json.loads((out / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
