"""The gated norm is its formula, forward and backward, by Triton's kernels as well: on CPU by Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels import gated_norm as room
from mambabench.kernels.gated_norm import fused
from mambabench.kernels.gated_norm.reference import gated_norm as reference
from torch import Tensor

EPS = 1e-5


def formula(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """One head of one token at a time."""
    heads = []
    for part in range(0, y.shape[-1], width):
        inside = slice(part, part + width)
        gate = z[..., inside] if bias is None else z[..., inside] + bias[inside]
        g = y[..., inside] * gate / (1 + torch.exp(-gate))
        heads.append(weight[inside] * g / (g.square().mean(-1, keepdim=True) + EPS).sqrt())
    return torch.cat(heads, dim=-1)


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "tokens": st.integers(1, 40),
        "heads": st.integers(1, 3),
        "width": st.integers(1, 9),
        "biased": st.booleans(),
    }
)


def results(way, dtype: torch.dtype, seed: int, tokens: int, heads: int, width: int, biased: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = heads * width
    drawn = [normal(2, tokens, channels), normal(2, tokens, channels + 3), normal(channels)]
    drawn = [t.to(dtype).requires_grad_() for t in (*drawn, normal(channels))[: 4 if biased else 3]]
    y, z, weight, *bias = drawn
    out = way(y, z[..., 3:], weight, bias[0] if bias else None)
    (out * normal(*out.shape).to(dtype)).sum().backward()
    return [out, *(t.grad for t in drawn)]


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_the_reference_is_its_formula(shape: dict) -> None:
    width = shape["width"]
    got = results(lambda *given: reference(*given, width, EPS), torch.float64, **shape)
    want = results(lambda *given: formula(*given, width), torch.float64, **shape)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("programs", "wide"), [(1, 1024), (6, 4), (2048, 1024)])
def test_in_the_interpreter_the_kernels_are_the_reference(
    interpret: Callable[[str], Any], programs: int, wide: int
) -> None:
    kernels = interpret(fused.MODULE)
    kernels.PROGRAMS, kernels.WIDE = programs, wide

    @given(shapes)
    @settings(max_examples=10, deadline=None)
    def check(shape: dict) -> None:
        width = shape["width"]
        got = results(lambda *given: kernels.gated_norm(*given, width, EPS), torch.float32, **shape)
        want = results(lambda *given: reference(*given, width, EPS), torch.float64, **shape)
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)

    check()


def test_agrees_with_the_norm_of_transformers() -> None:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    norm = MambaRMSNormGated(16, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    y, z = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(room.gated_norm(y, z, norm.weight, None, 16, EPS), norm(y, z), rtol=1e-5, atol=1e-5)
