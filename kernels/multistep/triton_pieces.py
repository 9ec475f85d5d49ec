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


@triton.jit
def rotated(own, other, cos, sin):  # type: ignore[no-untyped-def]
    """B or C by their positions, from what was rounded already: `other` is what `own` is mixed with; cos and sin are
    fp32, and sin is negative where `own` is of the first half."""
    return (own.to(tl.float32) * cos + other.to(tl.float32) * sin).to(own.dtype)


@triton.jit
def times(a, b, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """a fp32 [M, K] times b [K, N]: in fp32 if PIECES is 0, in tf32 if 1, else with a as the sum of PIECES bf16."""
    if PIECES == 0:
        out = tl.dot(a, b.to(tl.float32), input_precision="ieee")
    elif PIECES == 1:
        out = tl.dot(a, b.to(tl.float32), input_precision="tf32")
    else:
        first = a.to(tl.bfloat16)
        rest = a - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        if PIECES == 3:
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            out = tl.dot(third, b)
            out = tl.dot(second, b, out)
        else:
            out = tl.dot(second, b)
        out = tl.dot(first, b, out)
    return out


@triton.jit
def taken(c, state, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """c [T, N] times a state fp32 [N, P], as `times` has it."""
    if PIECES == 0:
        out = tl.dot(c.to(tl.float32), state, input_precision="ieee")
    elif PIECES == 1:
        out = tl.dot(c.to(tl.float32), state, input_precision="tf32")
    else:
        first = state.to(tl.bfloat16)
        rest = state - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        if PIECES == 3:
            out = tl.dot(c, (rest - second.to(tl.float32)).to(tl.bfloat16))
            out = tl.dot(c, second, out)
        else:
            out = tl.dot(c, second)
        out = tl.dot(c, first, out)
    return out


@triton.jit
def mixed(a, b, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [M, K], of the ring, times b fp32 [K, N]: in fp32, or with b as the sum of two bf16."""
    if EXACT:
        out = tl.dot(a.to(tl.float32), b, input_precision="ieee")
    else:
        first = b.to(tl.bfloat16)
        second = (b - first.to(tl.float32)).to(tl.bfloat16)
        out = tl.dot(a, second)
        out = tl.dot(a, first, out)
    return out


@triton.jit
def part(pointers, rows, columns, WHOLE: tl.constexpr, CACHE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is there of a tile; `columns` need not be looked at where all of them are."""
    if WHOLE:
        return tl.load(pointers, mask=rows, other=0.0, cache_modifier=CACHE)
    return tl.load(pointers, mask=rows & columns, other=0.0, cache_modifier=CACHE)


@triton.jit
def after(loaded, replayed):  # type: ignore[no-untyped-def]
    """`loaded`, but no use of it is moved ahead of this line, which Triton does right behind what it loads: the first
    to meet a matrix product goes through shared memory, and whatever is loaded behind that waits for it."""
    return tl.where(replayed >= 0, loaded, 0.0)


@triton.jit
def fetched(pointers):  # type: ignore[no-untyped-def]
    """Brings what lies there into the L2 cache; nothing waits for it."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
