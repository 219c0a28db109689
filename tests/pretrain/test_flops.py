import torch

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.attention import Choice
from encoderkit.pretrain.flops import forward_flops


def test_count_equals_what_torch_counts():
    """torch counts every matrix product that runs; one sequence, by the kernel that is written out in products."""
    from torch.utils.flop_counter import FlopCounterMode

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
