"""Every attention kernel that runs here against the float64 reference, forward and gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.kernels import length_buckets, tile_kernels
from encoderkit.kernels.attention import AttentionMask, BackendUnavailable, attend, select_backend
from encoderkit.kernels.matrix_route import use_route
from encoderkit.kernels.reference_attention import visible
from encoderkit.kernels.segments import Segments

H, K = 2, 16
FP32, FP64 = 2e-6, 1e-12  # packed against one by one, and any kernel against the reference
SLOPES = (0.3, 1 / 64)  # steep enough to matter, flat enough to see far; the first is not exact in bf16
S = Segments.from_lengths

MASKS = {
    "equal": AttentionMask(S([32, 32, 32])),
    "ragged": AttentionMask(S([5, 33, 16, 16, 7, 20, 1])),
    "empty segments": AttentionMask(S([0, 5, 0, 33, 20], pad_to=8)),
    "nothing": AttentionMask(S([0, 0])),
    "other queries": AttentionMask(S([20, 33, 16, 7]), S([3, 40, 16, 1])),
    "some without queries": AttentionMask(S([20, 33, 16, 7, 0]), S([0, 4, 0, 7, 0])),
    "queries without keys": AttentionMask(S([20, 0, 3]), S([2, 4, 1])),
    "window": AttentionMask(S([5, 33, 40, 0, 20]), window_tokens=4),
    "window of itself": AttentionMask(S([5, 33]), window_tokens=0),
    "window as wide as the sequences": AttentionMask(S([32, 32]), window_tokens=31),
    "window on long sequences": AttentionMask(S([300, 20, 513, 256]), window_tokens=24),
    "long": AttentionMask(S([600, 100])),
    "ALiBi": AttentionMask(S([0, 5, 33, 16, 0, 7, 20]), alibi_slopes=SLOPES),
    "ALiBi in a window": AttentionMask(S([5, 33, 40, 0, 20]), window_tokens=4, alibi_slopes=SLOPES),
    "ALiBi in a window on long sequences": AttentionMask(S([300, 20, 513]), window_tokens=24, alibi_slopes=SLOPES),
    "ALiBi, long": AttentionMask(S([600, 590, 100]), alibi_slopes=SLOPES),
}


def qkv(mask: AttentionMask, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (mask.query_segments.total, mask.keys.total, mask.keys.total)
    return [torch.randn(n, H, K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in sizes]


def run(inputs: list[torch.Tensor], mask: AttentionMask, backend: str, **options) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v, in float64."""
    out = attend(*inputs, mask, backend=backend, **options)
    weight = torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape).sin()
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, inputs, weight.to(out.dtype)))]


def exact(inputs: list[torch.Tensor], mask: AttentionMask) -> list[torch.Tensor]:
    return run([x.detach().double().requires_grad_() for x in inputs], mask, "reference")


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(found, expected)]


@pytest.fixture
def written_out(monkeypatch):
    """Wide tiles take torch's flash kernel in fp32 on CPU; here they take what dropout and GPUs take."""
    monkeypatch.setattr(tile_kernels.TileKernels, "of", lambda kernels, bucket: kernels.matmul)


@pytest.fixture
def fused(monkeypatch):
    """All tiles take torch's flash kernel in fp32 on CPU."""
    monkeypatch.setattr(tile_kernels, "SAVED_KEYS", 0)
    monkeypatch.setattr(tile_kernels, "MKL_KEYS", 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32)])
@pytest.mark.parametrize("name", MASKS)
def test_torch_equals_float64_reference(name, dtype, tolerance):
    inputs = qkv(MASKS[name], dtype)
    assert max(error(run(inputs, MASKS[name], "torch"), exact(inputs, MASKS[name]))) < tolerance


@pytest.mark.parametrize("name", MASKS)
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(name):
    inputs = qkv(MASKS[name], torch.bfloat16)
    expected = exact(inputs, MASKS[name])
    eager = error(run(inputs, MASKS[name], "reference"), expected)
    for ours, theirs in zip(error(run(inputs, MASKS[name], "torch"), expected), eager):
        assert math.isfinite(ours)
        assert ours <= 2 * theirs


