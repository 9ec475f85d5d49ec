"""The one norm of the model: of hidden states, and of query and key heads where a teacher has that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 or better inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """In x's dtype; under autocast on a GPU in autocast's, so that the products that follow need no copies."""
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            return rms_norm(x, self.weight, self.eps, torch.get_autocast_dtype("cuda"))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + added (None: nothing), and the norm of that; for inference."""
        if added is None:
            return x, self(x)
        return add_rms_norm(x, added, self.weight, self.eps)
