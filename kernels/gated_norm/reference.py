"""The gated norm behind the scan of Mamba-2, over each head alone, in plain PyTorch.

    out = weight * g / sqrt(mean(g^2) + eps)    g = y SiLU(z + bias), the mean over a head

It is the norm of mamba-ssm (`rmsnorm_fn`) with `norm_before_gate=False` and a group for every head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..scan.reference import compute_dtype


def silu_gated(y: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """y SiLU(z + bias), in y's dtype (fp32 or better with a bias). y and z have one shape [..., D], bias [D]."""
    opened = z.to(y.dtype)
    return y * F.silu(opened if bias is None else opened + bias.to(compute_dtype(y)))


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    """y and z [..., H P], weight [H P], bias [H P] of the gate, width P. Computed in fp32 (fp64 for fp64 y), rounded to
    z's dtype."""
    kind = compute_dtype(y)
    gated = silu_gated(y.to(kind), z, bias).unflatten(-1, (-1, width))
    return (F.rms_norm(gated, (width,), None, eps).flatten(-2) * weight.to(kind)).to(z.dtype)
