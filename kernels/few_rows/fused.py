"""Whether the Triton kernels of this room serve. They are imported, Triton with them, only where they do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, installed, kernel, served
from .reference import Projection, Stream, Unscaled

MODULE = f"{__package__}.forms"
DTYPES = (torch.bfloat16, torch.float16)
ROWS = 32
PIECE = 16
"""Numbers of a row come in multiples of this many."""


def supports(given: Projection, x: Tensor, kind: torch.dtype) -> Support:
    """Whether the kernel makes the product with x [M, K], and faster than kernels for each step."""
    support = served(x, DTYPES)
    if not support:
        return support
    if x.dim() != 2 or x.shape[0] > ROWS:
        return Support.no(f"the kernel serves up to {ROWS} rows")
    if given.weight.dtype != x.dtype or kind not in (x.dtype, torch.float32):
        return Support.no("the kernel multiplies weights and rows of one dtype")
    if x.shape[1] % PIECE or not (x.is_contiguous() and given.weight.is_contiguous()):
        return Support.no(f"the kernel serves contiguous rows of a multiple of {PIECE} numbers")
    support = installed("triton")
    if support and not kernel(MODULE, "faster")(x, given, kind):
        lines, width = given.weight.shape
        return Support.no(f"cuBLAS is faster for {width} to {lines}")
    return support


def project(given: Projection, stream: Stream, kind: torch.dtype) -> tuple[Tensor, Stream]:
    """Shapes as in the room's `project`."""
    both: tuple[Tensor, Stream] = kernel(MODULE, "project")(stream.h, given, stream, kind)
    return both


def add_projected(given: Projection, x: Tensor | Unscaled, stream: Stream) -> Stream:
    """Shapes as in the room's `add_projected`."""
    whole: Stream = kernel(MODULE, "add_projected")(x, given, stream)
    return whole
