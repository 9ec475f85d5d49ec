"""The norm's Triton kernels. A program has ROWS rows. In backward it goes over several such blocks and leaves its
part of the weight's gradient in fp32; these are added up in one order whatever finishes first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early

NUMBERS = 4096
"""About as many in a program at a time."""
PROGRAMS = 1024
"""At most as many in backward: enough for a large GPU."""


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, weight, out, scales, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(v * v, axis=1) / width + eps)
    tl.store(scales + row, scale, mask=row < rows)
    tl.store(out + at, (v * scale[:, None] * w[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_forward(  # type: ignore[no-untyped-def]
    x, added, weight, total, out, width, eps, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    v = v.to(total.dtype.element_ty)
    tl.store(total + at, v, mask=inside)
    v = v.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(v * v, axis=0) / width + eps)
    tl.store(out + at, (v * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    upstream,
    x,
    weight,
    scales,
    to_x,
    to_weight,
    rows,
    width,
    blocks,
    programs,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    part = tl.zeros((WIDTH,), dtype=tl.float32)
    for block in range(program, blocks, programs):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        d = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        normed = v * scale[:, None]
        if WEIGHT:
            part += tl.sum(d * normed, axis=0)
        d = d * w[None, :]
        mean = tl.sum(d * normed, axis=1) / width
        tl.store(to_x + at, ((d - normed * mean[:, None]) * scale[:, None]).to(to_x.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(to_weight + program.to(tl.int64) * width + column, part, mask=column < width)


def _tile(x: Tensor) -> tuple[int, int, int]:
    """Rows in all, and rows and columns of a program."""
    columns = triton.next_power_of_2(x.shape[-1])
    return x.numel() // x.shape[-1], max(1, NUMBERS // columns), columns


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm in `dtype`, and the inverse root mean square of each row, fp32. x contiguous."""
    rows, tile, columns = _tile(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    _forward[(triton.cdiv(rows, tile),)](
        x, weight.contiguous(), out, scales, rows, x.shape[-1], eps, ROWS=tile, WIDTH=columns, num_warps=8
    )
    return out, scales


def add_forward(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm. A program has one row, whatever else there is: in decoding there are few."""
    width, total, out = x.shape[-1], torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.numel() // width, triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _add_forward[(rows,)](
            x, added, weight.contiguous(), total, out, width, eps, WIDTH=columns, num_warps=8 if columns > 1024 else 4,
            **begun_early(x, rows=rows),
        )  # fmt: skip
    return total, out


def backward(
    upstream: Tensor, x: Tensor, weight: Tensor, scales: Tensor, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients to x, and to the weight if it is trained."""
    rows, tile, columns = _tile(x)
    blocks = triton.cdiv(rows, tile)
    programs = min(blocks, PROGRAMS)
    to_x = torch.empty_like(x)
    parts = torch.empty(programs if trained else 0, x.shape[-1], dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        upstream.contiguous(),
        x,
        weight.contiguous(),
        scales,
        to_x,
        parts,
        rows,
        x.shape[-1],
        blocks,
        programs,
        WEIGHT=trained,
        ROWS=tile,
        WIDTH=columns,
        num_warps=8,
    )
    return to_x, parts.sum(0).to(weight.dtype) if trained else None
