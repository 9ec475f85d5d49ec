"""The causal depthwise convolution, with SiLU behind it if asked, by causal-conv1d, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents
from ..support import Support, installed, kernel, served
from .reference import window_at

MODULE = "causal_conv1d"
ALIGNED = 8
"""Channels that the kernel reads at once."""


def supports(
    u: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None = None, documents: Documents | None = None
) -> Support:
    """Whether `conv` can serve these of its inputs; `lengths` may be any."""
    support = served(u, (torch.bfloat16, torch.float32))
    if not support:
        return support
    if not 2 <= weight.shape[1] <= 4:
        return Support.no(f"the kernel has 2 to 4 taps, not {weight.shape[1]}")
    if u.shape[2] % ALIGNED:
        return Support.no(f"the kernel takes channels by {ALIGNED}, which does not divide {u.shape[2]}")
    if weight.dtype != bias.dtype or weight.dtype not in (torch.bfloat16, torch.float32):
        return Support.no("the kernel takes weight and bias in one dtype, bfloat16 or float32")
    if window is not None and documents is not None:
        return Support.no("the kernel has no window in front of packed documents")
    return installed(MODULE)


def _aligned(u: Tensor) -> Tensor:
    """u, or a copy of it where the kernel's vector loads would not be aligned."""
    whole = u.stride(2) == 1 and not (u.stride(0) % ALIGNED or u.stride(1) % ALIGNED or u.data_ptr() % 16)
    return u if whole else u.clone(memory_format=torch.contiguous_format)


def conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: Documents | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the reference's `conv`. Sums and SiLU are in fp32 and rounded to u's dtype once."""
    taps, length = weight.shape[1], u.shape[1]
    y = kernel(MODULE, "causal_conv1d_fn")(
        _aligned(u).transpose(1, 2),
        weight,
        bias,
        seq_idx=None if documents is None else documents.sequence,
        initial_states=None if window is None else _aligned(window.to(u.dtype)).transpose(1, 2),
        activation="silu" if silu else None,
    ).transpose(1, 2)
    if lengths is None and length >= taps - 1:
        return y, u[:, length - taps + 1 :]
    ends = lengths if lengths is not None else torch.full((u.shape[0],), length, device=u.device)
    return y, window_at(u, taps, window, ends)
