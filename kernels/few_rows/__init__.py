"""What a layer takes from the residual stream and what it adds to it, for the few rows of a decoding step: products
with large weights, behind a norm and before a gate, or before the sum with the stream.

Where kernels serve, these are parts of the product; else they run one after the other, as other rooms have them.
"""

import torch
from torch import Tensor

from ..support import chosen
from . import fused, reference
from .reference import Projection, Stream, Unscaled

__all__ = ["Projection", "Stream", "Unscaled", "add_projected", "divides", "project"]


def project(given: Projection, stream: Stream, kind: torch.dtype | None = None) -> tuple[Tensor, Stream]:
    """The product with the norm of the stream [M, E], gated if `given` is, and the stream, to which nothing is left to
    add. [M, N], gated [M, N / 2], in the stream's dtype or in `kind`, without a rounding in between."""
    kind = kind or stream.h.dtype
    if chosen("project", fused.supports(given, stream.h, kind)):
        return fused.project(given, stream, kind)
    return reference.project(given, stream, kind)


def divides(given: Projection, x: Tensor) -> bool:
    """Whether `add_projected` divides rows like x [M, K] by their root mean square at no cost."""
    return bool(fused.supports(given, x, x.dtype))


def add_projected(given: Projection, x: Tensor | Unscaled, stream: Stream) -> Stream:
    """The stream [M, E] with the product of x [M, K] added."""
    rows = x.x if isinstance(x, Unscaled) else x
    if chosen("add_projected", fused.supports(given, rows, rows.dtype)):
        return fused.add_projected(given, x, stream)
    return reference.add_projected(given, x, stream)
