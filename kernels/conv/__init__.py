"""The short causal depthwise convolution in front of a Mamba scan."""

import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents
from ..support import chosen
from . import fused, reference
from .reference import conv_few, conv_loop, window_at

__all__ = ["conv", "conv_few", "conv_loop", "window_at"]


def conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: Documents | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """The convolution of `reference`, with SiLU behind it if asked, by causal-conv1d where it serves."""
    given = u, weight, bias, window, lengths, documents
    if chosen("conv", fused.supports(u, weight, bias, window, documents)):
        return fused.conv(*given, silu)
    y, end = reference.conv(*given)
    return F.silu(y) if silu else y, end
