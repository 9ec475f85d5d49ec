"""The gate behind the scans of Mamba layers, and Mamba-2's norm over heads behind it."""

from torch import Tensor

from ..support import chosen
from . import fused, reference
from .reference import silu_gated

__all__ = ["gated_norm", "silu_gated"]


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    """The norm of `reference`, by a Triton kernel where that serves."""
    given = y, z, weight, bias, width, eps
    serves = chosen("gated_norm", fused.supports(y, width))
    return fused.gated_norm(*given) if serves else reference.gated_norm(*given)
