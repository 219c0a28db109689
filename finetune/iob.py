"""Chunk tags: B-TYPE begins a chunk, I-TYPE goes on, O is outside. IOB2 is checked, IOB1 converted; no torch."""

from __future__ import annotations

from collections.abc import Iterable

from encoderkit.kernels.errors import InputError


def is_iob(names: Iterable[str]) -> bool:
    """Whether these are chunk tags: some begin with B- or I-."""
    return any(name.startswith(("B-", "I-")) for name in names)


def check_iob2(source: str, rows: list[int], tags: list[list[int]], names: list[str]) -> None:
    """Raise InputError naming the first row whose tags are not IOB2 (Ratnaparkhi 1998): every chunk begins with B-."""
    for row, indices in zip(rows, tags):
        before = "O"
        for position, tag in enumerate([names[i] for i in indices], 1):
            fits = tag == "O" or (len(tag) > 2 and tag[:2] in ("B-", "I-"))
            if not fits or (tag[0] == "I" and before[1:] != tag[1:]):
                raise InputError(
                    f"{source}: row {row}, word {position}: tag {tag} after {before} is not IOB2; mend it, or set "
                    "--data.iob1 true where tags are IOB1"
                )
            before = tag


def from_iob1(indices: list[int], names: list[str]) -> list[int]:
    """IOB2 of IOB1 (Ramshaw and Marcus 1995): I- that begins a chunk becomes B-. InputError where names lack that."""
    converted, before = [], "O"
    for tag in (names[i] for i in indices):
        begins = tag.startswith("I-") and before[1:] != tag[1:]
        name = f"B-{tag[2:]}" if begins else tag
        if name not in names:
            raise InputError(f"data.labels has {tag} and no {name}, which IOB2 begins its chunks with; add {name}")
        converted.append(names.index(name))
        before = tag
    return converted
