"""The scan of Mamba-1 by mamba-ssm's CUDA kernel (Gu and Dao, arXiv 2312.00752), forward and backward.

It knows no documents: an empty token in front of each, with a step so long that nothing is left of the state, keeps
them apart (the kernel sees rows that are longer by that many tokens; rows of one document each would all be as long as
the longest). It knows no state to begin with, and none of the gradient of the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..documents import Documents, Spread
from ..scan.reference import exact
from ..support import Support, installed, kernel, served

MODULE = "mamba_ssm.ops.selective_scan_interface"
FORGET = 2.0**40
"""A raw step behind which no state is left: exp(-2^40 |A|) is 0 for all |A| above 1e-10. A power of two, which bf16
has."""


def supports(x: Tensor, A: Tensor | None = None, state: Tensor | None = None) -> Support:
    """Whether `selective_scan` can serve these of its inputs; the others may be any, as may those left out."""
    support = served(x, (torch.bfloat16, torch.float32))
    if not support:
        return support
    if state is not None:
        return Support.no("the kernel begins with an empty state")
    if A is not None and A.shape[1] > 256:
        return Support.no(f"the kernel has up to 256 states a channel, not {A.shape[1]}")
    return installed(MODULE)


class _Taken(torch.autograd.Function):
    """Rows `index` of t [N, D], each at most once, so that their gradients are copied and not added up."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = t.shape
        return t.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient.new_zeros(ctx.shape).index_copy_(0, index, gradient), None


class _Last(torch.autograd.Function):
    """The last state, of which the kernel has no gradient: says so instead of leaving it out."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError(
            "mamba-ssm's selective scan has no gradient of its last state; run it in kernels.support.reference_only()"
        )


def _spread(t: Tensor, empty: Tensor, spread: Spread) -> Tensor:
    """t [B, L, E] and what fills the empty places [B, L'] -> [B, L', E]."""
    batch, _, width = t.shape
    filled = empty.to(t.dtype).view(-1, 1).repeat(1, width)
    return filled.index_copy_(0, spread.places, t.reshape(-1, width)).view(batch, spread.length, width)


@exact
def selective_scan(
    x: Tensor,
    raw: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    keep: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the reference's `selective_scan`; there is no `state`. y has x's dtype, the state is fp32."""
    batch, length, channels = x.shape
    groups, size = B.shape[2:]
    raw, B, C = (t.to(x.dtype) for t in (raw, B.flatten(2), C.flatten(2)))
    if keep is not None:
        raw = raw.masked_fill(~keep.unsqueeze(-1), -torch.inf)
    spread = None if documents is None else documents.spread
    if spread is not None:
        nothing = torch.zeros_like(spread.breaks, dtype=torch.float32)
        x, B, C = (_spread(t, nothing, spread) for t in (x, B, C))
        raw = _spread(raw, (nothing - torch.inf).masked_fill(spread.breaks, FORGET), spread)
    B, C = (t.view(batch, -1, groups, size).permute(0, 2, 3, 1).contiguous() for t in (B, C))
    y, last = kernel(MODULE, "selective_scan_fn")(
        x.transpose(1, 2).contiguous(),
        raw.transpose(1, 2).contiguous(),
        A.float().contiguous(),
        B,
        C,
        None if D is None else D.float().contiguous(),
        delta_bias=None if bias is None else bias.float().contiguous(),
        delta_softplus=True,
        return_last_state=True,
    )
    y = y.transpose(1, 2).contiguous()
    if spread is not None:
        y = _Taken.apply(y.view(-1, channels), spread.places).view(batch, length, channels)
    return y, _Last.apply(last)
