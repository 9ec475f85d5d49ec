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


@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    """Of finite fp32, as exact as exp2 is: makes up for what the product with log2(e) rounds off, which `tl.exp` adds
    to the result's relative error in proportion to x."""
    whole = x * 1.4426950408889634
    rest = tl.fma(x, 1.4426950408889634, -whole) + x * 1.925963033500915e-8
    return tl.exp2(whole) * (1 + rest * 0.6931471805599453)