@pytest.mark.parametrize(
    ("route", "lengths", "is_fused"),
    [
        ("onednn", [512], False),
        ("onednn", [513], True),
        ("mkl", [128], False),
        ("mkl", [129], True),
        ("onednn", [256] * 65, True),  # 33 MiB of scores, which would not stay with the process
        ("onednn", [128] * 300, False),  # more, but narrow
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_wide_tiles_and_many_scores_are_fused_in_fp32_only(route, lengths, is_fused, dropout_p, monkeypatch):
    monkeypatch.setattr(tile_kernels, "onednn_multiplies", lambda: route == "onednn")
    mask = AttentionMask(S(lengths))
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.empty(0, H, K, dtype=dtype)
        (bucket,) = length_buckets.plan(mask, q.device, dtype).buckets
        kernel = tile_kernels.TileKernels.choose(q, mask, dropout_p, 1.0, 0).of(bucket)
        expected = is_fused and dtype == torch.float32 and not dropout_p
        assert isinstance(kernel, tile_kernels.FusedCPU) == expected


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kernel", ["written_out", "fused"])
def test_both_tile_kernels_equal_reference_in_fp32(name, kernel, request):
    request.getfixturevalue(kernel)
    inputs = qkv(MASKS[name], torch.float32)
    assert max(error(run(inputs, MASKS[name], "torch"), exact(inputs, MASKS[name]))) < FP32


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("dtype", "route"), [(torch.bfloat16, "mkl"), (torch.float32, "mkl"), (torch.float32, "onednn")]
)
def test_what_memory_held_before_is_not_read(name, dtype, route, monkeypatch):
    """Deterministic mode fills new memory with NaN."""
    monkeypatch.setattr(tile_kernels, "SAVED_KEYS", 32)  # some tiles in blocks
    before = torch.get_float32_matmul_precision()
    use_route(route)
    torch.use_deterministic_algorithms(True)
    try:
        results = run(qkv(MASKS[name], dtype), MASKS[name], "torch")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)
    assert all(bool(result.isfinite().all()) for result in results)


def test_reference_is_kernel_regression():
    mask = MASKS["ragged"]
    q, k, v = (x.detach() for x in qkv(mask, torch.float64))
    out = attend(q, k, v, mask, backend="reference")
    for i, h in itertools.product((0, 9, 60), range(H)):
        own = mask.keys.ids() == mask.keys.ids()[i]
        kernel = torch.tensor([math.exp(float(q[i, h] @ key) / math.sqrt(K)) for key in k[own, h]], dtype=torch.float64)
        regression = sum(w * value for w, value in zip(kernel, v[own, h])) / kernel.sum()
        torch.testing.assert_close(out[i, h], regression, rtol=0, atol=FP64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32)])
def test_packed_equals_one_by_one(dtype, tolerance):
    lengths = [5, 33, 16, 128, 7]
    inputs = qkv(AttentionMask(S(lengths)), dtype)
    packed = attend(*inputs, AttentionMask(S(lengths)), backend="torch")
    alone = [attend(*parts, AttentionMask(S([len(parts[0])])), backend="torch") for parts in _split(inputs, lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["equal", "ragged", "window", "window on long sequences", "long", "other queries", "ALiBi"]
)
@pytest.mark.parametrize("poison", [1000.0, float("nan"), float("inf")])
def test_nothing_leaks_between_packed_sequences(name, dtype, poison):
    mask = MASKS[name]
    inputs = qkv(mask, dtype)
    changed = [x.detach().clone() for x in inputs]
    tables = [segments.ids() == 1 for segments in (mask.query_segments, mask.keys, mask.keys)]
    for x, own in zip(changed, tables):
        x[own] = poison
    before = run(inputs, mask, "torch")
    after = run([x.requires_grad_() for x in changed], mask, "torch")
    for a, b, own in zip(before, after, [tables[0], *tables]):
        assert torch.equal(a[~own], b[~own])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_equal_inputs_give_equal_bits(name, dtype):
    inputs = qkv(MASKS[name], dtype)
    first = run(inputs, MASKS[name], "torch")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, MASKS[name], "torch")))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_keeps_the_mean_and_drops_the_share(backend):
    torch.manual_seed(0)
    mask, p, draws = AttentionMask(S([16, 12])), 0.25, 400
    q = torch.zeros(28, H, 16)
    v = torch.eye(16).repeat(2, 1)[:28, None].expand(28, H, 16).contiguous()  # outputs are the weights themselves
    found = torch.stack([attend(q, q, v, mask, dropout_p=p, backend=backend) for _ in range(draws)])
    seen = visible(mask)
    weights = found[:, :16, :, :]  # the first sequence: 16 queries, each weight 1/16 or dropped
    dropped = (weights == 0).double().mean()
    n = weights.numel()
    assert abs(float(dropped) - p) < 4 * math.sqrt(p * (1 - p) / n)
    kept = weights[weights != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 16 / (1 - p)))
    assert seen[:16, :16].all()
    assert abs(float(weights.sum(-1).mean()) - 1) < 4 * math.sqrt(p / (1 - p) / n)


