"""The selective scan of Mamba-2 over whole sequences: training, scoring and prompts."""

from torch import Tensor

from ..documents import Documents
from ..support import chosen
from . import fused, reference
from .reference import scan_loop

__all__ = ["scan", "scan_loop"]


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk: int = 64,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of `reference`, by mamba-ssm's kernels where they serve; y is then in x's dtype."""
    given = x, dt, A, B, C, D, state, lengths, chunk, documents
    return fused.scan(*given) if chosen("scan", fused.supports(x, C)) else reference.scan(*given)
