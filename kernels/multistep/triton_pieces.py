"""What the kernels of this room have in common."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(raw):  # type: ignore[no-untyped-def]
    """log(1 + exp(raw)) in fp32, which keeps its digits where it is small."""
    grown = tl.exp(-tl.abs(raw))
    near = 1 + grown
    rest = tl.where(near == 1, grown, tl.log(near) * (grown / tl.where(near == 1, 1.0, near - 1)))
    return tl.maximum(raw, 0.0) + rest
