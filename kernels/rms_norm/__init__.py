"""The norm in front of a layer's matrix products, from the residual stream's precision to that of the products."""

import torch
from torch import Tensor

from ..support import chosen
from . import fused, reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in fp32 or better, in `dtype`.

    x [..., W], weight [W]. torch's own kernel runs where all three have one dtype.
    """
    if chosen("rms_norm", fused.supports(x, weight, dtype)):
        return fused.rms_norm(x, weight, eps, dtype)
    return reference.rms_norm(x, weight, eps, dtype)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and the norm of that sum as it is rounded; without gradients. x and added [..., W], weight [W]."""
    if chosen("add_rms_norm", fused.supports_add(x, added, weight)):
        return fused.add_rms_norm(x, added, weight, eps)
    return reference.add_rms_norm(x, added, weight, eps)
