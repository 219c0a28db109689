import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig, LocalAttention, preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.attention import AttentionMask, Choice
from encoderkit.kernels.reference_attention import visible
from encoderkit.pretrain.flops import forward_flops


@pytest.fixture(autouse=True)
def not_rounded(monkeypatch):
    """Pad tokens are not counted as work."""
    monkeypatch.setattr("encoderkit.encoder.model.CPU_MULTIPLE", 1)


def test_count_equals_what_torch_counts():
    """torch counts every matrix product that runs; one sequence, by the kernel that is written out in products."""
    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96}
    for architecture, overrides in (
        ("bert", {}),
        ("modern", {"local_attention": None}),
        ("bert", {"positions": "alibi", "feed_forward": "swiglu", "tied_decoder": False}),
    ):
        config = preset(architecture, "tiny", vocab_size=640, **sizes, **overrides)
        model = MaskedLM(config).eval()
        model.encoder.use_attention({"global": Choice("reference", "")})
        batch = TokenBatch.from_sequences([list(range(5, 101))], targets=[dict.fromkeys(range(0, 96, 4), 7)])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch)
        assert forward_flops(config, batch) == counter.get_total_flops()


LENGTHS = (40, 96, 40, 48)  # equal ones, and multiples of the grain, their thirds too: nothing is padded


def executed(config: EncoderConfig, *, learns: bool) -> tuple[float, TokenBatch]:
    """What torch counts in a pass over several packed sequences, backward too where it learns; and the batch.

    In bf16, where the torch backend multiplies by products that torch counts.
    """
    torch.manual_seed(0)
    model = MaskedLM(config)
    sequences = [list(range(5, 5 + length)) for length in LENGTHS]
    batch = TokenBatch.from_sequences(sequences, targets=[dict.fromkeys(range(0, n, 3), 7) for n in LENGTHS])
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learns):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch).loss
        if learns:
            loss.backward()
    return counter.get_total_flops(), batch


SMALL = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96}
SMALL |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "vocab_size": 640}


@pytest.mark.parametrize(("architecture", "changes"), [("bert", {}), ("modern", {"local_attention": None})])
def test_a_backward_pass_costs_two_forward_passes_over_several_sequences_too(architecture, changes):
    config = preset(architecture, "tiny", **SMALL, **changes)
    for learns, passes in ((False, 1), (True, 3)):
        counted, batch = executed(config, learns=learns)
        assert counted == passes * forward_flops(config, batch)


def test_windows_are_counted_once_and_no_key_outside_of_them():
    """The count lies between the pairs that see each other and what the tiles of the torch backend compute."""
    config = preset("modern", "tiny", **SMALL, local_attention=LocalAttention(window_tokens=9, global_every=3))
    windows = sum(not config.is_global(layer) for layer in range(config.num_layers))
    counted, batch = executed(config, learns=True)
    without_pairs = forward_flops(config, batch) - windows * 4 * 64 * sum(n * min(n, 19) for n in LENGTHS)
    seen = visible(AttentionMask(batch.segments, window_tokens=9)).sum().item()
    assert without_pairs + windows * 4 * 64 * seen < forward_flops(config, batch) < counted / 3
