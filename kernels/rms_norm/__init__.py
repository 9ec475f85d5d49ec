"""The norm in front of a layer's matrix products, from the residual stream's precision to that of the products."""

import torch
from torch import Tensor

from ..support import chosen
from . import fused, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in fp32 or better, in `dtype`.

    x [..., W], weight [W]. torch's own kernel runs where all three have one dtype.
    """
    if chosen("rms_norm", fused.supports(x, weight, dtype)):
        return fused.rms_norm(x, weight, eps, dtype)
    return reference.rms_norm(x, weight, eps, dtype)
