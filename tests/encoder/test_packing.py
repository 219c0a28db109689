"""Packing isolation, drawn: whatever lengths, places of targets and presets, no sequence sees another."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM

PACKING_FP64 = 1e-12  # packed against one by one, absolute
VOCAB = 50
LENGTHS = st.lists(st.integers(1, 40), min_size=2, max_size=8)


@functools.cache
def model_of(architecture: str) -> MaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24, "max_positions": 64}
    window = {"window_tokens": 4} if architecture == "modern" else {}
    return MaskedLM(preset(architecture, "tiny", vocab_size=VOCAB, **sizes, **window)).eval().double()


def logits(model: MaskedLM, sequences: list[list[int]], places: list[int]) -> list[torch.Tensor]:
    """Of every second token of each sequence from its place on, in one batch."""
    targets = [dict.fromkeys(range(place, len(ids), 2), 7) for ids, place in zip(sequences, places, strict=True)]
    with torch.no_grad():
        return list(model.logits(TokenBatch.from_sequences(sequences, targets=targets)).split(list(map(len, targets))))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modern"])
@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.data())
def test_no_sequence_of_any_packing_sees_another(architecture, lengths, data):
    model, tokens = model_of(architecture), st.integers(5, VOCAB - 1)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    sequences = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    places = [data.draw(st.integers(0, min(1, n - 1))) for n in lengths]
    packed = logits(model, sequences, places)
    for ids, place, found in zip(sequences, places, packed, strict=True):
        (alone,) = logits(model, [ids], [place])
        assert (found - alone).abs().max() < PACKING_FP64
    changed = data.draw(st.integers(0, len(lengths) - 1))
    at = data.draw(st.integers(0, lengths[changed] - 1))
    others = [list(ids) for ids in sequences]
    others[changed][at] = data.draw(tokens)
    for i, (before, after) in enumerate(itertools.zip_longest(packed, logits(model, others, places))):
        assert i == changed or torch.equal(before, after)  # the leak is exactly 0