@pytest.mark.parametrize("name", ["ragged", "window", "long", "ALiBi in a window on long sequences", "ALiBi, long"])
def test_dropout_drops_the_same_weights_in_the_backward_pass(name, monkeypatch):
    monkeypatch.setattr(tile_kernels, "SAVED_KEYS", 16)  # some tiles draw again, some have kept their draw
    inputs = qkv(MASKS[name], torch.float64)
    direction = [torch.randn_like(x) for x in inputs]

    def loss(step: float) -> torch.Tensor:
        torch.manual_seed(3)
        moved = [x + step * d for x, d in zip(inputs, direction)]
        return attend(*moved, MASKS[name], dropout_p=0.3, backend="torch").sin().sum()

    slope = sum(float((g * d).sum()) for g, d in zip(torch.autograd.grad(loss(0.0), inputs), direction))
    assert slope == pytest.approx(float((loss(1e-6) - loss(-1e-6)).detach()) / 2e-6, rel=1e-6)


def test_draws_differ_between_calls_and_repeat_with_the_seed():
    inputs = qkv(MASKS["ragged"], torch.float32)

    def draw() -> torch.Tensor:
        return attend(*inputs, MASKS["ragged"], dropout_p=0.5, backend="torch")

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


def test_blocks_of_a_wide_tile_draw_their_own_dropout(monkeypatch):
    monkeypatch.setattr(tile_kernels, "SAVED_KEYS", 16)
    monkeypatch.setattr(tile_kernels, "BLOCK_SCORES", 1)  # 16 queries at once
    q, v = torch.zeros(64, 1, 64), torch.eye(64)[:, None].contiguous()
    weights = attend(q, q, v, AttentionMask(S([64])), dropout_p=0.5, backend="torch")
    assert not torch.equal(weights[:16] == 0, weights[16:32] == 0)


