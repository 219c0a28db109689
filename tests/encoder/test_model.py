"""What packing, masking-only and the last block must not change."""

import copy
import dataclasses
import math
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.config import (
    BiasSite,
    EncoderConfig,
    FeedForward,
    HeadActivation,
    Init,
    Norm,
    NormPlacement,
    Positions,
    RopeScaling,
    preset,
)
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


# Every choice of every axis, mixed; the presets with them.
COMBINATIONS = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "modern": ("modern", {}),
    "sinusoidal-pre-rms": ("bert", {
        "positions": "sinusoidal", "norm": "rmsnorm", "norm_placement": "pre", "feed_forward": "swiglu",
        "biases": ("attention", "head"), "token_types": 0, "init": "truncated",
    }),
    "alibi-post": ("bert", {"positions": "alibi", "feed_forward": "gelu_tanh", "head_activation": "gelu_tanh"}),
    "alibi-local": ("modern", {"positions": "alibi", "global_every": 2, "window_tokens": 8, "norm": "rmsnorm"}),
    "alibi-all-local-untied": ("modern", {"positions": "alibi", "global_every": 0, "tied_decoder": False}),
    "no-positions-local": ("bert", {"positions": "none", "window_tokens": 8, "embedding_norm": False}),
    "rope-post-untied": ("bert", {
        "positions": "rope", "tied_decoder": False, "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        "init": "depth_scaled",
    }),
    "ntk-no-bias": ("modern", {
        "rope_scaling": RopeScaling(kind="ntk", factor=2.0), "biases": (), "embedding_norm": False, "token_types": 3,
    }),
    "learned-pre-geglu-pairs": ("bert", {
        "norm_placement": "pre", "feed_forward": "geglu", "sentence_pairs": True, "biases": ("norm", "decoder"),
    }),
    "learned-local-swiglu": ("roberta", {"feed_forward": "swiglu", "window_tokens": 4, "global_every": 4}),
}  # fmt: skip


@pytest.fixture(params=list(COMBINATIONS))
def combination(request):
    return COMBINATIONS[request.param]


def every_third(sequences) -> list[dict[int, int]]:
    return [{p: (7 * p + s) % VOCAB for p in range(0, len(seq), 3)} for s, seq in enumerate(sequences)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, PACKING_FP32), (torch.float64, PACKING_FP64)])
def test_packed_equals_one_by_one(combination, dtype, tolerance):
    architecture, fields = combination
    model, sequences = make_model(architecture, dtype, **fields), random_sequences()
    targets = every_third(sequences)
    with torch.no_grad():
        packed = model.logits(TokenBatch.from_sequences(sequences, targets=targets))
        alone = [model.logits(TokenBatch.from_sequences([s], targets=[t])) for s, t in zip(sequences, targets)]
    assert (packed - torch.cat(alone)).abs().max() < tolerance


def test_nothing_leaks_between_packed_sequences(combination):
    architecture, fields = combination
    model, sequences = make_model(architecture, **fields), random_sequences()
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
    torch._dynamo.reset()
    counters.clear()
    compiled.encoder.compile_blocks(backend="aot_eager")
    graphs = []
    for n in range(12):
        sequences = random_sequences((20 + 18 * n, 3, 60 + 9 * (n % 3)), seed=n)
        batch = TokenBatch.from_sequences(sequences, targets=every_third(sequences))
        for model in (plain, compiled):
            model.train(n % 4 != 3)
            model.zero_grad()
            model(batch).loss.backward()
        for a, b in zip(plain.parameters(), compiled.parameters()):
            assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] < graphs[1] < graphs[3] == graphs[-1]  # static, dynamic, and the first evaluation


