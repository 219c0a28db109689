"""Packed batches from lists and from padded tensors."""

import pytest
import torch

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch, to_padded


def test_padded_batch_round_trip():
    lengths = torch.tensor([4, 1, 3])
    mask_BL = torch.arange(4)[None] < lengths[:, None]
    ids_BL = torch.arange(12).view(3, 4) * mask_BL
    batch = TokenBatch.from_padded(ids_BL, mask_BL.long())
    assert torch.equal(to_padded(batch.input_ids, mask_BL.long()), ids_BL)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]


def test_lists_are_packed_and_read_where_asked():
    batch = TokenBatch.from_sequences([[7, 8, 9], [], [5]], targets=[{2: 4, 0: 3}, {}, {0: IGNORE_INDEX}])
    assert batch.target_positions.tolist() == [0, 2, 3]
    assert batch.targets.tolist() == [3, 4, IGNORE_INDEX]
    assert batch.target_segments.lengths.tolist() == [2, 0, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]


def test_no_sequences_are_an_empty_batch():
    batch = TokenBatch.from_sequences([])
    assert batch.input_ids.shape == batch.position_ids.shape == batch.target_positions.shape == (0,)


@pytest.mark.parametrize("targets", [None, [{0: 1}, {}, {1: 1}], [{-1: 1}, {}, {}]])
def test_reading_another_sequence_is_refused(targets):
    with pytest.raises(ValueError, match=r"sequence \d of \d tokens is read at"):
        TokenBatch.from_sequences([[7, 8, 9], [], [5]], targets=targets)