def test_autocast_leaves_the_dtype_alone(written_out):
    inputs = qkv(MASKS["ragged"], torch.float32)
    expected = exact(inputs, MASKS["ragged"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(inputs, MASKS["ragged"], "torch")
    assert max(error(found, expected)) < FP32


def test_strided_views_of_one_projection_are_taken_as_they_are():
    mask = MASKS["equal"]
    whole = torch.randn(96, 3, H, K, dtype=torch.float64, requires_grad=True)
    views = list(whole.unbind(1))
    copies = [x.detach().clone().requires_grad_() for x in views]
    grads = run(copies, mask, "torch")
    out = attend(*views, mask, backend="torch")
    torch.testing.assert_close(out.detach(), grads[0], rtol=0, atol=FP64)


def test_scale_is_used():
    inputs = qkv(MASKS["ragged"], torch.float64)
    assert max(error(run(inputs, MASKS["ragged"], "torch", scale=0.7), exact_scaled(inputs, 0.7))) < FP64


def exact_scaled(inputs, scale):
    return run(inputs, MASKS["ragged"], "reference", scale=scale)


def test_inference_mode_does_not_spoil_the_cached_plan():
    mask = AttentionMask(S([11, 13]))
    inputs = qkv(mask, torch.float32)
    with torch.inference_mode():
        attend(*inputs, mask, backend="torch")
    run(inputs, mask, "torch")


def test_windowed_cost_grows_with_the_length():
    """8,192 tokens: full scores would be 67 million numbers a head; tiles hold 128 x 176 each."""
    plan = length_buckets.plan(AttentionMask(S([8192]), window_tokens=24), torch.device("cpu"), torch.float32)
    scores = sum(bucket.count * bucket.query_length * bucket.key_length for bucket in plan.buckets)
    assert scores < 8192 * 2 * 128


def test_window_and_other_queries_exclude_each_other():
    with pytest.raises(ValueError, match="window"):
        AttentionMask(S([4]), S([2]), window_tokens=1)
    with pytest.raises(ValueError, match="2 query segments for 1"):
        AttentionMask(S([4]), S([2, 1]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    data=st.data(),
    window=st.none() | st.integers(0, 40),
    slopes=st.sampled_from([None, SLOPES]),
)
def test_random_packings_equal_reference(lengths, data, window, slopes):
    queries = None
    if window is None and slopes is None and data.draw(st.booleans()):
        queries = S(data.draw(st.lists(st.integers(0, 20), min_size=len(lengths), max_size=len(lengths))))
    mask = AttentionMask(S(lengths), queries, window, slopes)
    inputs = qkv(mask, torch.float64)
    assert max(error(run(inputs, mask, "torch"), exact(inputs, mask))) < FP64


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    window=st.integers(1, 60),
    slopes=st.sampled_from([None, SLOPES]),
)
def test_random_long_windows_equal_reference(lengths, window, slopes):
    mask = AttentionMask(S(lengths), None, window, slopes)
    inputs = qkv(mask, torch.float32)
    assert max(error(run(inputs, mask, "torch"), exact(inputs, mask))) < FP32


def request(**changes):
    defaults = {"device": torch.device("cpu"), "dtype": torch.float32, "head_size": 64, "window": False}
    return {**defaults, "dropout": False, **changes}


def test_auto_takes_torch_on_cpu_and_says_why():
    choice = select_backend("auto", **request(window=True))
    assert choice.name == "torch"
    assert "not xformers: it runs on CUDA" in choice.reason


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_a_named_backend_that_cannot_serve_is_refused(name):
    with pytest.raises(BackendUnavailable, match=f"{name} cannot serve here: it runs on CUDA, not on cpu"):
        select_backend(name, **request())


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_cuda_kernels_refuse_alibi_and_auto_takes_torch(name):
    asked = request(device=torch.device("cuda"), dtype=torch.bfloat16, alibi=True)
    with pytest.raises(BackendUnavailable, match=f"{name} cannot serve here: it has no ALiBi slopes.*; use torch"):
        select_backend(name, **asked)
    choice = select_backend("auto", **asked)
    assert choice.name == "torch"
    assert f"not {name}: it has no ALiBi" in choice.reason


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_cuda_kernels_do_not_ignore_slopes_that_reach_them(name):
    if name == "xformers":
        pytest.importorskip("xformers.ops.fmha")
    with pytest.raises(ValueError, match=f"{name} attention has no ALiBi"):
        attend(*qkv(MASKS["ALiBi"], torch.float32), MASKS["ALiBi"], backend=name)


def test_a_window_that_reaches_xformers_is_not_ignored():
    pytest.importorskip("xformers.ops.fmha")
    with pytest.raises(ValueError, match="xformers attention has no windows"):
        attend(*qkv(MASKS["window"], torch.float32), MASKS["window"], backend="xformers")


def test_xformers_refuses_float64():
    with pytest.raises(BackendUnavailable, match="xformers cannot serve here: it has no float64 kernels; use torch"):
        select_backend("xformers", **request(device=torch.device("cuda"), dtype=torch.float64))


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendUnavailable, match="'flash'; expected auto or one of xformers, varlen, torch, reference"):
        select_backend("flash", **request())


def _split(inputs, lengths):
    return zip(*(x.split(lengths) for x in inputs))
