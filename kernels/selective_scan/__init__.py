"""The selective scan of Mamba-1 over whole sequences: training, scoring and prompts."""

from torch import Tensor

from ..documents import Documents
from ..support import chosen
from . import fused, reference
from .reference import selective_scan_loop, step_sizes

__all__ = ["selective_scan", "selective_scan_loop", "serves", "step_sizes"]


def serves(x: Tensor) -> bool:
    """Whether a kernel runs scans from the beginning on x's device and in its dtype; else PyTorch goes token by token.
    Says nothing of more than 256 states a channel."""
    return bool(fused.supports(x))


def selective_scan(
    x: Tensor,
    raw: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    keep: Tensor | None = None,
    documents: Documents | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The scan of `reference`, by mamba-ssm's kernel where it serves; y is then in x's dtype, and the last state has no
    gradient."""
    given = x, raw, A, B, C, D, bias, state, keep, documents
    if chosen("selective_scan", fused.supports(x, A, state)):
        return fused.selective_scan(*given)
    return reference.selective_scan(*given, chunk)