def test_cuda_graphs_are_asked_for_and_every_pass_is_marked(monkeypatch):
    modes, marks = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: modes.append(options["mode"]))
    monkeypatch.setattr(torch, "compile", lambda function, **options: modes.append(options["mode"]) or function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    model, batch = make_model(), TokenBatch.from_sequences(random_sequences())
    model.encoder.compile_blocks()
    model.logits(batch)
    assert (set(modes), marks) == ({None}, [])
    modes.clear()
    model.encoder.compile_blocks(cuda_graphs=True)
    for _ in range(3):
        model.logits(batch)
    assert (modes, len(marks)) == (["reduce-overhead"] * 5, 3)


def test_a_copy_of_compiled_blocks_runs_its_own_weights():
    plain, compiled = make_model("bert", torch.float32), make_model("bert", torch.float32)
    compiled.encoder.compile_blocks(backend="eager")
    copied, batch = copy.deepcopy(compiled), TokenBatch.from_sequences(random_sequences())
    with torch.no_grad():
        for model in (plain, copied):
            model.encoder.blocks[-1].attention.out.weight.mul_(2)
        assert torch.equal(copied.logits(batch), plain.logits(batch))
        assert not torch.equal(copied.logits(batch), compiled.logits(batch))


@pytest.mark.parametrize("name", ["modern", "bert", "alibi-local", "sinusoidal-pre-rms"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_compiled_blocks_have_no_graph_breaks(name, checkpointed):
    architecture, fields = COMBINATIONS[name]
    plain, compiled = (make_model(architecture, torch.float32, **fields).train() for _ in range(2))
    plain.encoder.checkpoint_blocks = compiled.encoder.checkpoint_blocks = checkpointed
    torch._dynamo.reset()
    counters.clear()
    compiled.encoder.compile_blocks(backend="eager")
    graphs = []
    for lengths in ((20, 3, 90), (110, 104), (33, 1, 2, 8), (120, 5)):
        sequences = random_sequences(lengths)
        batch = TokenBatch.from_sequences(sequences, targets=every_third(sequences))
        losses = []
        for model in (plain, compiled):
            torch.manual_seed(0)  # dropout
            losses.append(model(batch).loss)
            losses[-1].backward()
        assert torch.isclose(*losses)
        graphs.append(counters["stats"]["unique_graphs"])
    assert sum(counters["graph_break"].values()) == 0
    assert 0 < graphs[0] < graphs[1] == graphs[-1]  # the second batch shows what varies; nothing is built after it


@pytest.mark.parametrize("lengths", [(20, 3, 11), (1,), (0, 7, 0), (32, 32), (20, 12)])
@pytest.mark.parametrize("name", ["bert", "modern", "alibi-local"])
def test_rounded_batches_give_the_same(name, lengths, monkeypatch):
    """Sequences as long as the encoder takes, empty ones too; positions are fewer than pad tokens."""
    architecture, fields = COMBINATIONS[name]
    model = make_model(architecture, **fields, max_positions=max(lengths))
    sequences = random_sequences(lengths)
    batch = TokenBatch.from_sequences(sequences, targets=every_third(sequences))
    batch = dataclasses.replace(batch, token_type_ids=batch.input_ids % 2) if model.config.token_types else batch
    rounded = batch.rounded(32, pad_token_id=0)
    assert len(rounded.input_ids) % 32 == len(rounded.target_positions) % 32 == 0
    assert rounded.segments.total == len(rounded.input_ids)
    assert rounded.target_segments.total == len(rounded.target_positions)
    assert int(rounded.num_targets()) == int(batch.num_targets())
    results = []
    for multiple in (32, 1):
        monkeypatch.setattr("encoderkit.encoder.model.CPU_MULTIPLE", multiple)
        loss = model(batch).loss
        grads = torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True)
        results.append([loss, model.logits(batch), *grads])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_first_loss_is_that_of_a_uniform_guess(combination):
    architecture, fields = combination
    torch.manual_seed(0)
    model = MaskedLM(preset(architecture, "tiny", vocab_size=8192, **{"max_positions": 512, **fields})).eval()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(5, 8192, (100,), generator=generator).tolist() for _ in range(8)]
    targets = [{p: s[p] for p in range(1, 100, 3)} for s in sequences]
    masked = [[4 if p in t else token for p, token in enumerate(s)] for s, t in zip(sequences, targets)]
    result = model(TokenBatch.from_sequences(masked, targets=targets))
    assert abs(result.loss.item() / result.count.item() / math.log(8192) - 1) < 0.02


def test_overfits_one_batch(combination):
    architecture, fields = combination
    model = make_model(architecture, torch.float32, hidden_dropout=0.0, attention_dropout=0.0, **fields).train()
    sequences = random_sequences((30, 20, 25))
    batch = TokenBatch.from_sequences(sequences, targets=every_third(sequences))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        result = model(batch)
        loss = result.loss / result.count
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


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


AXES = {
    "preset": st.sampled_from(["bert", "roberta", "modern"]),
    "positions": st.sampled_from(get_args(Positions)),
    "rope_scaling": st.sampled_from([None, RopeScaling(kind="linear", factor=2.0), RopeScaling(factor=4.0)]),
    "window_tokens": st.sampled_from([None, 2, 20]),
    "global_every": st.sampled_from([None, 0, 1, 2]),
    "local_rope_base": st.sampled_from([None, 500.0]),
    "norm": st.sampled_from(get_args(Norm)),
    "norm_placement": st.sampled_from(get_args(NormPlacement)),
    "embedding_norm": st.booleans(),
    "feed_forward": st.sampled_from(get_args(FeedForward)),
    "head_activation": st.sampled_from(get_args(HeadActivation)),
    "biases": st.lists(st.sampled_from(get_args(BiasSite)), unique=True),
    "token_types": st.integers(0, 2),
    "tied_decoder": st.booleans(),
    "sentence_pairs": st.booleans(),
    "init": st.sampled_from(get_args(Init)),
    "num_heads": st.sampled_from([1, 2, 3]),
}


@settings(max_examples=40, derandomize=True)
@given(st.fixed_dictionaries(AXES))
def test_any_combination_learns_or_is_refused_by_name(drawn):
    fields = {name: value for name, value in drawn.items() if name != "preset" and value is not None}
    sizes = {"hidden_size": 16, "num_layers": 3, "intermediate_size": 24, "max_positions": 16}
    try:
        config = preset(drawn["preset"], "tiny", vocab_size=VOCAB, **sizes, **fields)
    except InputError as error:
        named = re.findall(r"model\.(\w+)", str(error))
        assert named
        assert named[0] in {*fields, "hidden_size"}
        return
    torch.manual_seed(0)
    model, sequences = MaskedLM(config), random_sequences((12, 3, 7))
    batch = TokenBatch.from_sequences(sequences, targets=[{0: IGNORE_INDEX, 1: 6, 2: 9}] * 3)
    if config.sentence_pairs:
        batch = dataclasses.replace(batch, pair_reads=torch.tensor([0, 3, 6]), pair_labels=torch.tensor([0, 1, 1]))
    tokens, pairs = model.losses(batch)
    (tokens.loss + pairs.loss).backward()
    assert tokens.loss.isfinite()
    assert (pairs.loss > 0) == config.sentence_pairs
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_gradient_checkpointing_changes_no_bit(combination):
    architecture, fields = combination
    plain, saving = (make_model(architecture, torch.float32, **fields).train() for _ in range(2))
    saving.encoder.checkpoint_blocks = True
    batch = TokenBatch.from_sequences(random_sequences(), targets=every_third(random_sequences()))
    held = []
    for model in (plain, saving):
        torch.manual_seed(5)  # dropout
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(batch).loss
        held.append(kept)
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    assert held[1] < held[0] / 2


def test_alibi_does_not_see_order_but_distance():
    """A sequence read backwards gives the same hidden states backwards: the slopes are equal to both sides."""
    model = make_model("bert", positions="alibi", token_types=0)
    (sequence,) = random_sequences((40,))
    targets = dict.fromkeys(range(40), 0)
    with torch.no_grad():
        there = model.logits(TokenBatch.from_sequences([sequence], targets=[targets]))
        back = model.logits(TokenBatch.from_sequences([sequence[::-1]], targets=[targets]))
        swapped = model.logits(TokenBatch.from_sequences([sequence[20:] + sequence[:20]], targets=[targets]))
    assert (there - back.flip(0)).abs().max() < PACKING_FP64
    assert (there - swapped.roll(20, 0)).abs().max() > 1e-6


def test_bare_import_makes_no_second_copy():
    import runpy
    from pathlib import Path

    import encoderkit.encoder

    with pytest.raises(ImportError, match=r"import encoderkit\.encoder, not encoder"):
        runpy.run_path(str(Path(encoderkit.encoder.__file__)), run_name="encoder")
    assert EncoderConfig.__module__ == "encoderkit.encoder.config"
