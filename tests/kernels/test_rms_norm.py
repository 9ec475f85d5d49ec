"""The norm between two precisions equals its formula, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels.rms_norm import add_rms_norm, fused, reference, rms_norm

EPS = 1e-5


@pytest.fixture
def interpreted(interpret, monkeypatch):
    """The kernels in Triton's interpreter, in place of those for a GPU."""
    module = interpret(fused.MODULE)
    monkeypatch.setattr(fused, "kernel", lambda _, name: getattr(module, name))
    monkeypatch.setattr(module, "PROGRAMS", 3)
    return module


def inputs(shape, kind, weight_kind, device="cpu"):
    dice = torch.Generator().manual_seed(0)
    x, weight, upstream = (torch.randn(s, generator=dice) for s in (shape, shape[-1:], shape))
    return x.to(device, kind), weight.to(device, weight_kind), upstream.to(device)


def results(way, x, weight, upstream, dtype):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    value = way(*leaves, EPS, dtype)
    return [value, *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def formula(x, weight, eps, dtype):
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(dtype)


@pytest.mark.parametrize("shape", [(2, 5, 24), (37, 512), (3, 4097)])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_interpreter_it_is_the_formula(interpreted, shape, kinds, dtype):
    x, weight, upstream = inputs(shape, *kinds)
    ours = results(fused.rms_norm, x, weight, upstream, dtype)
    exact = results(formula, x.double(), weight.double(), upstream.to(dtype).double(), torch.float64)
    for one, two, kind in zip(ours, exact, (dtype, *kinds), strict=True):
        assert one.dtype == kind
        assert (one.double() - two).norm() <= (1e-6 if kind == torch.float32 else 5e-3) * two.norm()


def test_in_the_interpreter_a_frozen_weight_gets_no_gradient(interpreted):
    x, weight, upstream = inputs((6, 8), torch.float32, torch.float32)
    fused.rms_norm(x.requires_grad_(), weight, EPS, torch.bfloat16).backward(upstream.bfloat16())
    assert x.grad is not None
    assert weight.grad is None


def check_sum(way, shape, kind, device, tolerance):
    """The sum as PyTorch rounds it, and its norm by the formula. The interpreter cuts bf16 off instead."""
    x, weight, added = inputs(shape, kind, kind, device)
    added = added.to(kind)
    total, normed = way(x, added, weight, EPS)
    assert total.dtype == normed.dtype == kind
    if way is add_rms_norm or kind == torch.float32:
        assert torch.equal(total, x + added)
    assert torch.allclose(total.float(), x.float() + added.float(), rtol=2**-7, atol=0)
    exact = formula(total.double(), weight.double(), EPS, torch.float64)
    assert (normed.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("shape", [(1, 24), (5, 2, 512), (3, 4097)])
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_in_the_interpreter_a_sum_is_normed_as_it_is_rounded(interpreted, shape, kind, tolerance):
    check_sum(fused.add_rms_norm, shape, kind, "cpu", tolerance)
    check_sum(add_rms_norm, shape, kind, "cpu", tolerance)


def test_a_sum_with_gradients_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr("mambabench.kernels.support.on_cuda", lambda _: True)
    x, weight, added = inputs((2, 8), torch.float32, torch.float32)
    assert "no backward" in fused.supports_add(x, added, weight).reason
    with torch.no_grad():
        assert fused.supports_add(x, added, weight)
        assert "of one dtype" in fused.supports_add(x, added.double(), weight).reason
        assert "contiguous" in fused.supports_add(x.T, added.T, weight).reason


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096), (5, 512), (160, 4096), (3, 4097)])
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_on_a_gpu_a_sum_is_normed_as_it_is_rounded(shape, kind, tolerance):
    with torch.inference_mode():
        check_sum(add_rms_norm, shape, kind, "cuda", tolerance)
        x, weight, added = inputs(shape, kind, kind, "cuda")
        assert fused.supports_add(x, added.to(kind), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 5, 24), (4000, 512), (300, 4096), (1000, 12, 64)])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_on_a_gpu_it_is_as_near_to_the_formula_as_pytorch(shape, kinds):
    x, weight, upstream = inputs(shape, *kinds, "cuda")
    assert fused.supports(x, weight, torch.bfloat16)
    exact = results(formula, x.double(), weight.double(), upstream.bfloat16().double(), torch.float64)
    errors = []
    for way in (rms_norm, reference.rms_norm):
        made = results(way, x, weight, upstream, torch.bfloat16)
        errors.append([float((one.double() - two).norm()) for one, two in zip(made, exact, strict=True)])
    for ours, theirs, truth in zip(*errors, exact, strict=True):
        assert ours <= 1.1 * theirs + 1e-6 * float(truth.norm())
