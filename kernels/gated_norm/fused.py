"""The gated norm by mamba-ssm's Triton kernel, forward and backward, which reads y and z once each way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, installed, kernel, served

MODULE = "mamba_ssm.ops.triton.layernorm_gated"


def supports(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Support:
    """Whether `gated_norm` can serve these inputs."""
    support = served(y, (torch.bfloat16, torch.float32))
    if not support:
        return support
    if bias is not None:
        return Support.no("the kernel's gate has no bias")
    return installed(MODULE)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    """Shapes as in the reference's `gated_norm`. Computed in fp32, rounded to y's dtype once."""
    return kernel(MODULE, "rmsnorm_fn")(y, weight, None, z=z, eps=eps, group_size=width, norm_before_gate=False)
