"""What packing, masking-only and the last block must not change."""

import math

import pytest
import torch
import torch.nn.functional as F

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch, to_padded
from encoderkit.encoder.config import EncoderConfig, preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.segments import Segments

PACKING_FP32 = 2e-6  # packed against one by one, absolute
PACKING_FP64 = 1e-12
VOCAB = 331


def make_model(architecture="modern", dtype=torch.float64, **overrides) -> MaskedLM:
    sizes = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "intermediate_size": 96, "max_positions": 256}
    torch.manual_seed(0)
    return MaskedLM(preset(architecture, "tiny", vocab_size=VOCAB, **{**sizes, **overrides})).eval().to(dtype)


def random_sequences(lengths=(140, 3, 57, 1, 90), seed=1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def every_third(sequences) -> list[dict[int, int]]:
    return [{p: (7 * p + s) % VOCAB for p in range(0, len(seq), 3)} for s, seq in enumerate(sequences)]


@pytest.mark.parametrize("architecture", ["bert", "modern"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, PACKING_FP32), (torch.float64, PACKING_FP64)])
def test_packed_equals_one_by_one(architecture, dtype, tolerance):
    model, sequences = make_model(architecture, dtype), random_sequences()
    targets = every_third(sequences)
    with torch.no_grad():
        packed = model.logits(TokenBatch.from_sequences(sequences, targets=targets))
        alone = [model.logits(TokenBatch.from_sequences([s], targets=[t])) for s, t in zip(sequences, targets)]
    assert (packed - torch.cat(alone)).abs().max() < tolerance


@pytest.mark.parametrize("architecture", ["bert", "modern"])
def test_nothing_leaks_between_packed_sequences(architecture):
    model, sequences = make_model(architecture), random_sequences()
    changed = [sequences[0], sequences[1], random_sequences((57,), seed=9)[0], *sequences[3:]]
    targets = every_third(sequences)
    with torch.no_grad():
        before = model.logits(TokenBatch.from_sequences(sequences, targets=targets))
        after = model.logits(TokenBatch.from_sequences(changed, targets=targets))
    start, stop = len(targets[0]) + len(targets[1]), sum(len(t) for t in targets[:3])
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[stop:], after[stop:])
    assert not torch.equal(before[start:stop], after[start:stop])


@pytest.mark.parametrize("num_layers", [3, 4])  # the last block: with a window, and global
def test_loss_at_masked_positions_equals_full_logit_loss(num_layers):
    model, sequences = make_model(num_layers=num_layers), random_sequences()
    targets = every_third(sequences)
    result = model(TokenBatch.from_sequences(sequences, targets=targets))
    result.loss.backward()
    masked = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    everywhere = [{p: t.get(p, IGNORE_INDEX) for p in range(len(s))} for s, t in zip(sequences, targets)]
    batch = TokenBatch.from_sequences(sequences, targets=everywhere)
    full = F.cross_entropy(model.logits(batch), batch.targets, ignore_index=IGNORE_INDEX, reduction="sum")
    full.backward()
    assert abs(full - result.loss) < 1e-12 * abs(full)
    assert result.count == sum(len(t) for t in targets)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - masked[name]).norm() <= 1e-12 * max(masked[name].norm(), 1.0), name


def test_fixed_shapes_change_nothing():
    model, sequences = make_model(), random_sequences()
    targets = every_third(sequences)
    batch = TokenBatch.from_sequences(sequences, targets=targets)
    M, extra, pad = len(batch.targets), 5, 6
    padded = TokenBatch(  # a pad segment at the end, targets padded there, empty segments behind
        input_ids=F.pad(batch.input_ids, (0, pad)),
        segments=Segments.from_lengths([*map(len, sequences), pad], pad_to=12, longest=200),
        position_ids=torch.cat([batch.position_ids, torch.arange(pad)]),
        target_positions=F.pad(batch.target_positions, (0, extra), value=len(batch.input_ids) + pad - 1),
        target_segments=Segments.from_lengths([*map(len, targets), extra], pad_to=12, longest=200),
        targets=F.pad(batch.targets, (0, extra), value=IGNORE_INDEX),
    )
    plain, fixed = model(batch), model(padded)
    assert fixed.count == plain.count == M
    assert abs(fixed.loss - plain.loss) < 1e-12 * plain.loss


def test_compiled_blocks_take_batches_of_all_shapes():
    """More shapes than torch would recompile for by default, in training and evaluation: one graph must serve them."""
    plain, compiled = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    compiled.encoder.compile_blocks(backend="aot_eager")
    for n in range(12):
        sequences = random_sequences((20 + 7 * n, 3, 5 + 9 * (n % 3)), seed=n)
        batch = TokenBatch.from_sequences(sequences, targets=every_third(sequences))
        for model in (plain, compiled):
            model.train(n % 4 != 3)
            model.zero_grad()
            model(batch).loss.backward()
        for a, b in zip(plain.parameters(), compiled.parameters()):
            assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm()


