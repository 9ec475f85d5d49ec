"""Whether the Triton kernels of the gated norm can serve. They are imported, Triton with them, only where they do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, installed, kernel, served

MODULE = f"{__package__}.triton"
WIDEST = 8192
"""Of heads: a block of the kernel holds whole ones in registers."""


def supports(y: Tensor, width: int) -> Support:
    """Whether `gated_norm` can serve these of its inputs; the others may be any."""
    support = served(y, (torch.bfloat16, torch.float32))
    if not support:
        return support
    if width > WIDEST:
        return Support.no(f"the kernel has heads of up to {WIDEST}, not {width}")
    return installed("triton")


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    """Shapes as in the reference's `gated_norm`."""
    return kernel(MODULE, "gated_norm")(y, z, weight, bias, width, eps)
