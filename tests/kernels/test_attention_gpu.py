"""The CUDA kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from encoderkit.kernels.alibi import alibi_slopes
from encoderkit.kernels.attention import BACKENDS, AttentionMask, attend, select_backend
from encoderkit.kernels.attention_mask import Request
from encoderkit.kernels.loss import masked_cross_entropy
from encoderkit.kernels.segments import Segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

H = 4
LENGTHS = {"equal": [128] * 8, "ragged": [5, 0, 133, 64, 1, 300], "long": [1500, 700], "padded": [100, 28, 0, 0, 0]}
WINDOWS = [None, 16]


def make(lengths, window, dtype, head_size, reads=None, slopes=None):
    def place(values):
        return Segments.from_lengths(values, longest=max(values) + 7).to("cuda")

    mask = AttentionMask(place(lengths), None if reads is None else place(reads), window, slopes)
    sizes = (mask.query_segments.total, mask.keys.total, mask.keys.total)
    generator = torch.Generator("cuda").manual_seed(0)
    return mask, [
        torch.randn(n, H, head_size, device="cuda", generator=generator).to(dtype).requires_grad_() for n in sizes
    ]


def need(backend, dtype, head_size=64, window=False, dropout=False):
    reason = BACKENDS[backend].unavailable(Request(torch.device("cuda"), dtype, head_size, window, dropout))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def run(inputs, mask, backend, function=attend):
    out = function(*inputs, mask, backend=backend)
    weight = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).to(out.dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, inputs, weight))]


def check(inputs, mask, backend):
    expected = run([x.detach().double().requires_grad_() for x in inputs], mask, "reference")
    eager = run(inputs, mask, "reference")
    for ours, theirs, exact in zip(run(inputs, mask, backend), eager, expected):
        assert bool(ours.isfinite().all())
        assert float((ours - exact).abs().max()) <= 2 * float((theirs - exact).abs().max()) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", ["torch", "xformers", "varlen"])
def test_kernel_equals_float64_reference(backend, lengths, window, head_size, dtype):
    need(backend, dtype, head_size, window is not None)
    mask, inputs = make(LENGTHS[lengths], window, dtype, head_size)
    check(inputs, mask, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_alibi_equals_float64_reference(lengths, window, dtype):
    mask, inputs = make(LENGTHS[lengths], window, dtype, 64, slopes=alibi_slopes(H))
    check(inputs, mask, "torch")


@pytest.mark.parametrize("backend", ["torch", "xformers", "varlen"])
def test_other_queries_than_keys(backend):
    need(backend, torch.bfloat16)
    mask, inputs = make([128, 60, 33, 0], None, torch.bfloat16, 64, reads=[20, 0, 7, 0])
    check(inputs, mask, backend)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["torch", "xformers", "varlen"])
def test_nan_in_one_sequence_reaches_no_other(backend, window):
    need(backend, torch.bfloat16, window=window is not None)
    mask, inputs = make([64, 100, 30], window, torch.bfloat16, 64)
    before = run(inputs, mask, backend)
    poisoned = [x.detach().clone() for x in inputs]
    for x in poisoned:
        x[64:164] = torch.nan
    own = torch.zeros(194, dtype=torch.bool, device="cuda")
    own[64:164] = True
    for a, b in zip(before, run([x.requires_grad_() for x in poisoned], mask, backend)):
        assert bool(b[~own].isfinite().all())
        torch.testing.assert_close(a[~own], b[~own], rtol=0, atol=1e-2)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_deterministic_choice_gives_equal_bits(window, dropout):
    request = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_size": 64}
    backend = select_backend("auto", **request, window=window is not None, dropout=dropout, deterministic=True).name
    mask, inputs = make([128, 60, 700], window, torch.bfloat16, 64)
    results = []
    for _ in range(5):
        torch.manual_seed(0)
        out = attend(*inputs, mask, dropout_p=0.1 if dropout else 0.0, backend=backend)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", ["torch", "xformers"])
def test_dropout_gradient_is_that_of_the_drawn_mask(backend):
    need(backend, torch.float32, dropout=True)
    mask, inputs = make([64, 100], None, torch.float32, 64)
    value = inputs[2]

    def out(v):
        torch.manual_seed(0)
        return attend(inputs[0], inputs[1], v, mask, dropout_p=0.3, backend=backend)

    weight = torch.randn_like(value)
    (gradient,) = torch.autograd.grad(out(value), value, weight)
    other = torch.randn_like(value)  # attention is linear in v, so the slope along it is exact
    slope = float((gradient * other).double().sum())
    assert slope == pytest.approx(float(((out(value + other) - out(value)) * weight).double().sum()), rel=1e-2, abs=1.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["torch", "xformers", "varlen"])
def test_compiled_equals_eager_without_recompiling(backend, window, dropout_p):
    from torch._dynamo.testing import CompileCounterWithBackend

    need(backend, torch.bfloat16, window=window is not None, dropout=dropout_p > 0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def function(q, k, v, mask, backend):
        return attend(q * 1.5, k, v, mask, dropout_p=dropout_p, backend=backend)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for lengths in ([100, 100, 56], [256, 0, 0], [1, 55, 200]):
        segments = Segments.from_lengths(lengths, longest=256).to("cuda")
        mask = AttentionMask(segments, window_tokens=window)
        _, inputs = make([256], None, torch.bfloat16, 64)
        found = run(inputs, mask, backend, compiled)
        if not dropout_p:
            for a, b in zip(found, run(inputs, mask, backend, function)):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        assert all(bool(x.isfinite().all()) for x in found)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_equals_cpu(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(*shape).to(dtype) for shape in ((50, 16), (70, 16), (70,))]
    target = torch.randint(0, 70, (50,))
    target[::4] = -100
    results = []
    for device in ("cpu", "cuda"):
        placed = [x.to(device).requires_grad_() for x in tensors]
        found = masked_cross_entropy(*placed, target.to(device), chunk_tokens=20)
        results.append([x.double().cpu() for x in (*found, *torch.autograd.grad(found.loss, placed))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10 if dtype == torch.float64 else 3e-2, atol=1e-10)
