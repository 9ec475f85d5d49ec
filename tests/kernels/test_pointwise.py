"""Gate and rotation in one pass equal the plain form, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels.pointwise import fused, reference, rotate, swiglu, swiglu_packed


@pytest.fixture
def interpreted(interpret, monkeypatch):
    """The kernels in Triton's interpreter, in place of those for a GPU."""
    module = interpret(fused.MODULE)
    monkeypatch.setattr(fused, "kernel", lambda _, name: getattr(module, name))


def turns(length, width, kind, rows=1):
    angles = torch.rand(rows, length, 1, width // 2, generator=torch.Generator().manual_seed(1)) * 6
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(kind), angles.sin().to(kind)


def compare(ours, plain, leaves, tolerance):
    results = []
    for function in (ours, plain):
        own = [leaf.detach().clone().as_strided(leaf.shape, leaf.stride()).requires_grad_() for leaf in leaves]
        value = function(*own)
        upstream = torch.linspace(-1, 1, value.numel(), dtype=torch.float32, device=value.device).view(value.shape)
        results.append((value, *torch.autograd.grad(value, own, upstream.to(value.dtype))))
    for one, two in zip(*results, strict=True):
        assert one.dtype == two.dtype
        assert (one.float() - two.float()).norm() <= tolerance * two.float().norm()


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1024), (1, 2049)])
def test_the_gate_in_one_pass_is_the_plain_one(interpreted, shape, kind, tolerance):
    gate, up = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kind) for seed in (0, 1))
    compare(fused.swiglu, reference.swiglu, (gate, up), tolerance)


def check_packed(way, shape, kind, device, tolerance):
    both = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, kind)
    product = way(both)
    assert product.dtype == kind
    exact = reference.swiglu(*both.double().chunk(2, dim=-1))
    assert product.shape == exact.shape
    assert (product.double() - exact).norm() <= tolerance * exact.norm()


PACKED = [(1, 14), (5, 2, 1024), (3, 2 * 1001), (70, 18)]


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", PACKED)
def test_the_gate_of_one_product_is_the_plain_one(interpreted, shape, kind, tolerance):
    check_packed(fused.swiglu_packed, shape, kind, "cpu", tolerance)
    check_packed(swiglu_packed, shape, kind, "cpu", 2 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", [*PACKED, (1, 28672), (160, 28672)])
def test_on_a_gpu_the_gate_of_one_product_is_the_plain_one(shape, kind, tolerance):
    with torch.inference_mode():
        assert fused.supports_packed(torch.zeros(shape, device="cuda", dtype=kind))
        check_packed(swiglu_packed, shape, kind, "cuda", tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("heads", "width", "rows"), [(4, 16, 1), (5, 12, 2), (1, 64, 2)])
def test_the_rotation_in_one_pass_is_the_plain_one(interpreted, heads, width, rows, kind, tolerance):
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, heads + 3, width, generator=dice).to(kind)[:, :, 1 : heads + 1]
    cos, sin = turns(6, width, kind, rows)
    turned = fused.rotate(x, cos, sin)
    assert turned.is_contiguous()
    expected = reference.rotate(x, cos, sin)
    assert (turned.float() - expected.float()).norm() <= tolerance * expected.float().norm()
    compare(lambda t: fused.rotate(t, cos, sin), lambda t: reference.rotate(t, cos, sin), (x.contiguous(),), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_on_a_gpu_both_are_as_near_to_float64_as_the_plain_form(kind):
    dice = torch.Generator("cuda").manual_seed(0)
    gate, up, x = (
        torch.randn(shape, device="cuda", generator=dice).to(kind)
        for shape in ((3, 333, 1408), (3, 333, 1408), (3, 333, 12, 64))
    )
    cos, sin = (t.cuda() for t in turns(333, 64, kind))
    for function, given in ((swiglu, (gate, up)), (rotate, (x, cos, sin))):
        plain = getattr(reference, function.__name__)
        leaves = [t.clone().requires_grad_() for t in given[: len(given) - (function is rotate) * 2]]
        rest = given[len(leaves) :]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        upstream = torch.randn(leaves[0].shape, device="cuda", generator=dice).to(kind)
        truth = plain(*exact, *(t.double() for t in rest))
        truth = (truth, *torch.autograd.grad(truth, exact, upstream.double()))
        errors = []
        for way in (function, plain):
            value = way(*leaves, *rest)
            made = (value, *torch.autograd.grad(value, leaves, upstream))
            errors.append([float((one.double() - two).norm()) for one, two in zip(made, truth, strict=True)])
        # Both are computed in fp32; where that is also what they are stored in, either may round better by luck.
        unit = torch.finfo(torch.float32).eps
        for ours, theirs, exactly in zip(*errors, truth, strict=True):
            assert ours <= max(1.1 * theirs, unit * float(exactly.norm())), function.__name__


def test_on_a_cpu_the_plain_form_runs():
    x = torch.randn(2, 3, 4, 8)
    cos, sin = turns(3, 8, torch.float32)
    assert torch.equal(rotate(x, cos, sin), reference.rotate(x, cos, sin))
    assert torch.equal(swiglu(x, cos + x), reference.swiglu(x, cos + x))
