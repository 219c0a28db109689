"""What flows through the encoder: one flat run of tokens, and the positions that are read afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encoderkit.kernels.segments import Segments

IGNORE_INDEX = -100  # a target that counts for nothing: padding up to a fixed number of targets


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Packed sequences and the positions whose hidden states are read.

    input_ids: (T,) int64. segments: of the T tokens. position_ids: (T,) int64, from 0 in each sequence.
    token_type_ids: (T,) int64, or None where the model has none. target_positions: (M,) int64 into the T tokens,
    ascending: masked tokens, or the pooled token of each sequence. target_segments: how many of the M positions lie in
    each of the segments (same number of segments, empty ones included). targets: (M,) int64 token ids with
    IGNORE_INDEX where a position counts for nothing, or None where nothing is learned. pair_reads: (R,) int64, which of
    the M positions are the first tokens of sentence pairs, and pair_labels: (R,) int64, 0 where the second part belongs
    there, 1 where not, IGNORE_INDEX where a pair counts for nothing; both None without pairs.
    """

    input_ids: Tensor
    segments: Segments
    position_ids: Tensor
    target_positions: Tensor
    target_segments: Segments
    targets: Tensor | None = None
    token_type_ids: Tensor | None = None
    pair_reads: Tensor | None = None
    pair_labels: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        targets: Sequence[dict[int, int]] | None = None,
        token_types: Sequence[Sequence[int]] | None = None,
    ) -> TokenBatch:
        """Pack token id lists; targets[s] maps a position of sequence s to its target id.

        Without targets the first token of each sequence is the position that is read. Raises ValueError where a
        position lies outside its sequence, as the first does in an empty one.
        """
        lengths = [len(sequence) for sequence in sequences]
        segments = Segments.from_lengths(lengths)
        starts = segments.cu_seqlens[:-1].tolist()
        reads = [{0: IGNORE_INDEX} for _ in sequences] if targets is None else targets
        for number, (length, read) in enumerate(zip(lengths, reads)):
            if any(not 0 <= position < length for position in read):
                raise ValueError(f"sequence {number} of {length} tokens is read at {sorted(read)}; no such position")
        positions = [start + p for start, read in zip(starts, reads) for p in sorted(read)]
        return cls(
            input_ids=_flat(sequences),
            segments=segments,
            position_ids=_flat([range(n) for n in lengths]),
            target_positions=torch.tensor(positions, dtype=torch.int64),
            target_segments=Segments.from_lengths([len(read) for read in reads]),
            targets=None if targets is None else _flat([[read[p] for p in sorted(read)] for read in reads]),
            token_type_ids=None if token_types is None else _flat(token_types),
        )

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> TokenBatch:
        """Pack a padded (B, L) batch; attention_mask is 1 on real tokens. Every real token is a read position."""
        keep_BL = attention_mask.bool()
        segments = Segments.from_lengths(keep_BL.sum(1)).to(input_ids.device)
        positions_BL = (keep_BL.long().cumsum(1) - 1).clamp(min=0)
        return cls(
            input_ids=input_ids[keep_BL],
            segments=segments,
            position_ids=positions_BL[keep_BL],
            target_positions=torch.arange(segments.total, device=input_ids.device),
            target_segments=segments,
            token_type_ids=None if token_type_ids is None else token_type_ids[keep_BL],
        )

    def rounded(self, multiple: int, pad_token_id: int) -> TokenBatch:
        """The same batch with T and M rounded up to multiples.

        Pad tokens are segments of their own at the end, at position 0. What is read in addition is the last token,
        without a target.
        """
        T, M = len(self.input_ids), len(self.target_positions)
        pads, reads = -T % multiple, -M % multiple
        if not pads and not reads:
            return self
        device, types, targets = self.input_ids.device, self.token_type_ids, self.targets
        pieces = [min(self.segments.longest, pads - at) for at in range(0, pads, self.segments.longest or 1)]
        lengths_S = torch.cat([self.segments.lengths, torch.tensor(pieces, dtype=torch.int32)])
        counts_S = F.pad(self.target_segments.lengths, (0, len(pieces)))
        counts_S[lengths_S.nonzero()[-1]] += reads
        return replace(
            self,
            input_ids=F.pad(self.input_ids, (0, pads), value=pad_token_id),
            segments=Segments.from_lengths(lengths_S, longest=self.segments.longest).to(device),
            position_ids=F.pad(self.position_ids, (0, pads)),
            target_positions=F.pad(self.target_positions, (0, reads), value=T + pads - 1),
            target_segments=Segments.from_lengths(counts_S).to(device),
            targets=None if targets is None else F.pad(targets, (0, reads), value=IGNORE_INDEX),
            token_type_ids=None if types is None else F.pad(types, (0, pads)),
        )

    def num_targets(self) -> Tensor:
        """How many targets count, () int64."""
        if self.targets is None:
            raise ValueError("this batch has no targets")
        return (self.targets != IGNORE_INDEX).sum()

    def num_pairs(self) -> Tensor:
        """How many sentence pairs count, () int64."""
        if self.pair_labels is None:
            return torch.zeros((), dtype=torch.int64, device=self.input_ids.device)
        return (self.pair_labels != IGNORE_INDEX).sum()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """The same batch on device; segment lengths stay on the CPU."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        """The same batch in memory that a GPU copies from while the host goes on."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> TokenBatch:
        moved: dict[str, Any] = {name: None if part is None else move(part) for name, part in vars(self).items()}
        return TokenBatch(**moved)


def to_padded(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Lay packed (T, ...) values out as (B, L, ...), zeros where attention_mask (B, L) is 0."""
    padded = values.new_zeros(*attention_mask.shape, *values.shape[1:])
    return padded.masked_scatter(attention_mask.bool().view(*attention_mask.shape, *[1] * (values.dim() - 1)), values)


def _flat(lists: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([item for part in lists for item in part], dtype=torch.int64)