def test_padded_batch_round_trip():
    lengths = torch.tensor([4, 1, 3])
    mask_BL = torch.arange(4)[None] < lengths[:, None]
    ids_BL = torch.arange(12).view(3, 4) * mask_BL
    batch = TokenBatch.from_padded(ids_BL, mask_BL.long())
    assert torch.equal(to_padded(batch.input_ids, mask_BL.long()), ids_BL)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]


@pytest.mark.parametrize("architecture", ["bert", "modern"])
def test_first_loss_is_that_of_a_uniform_guess(architecture):
    torch.manual_seed(0)
    model = MaskedLM(preset(architecture, "tiny", vocab_size=8192, max_positions=512)).eval()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(5, 8192, (100,), generator=generator).tolist() for _ in range(8)]
    targets = [{p: s[p] for p in range(1, 100, 3)} for s in sequences]
    masked = [[4 if p in t else token for p, token in enumerate(s)] for s, t in zip(sequences, targets)]
    result = model(TokenBatch.from_sequences(masked, targets=targets))
    assert abs(result.loss.item() / result.count.item() / math.log(8192) - 1) < 0.02


@pytest.mark.parametrize("architecture", ["bert", "modern"])
def test_overfits_one_batch(architecture):
    model = make_model(architecture, torch.float32, hidden_dropout=0.0, attention_dropout=0.0).train()
    sequences = random_sequences((30, 20, 25))
    batch = TokenBatch.from_sequences(sequences, targets=every_third(sequences))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        result = model(batch)
        optimizer.zero_grad()
        (result.loss / result.count).backward()
        optimizer.step()
    assert result.loss / result.count < 0.1


def test_padding_rows_of_the_token_table_are_never_predicted():
    model, sequences = make_model(), random_sequences()
    batch = TokenBatch.from_sequences(sequences, targets=every_third(sequences))
    assert model.logits(batch).shape == (len(batch.targets), VOCAB)
    before = model(batch).loss
    before.backward()
    rows = model.encoder.embeddings.tokens.weight
    assert rows.grad[VOCAB:].abs().max() == 0
    with torch.no_grad():
        rows[VOCAB:] = 100.0
    assert model(batch).loss == before


def test_longer_than_the_positions_is_refused():
    with pytest.raises(InputError, match="257 tokens; this encoder takes at most 256"):
        make_model()(TokenBatch.from_sequences([[7] * 257], targets=[{0: 1}]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layers": -1}, "model.num_layers is -1"),
        ({"hidden_dropout": 1.5}, "model.hidden_dropout is 1.5; expected 0 <= p < 1"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size 100 over model.num_heads 3"),
        ({"depth": 3}, "unknown model field depth"),
        ({"window_tokens": 8}, "model.window_tokens is 8; this encoder has no local attention"),
    ],
)
def test_impossible_configurations_are_refused_by_name(overrides, message):
    with pytest.raises(InputError, match=message):
        preset("bert", "tiny", vocab_size=100, **overrides)


def test_local_attention_of_a_preset_can_be_changed():
    config = preset("modern", "tiny", vocab_size=100, num_layers=4, window_tokens=8, global_every=2)
    assert (config.local_attention.window_tokens, config.local_attention.rope_base) == (8, 10_000.0)
    assert [config.is_global(layer) for layer in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("architecture", "size", "millions"),
    [("bert", "tiny", 4.4), ("bert", "mini", 11.2), ("bert", "small", 28.8), ("bert", "base", 109.5)],
)
def test_parameter_counts_are_the_published_ones(architecture, size, millions):
    """Turc et al. 2019, table 1: encoder with pooler (which a masked LM lacks) and without the prediction head."""
    config = preset(architecture, size, vocab_size=30522)
    with torch.device("meta"):
        model = MaskedLM(config)
    D = config.hidden_size
    pooler, head = D * D + D, D * D + 3 * D + 30522
    assert round((model.num_parameters() - head + pooler) / 1e6, 1) == pytest.approx(millions, abs=0.11)


def test_modern_base_has_149_million_parameters():
    """Warner et al. 2024: ModernBERT-base has 149M parameters at 50,368 token types."""
    with torch.device("meta"):
        model = MaskedLM(preset("modern", "base", vocab_size=50368))
    assert model.num_parameters() / 1e6 == pytest.approx(149.7, abs=0.5)


def test_bare_import_makes_no_second_copy():
    import runpy
    from pathlib import Path

    import encoderkit.encoder

    with pytest.raises(ImportError, match=r"import encoderkit\.encoder, not encoder"):
        runpy.run_path(str(Path(encoderkit.encoder.__file__)), run_name="encoder")
    assert EncoderConfig.__module__ == "encoderkit.encoder.config"
