import torch

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.pretrain.flops import forward_flops


def test_count_equals_what_torch_counts():
    """torch counts every matrix product that runs; sequences of one length, so that no kernel pads."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96}
    for architecture, overrides in (("bert", {}), ("modern", {"local_attention": None})):
        config = preset(architecture, "tiny", vocab_size=640, **sizes, **overrides)
        model = MaskedLM(config).eval()
        sequences = torch.randint(5, 640, (4, 32)).tolist()
        batch = TokenBatch.from_sequences(sequences, targets=[dict.fromkeys(range(0, 32, 4), 7)] * 4)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch)
        assert forward_flops(config, batch) == counter.get_total_flops()
