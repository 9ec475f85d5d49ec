"""The norm as one pass forward and one backward, where x, weight and result have different dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..support import Support, installed, kernel, served

MODULE = f"{__package__}.triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 16384


def supports(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Support:
    """Whether `rms_norm` can serve these inputs."""
    support = served(x, DTYPES)
    if not support:
        return support
    if x.dtype == weight.dtype == dtype:
        return Support.no("torch's own kernel serves a norm of one dtype")
    if weight.dtype not in DTYPES or dtype not in DTYPES or not x.is_contiguous() or x.shape[-1] > WIDEST:
        return Support.no(f"the kernel serves contiguous tensors up to fp32, not wider than {WIDEST}")
    return installed("triton")


def supports_add(x: Tensor, added: Tensor, weight: Tensor) -> Support:
    """Whether `add_rms_norm` can serve these inputs."""
    support = served(x, DTYPES)
    if not support:
        return support
    if not x.dtype == added.dtype == weight.dtype or torch.is_grad_enabled():
        return Support.no("the kernel adds tensors of one dtype, and has no backward")
    if not (x.is_contiguous() and added.is_contiguous()) or x.shape[-1] > WIDEST:
        return Support.no(f"the kernel adds contiguous tensors, not wider than {WIDEST}")
    return installed("triton")


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes as in the room's `add_rms_norm`."""
    both: tuple[Tensor, Tensor] = kernel(MODULE, "add_forward")(x, added, weight, eps)
    return both


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Shapes as in the room's `rms_norm`."""
    normed: Tensor = _Norm.apply(x, weight, eps, dtype)
    return normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, scales = kernel(MODULE, "forward")(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scales)
        normed: Tensor = out
        return normed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        to_x, to_weight = kernel(MODULE, "backward")(upstream[0], *ctx.saved_tensors, ctx.needs_input_grad[1])
        return to_x, to_weight, None, None
