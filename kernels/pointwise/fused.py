"""Gate and rotation as one pass over memory each, forward and backward. They compute in fp32 and round once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..support import Support, installed, kernel, served

MODULE = f"{__package__}.triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports_swiglu(gate: Tensor, up: Tensor) -> Support:
    """Whether `swiglu` can serve these inputs."""
    support = _served(gate)
    if support and (gate.dtype != up.dtype or not (gate.is_contiguous() and up.is_contiguous())):
        return Support.no("gate and up are not two contiguous tensors of one dtype")
    return support


def supports_packed(both: Tensor) -> Support:
    """Whether `swiglu_packed` can serve this input."""
    support = _served(both)
    if support and (not both.is_contiguous() or torch.is_grad_enabled()):
        return Support.no("the kernel serves contiguous tensors, and has no backward")
    return support


def swiglu_packed(both: Tensor) -> Tensor:
    """silu(gate) * up, [..., 2 W] -> [..., W]."""
    product: Tensor = kernel(MODULE, "swiglu_packed")(both)
    return product


def supports_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Support:
    """Whether `rotate` can serve these inputs."""
    support = _served(x)
    if support and (x.dim() != 4 or cos.dim() != 4 or cos.requires_grad or x.shape[2] > 128 or x.stride(-1) != 1):
        return Support.no("the kernel serves heads [B, L, H, P], up to 128 of them, and positions [B, L, 1, P]")
    if support and (sin.stride() != cos.stride() or cos.stride(-1) != 1 or x.dtype.itemsize > cos.dtype.itemsize):
        return Support.no("the kernel serves contiguous cos and sin of x's precision or better")
    return support


def _served(tensor: Tensor) -> Support:
    support = served(tensor, DTYPES)
    return installed("triton") if support else support


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    product: Tensor = _Swiglu.apply(gate, up)
    return product


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        product: Tensor = kernel(MODULE, "swiglu_forward")(gate, up)
        return product

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = kernel(MODULE, "swiglu_backward")(upstream[0], *ctx.saved_tensors)
        return gradients


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Shapes as in the room's `rotate`; in x's dtype, contiguous."""
    turned: Tensor = _Rotate.apply(x, cos, sin)
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned: Tensor = kernel(MODULE, "rotate")(x, cos, sin, False)
        return turned

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return kernel(MODULE, "rotate")(upstream[0], *ctx.saved_tensors, True), None, None
