"""The Triton kernels of this room, and the functions that launch them. Sums of offsets are in int64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early

BLOCK = 2048
SMALL, FEW = 512, 64
"""The block of fewer rows than this, so that more of the GPU works on them."""


@triton.jit
def _swiglu_forward(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(upstream, gate, up, to_gate, to_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(to_gate + at, (d * u * s * (1 + g * (1 - s))).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + at, (d * g * s).to(to_up.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_packed(both, out, width, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(both + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(both + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


def swiglu_packed(both: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 W], contiguous."""
    width, rows = both.shape[-1] // 2, both.numel() // both.shape[-1]
    out = torch.empty(*both.shape[:-1], width, dtype=both.dtype, device=both.device)
    block = SMALL if rows < FEW else BLOCK
    with torch.cuda.device_of(both):
        grid = rows, triton.cdiv(width, block)
        _swiglu_packed[grid](both, out, width, BLOCK=block, **begun_early(both, rows=rows))
    return out


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous tensors."""
    out = torch.empty_like(gate)
    _swiglu_forward[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK)
    return out


def swiglu_backward(upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to gate and up."""
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    _swiglu_backward[grid](upstream.contiguous(), gate, up, to_gate, to_up, gate.numel(), BLOCK=BLOCK)
    return to_gate, to_up


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    out,
    length,
    heads,
    half,
    x_row,
    x_token,
    x_head,
    turn_row,
    turn_token,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0)
    row, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    turn = row * turn_row + place * turn_token + column
    c = tl.load(cos + turn, mask=column < half, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=column < half, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    first = x + row * x_row + place * x_token + head.to(tl.int64) * x_head + column
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    there = out + (token.to(tl.int64) * heads + head) * (2 * half) + column
    tl.store(there, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(there + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x [B, L, H, P], cos and sin [B or 1, L, 1, P] -> [B, L, H, P], contiguous; `back` turns the other way."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, length, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate[(batch * length,)](
        x,
        cos,
        sin,
        out,
        length,
        heads,
        width // 2,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        BACK=back,
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(width // 2),
    )
    return out
