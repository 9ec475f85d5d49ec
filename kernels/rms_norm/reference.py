"""The norm in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Shapes as in the room's `rms_norm`. Without autocast, which would widen x; weight is rounded to x's dtype, since
    torch's one kernel wants them alike."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(dtype)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes as in the room's `add_rms_norm`."""
    total = x + added
    return total, F.rms_norm(total, weight.shape, weight, eps)
