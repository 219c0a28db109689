"""The chunked loss against full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from encoderkit.kernels import loss as kernel
from encoderkit.kernels.loss import masked_cross_entropy

M, V, D = 23, 37, 8
CHUNKS = [1, 5, 23, 100, None]


def inputs(dtype=torch.float64, targets="all"):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((M, D), (V, D), (V,)))
    target = torch.randint(0, V, (M,))
    if targets == "some":
        target[::3] = -100
    elif targets == "none":
        target[:] = -100
    return hidden, weight, bias, target


def full(hidden, weight, bias, target):
    return F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("targets", ["all", "some"])
def test_equals_full_logits_in_float64(chunk, targets):
    *parameters, target = inputs(targets=targets)
    found, expected = masked_cross_entropy(*parameters, target, chunk_tokens=chunk), full(*parameters, target)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    assert int(found.count) == int((target != -100).sum())
    hits = F.linear(*parameters).argmax(1) == target
    assert int(found.correct) == int(hits.sum())
    for a, b in zip(*(torch.autograd.grad(3 * loss, parameters) for loss in (found.loss, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group_bytes", [1, 2 * 5 * V * 8, 3 * 5 * V * 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_groups_of_chunks_give_the_same(group_bytes, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "CPU_CHUNK_TOKENS", 5)
    monkeypatch.setattr(kernel, "CPU_GROUP_BYTES", group_bytes * dtype.itemsize // 8)
    hidden, *parameters, target = inputs(targets="some")
    hidden = hidden.detach().to(dtype).requires_grad_()
    found = masked_cross_entropy(hidden, *parameters, target).loss
    expected = full(hidden.double(), *parameters, target)
    grads = (torch.autograd.grad(total, (hidden, *parameters)) for total in (found, expected))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        limit = 1e-12 if dtype == torch.float64 else 0.02 * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=limit)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_all_ignored_is_zero_and_not_nan(chunk):
    *parameters, target = inputs(targets="none")
    found = masked_cross_entropy(*parameters, target, chunk_tokens=chunk)
    assert (float(found.loss.detach()), int(found.count), int(found.correct)) == (0.0, 0, 0)
    assert all(float(g.abs().max()) == 0.0 for g in torch.autograd.grad(found.loss, parameters))


def test_no_targets_at_all():
    hidden, weight, bias, target = inputs()
    found = masked_cross_entropy(hidden[:0], weight, bias, target[:0])
    assert (float(found.loss.detach()), int(found.count)) == (0.0, 0)
    assert all(float(g.abs().sum()) == 0.0 for g in torch.autograd.grad(found.loss, (hidden, weight, bias)))


def test_gradcheck():
    hidden, weight, bias, target = inputs(targets="some")
    torch.autograd.gradcheck(
        lambda *parameters: masked_cross_entropy(*parameters, target, chunk_tokens=7).loss, (hidden, weight, bias)
    )


def test_a_vocabulary_row_with_bias_minus_infinity_is_never_predicted():
    hidden, weight, bias, target = inputs()
    narrow = masked_cross_entropy(hidden, weight, bias, target)
    wide_weight = torch.cat([weight, 100 * torch.ones(3, D, dtype=weight.dtype)]).detach().requires_grad_()
    wide = masked_cross_entropy(hidden, wide_weight, F.pad(bias, (0, 3), value=-torch.inf), target)
    torch.testing.assert_close(wide.loss, narrow.loss, rtol=1e-12, atol=0)
    assert int(wide.correct) == int(narrow.correct)
    gradient = torch.autograd.grad(wide.loss, wide_weight)[0]
    assert float(gradient[V:].abs().max()) == 0.0
    assert bool(gradient.isfinite().all())


def test_ties_go_to_the_first_like_argmax():
    hidden, weight, bias = torch.zeros(3, D), torch.zeros(V, D), torch.zeros(V)
    assert int(masked_cross_entropy(hidden, weight, bias, torch.tensor([0, 1, 0])).correct) == 2


def test_large_scores_stay_finite():
    hidden, weight, bias, target = inputs(torch.float32)
    found = masked_cross_entropy(300 * hidden, 300 * weight, bias, target)
    torch.testing.assert_close(found.loss, full(300 * hidden, 300 * weight, bias, target), rtol=1e-5, atol=0)


def test_bf16_hidden_under_autocast_gives_fp32_gradients():
    hidden, weight, bias, target = inputs(torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = masked_cross_entropy(narrow, weight, bias, target)
        eager = F.cross_entropy(F.linear(narrow, weight, bias).float(), target, reduction="sum")
    expected = full(narrow.detach().double(), weight.double(), bias.double(), target)
    assert found.loss.dtype == torch.float32
    assert abs(float((found.loss - expected).detach())) <= 2 * max(
        abs(float((eager - expected).detach())), 0.01 * M**0.5
    )
    grads = torch.autograd.grad(found.loss, (narrow, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    exact = torch.autograd.grad(full(hidden, weight, bias, target), (hidden, weight, bias))
    for a, b in zip(grads, exact):
        assert float((a.float() - b).norm() / b.norm()) < 0.03


def test_same_loss_without_gradients():
    *parameters, target = inputs()
    with torch.no_grad():
        found = masked_cross_entropy(*parameters, target, chunk_tokens=6)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, full(*parameters, target), rtol=1e-12, atol=0)


def test_equal_inputs_give_equal_bits():
    *parameters, target = inputs(torch.float32)
    runs = [torch.autograd.grad(masked_cross_entropy(*parameters, target).loss, parameters) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))
