"""Which of a round's small operations the Triton kernels serve."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, installed, served

MODULE, DRAWING, KEEPING = (f"{__package__}.triton{part}" for part in ("", "_draw", "_keep"))
LOGITS = (torch.float32, torch.float64)


def supports_logits(logits: Tensor) -> Support:
    """Whether logits [..., V] can be reduced."""
    support = served(logits, LOGITS)
    if support and (logits.stride(-1) != 1 or not (logits.dim() == 2 or logits.is_contiguous())):
        return Support.no("the logits are not contiguous")
    return installed("triton") if support else support


def supports_integers(ids: Tensor) -> Support:
    """Whether texts int64 [B, S] can be read and grown, and positions hashed."""
    support = served(ids, (torch.int64,))
    return installed("triton") if support else support
