"""Products of a few rows with large weights, in which the weights are read once, at the speed of memory.

A program has BLOCK rows of the weights and all rows of x, padded to TILE: the weights are the large side of the tensor
cores' products, and STAGES tiles of them are on their way. The root mean square of each row of x is known from sums of
squares that the kernel before has left; x is normed and rounded tile by tile as a kernel for it would round it. With
SPLIT > 1 as many programs share the columns of a block; the last of them to end adds up in one order what all have
left. What a row gives does not depend on how many there are: up to TILE of them run the same program.

With PDL a program takes its place while the kernel before ends, and lets the next kernel do so behind its own last
tile: earlier, that one would be in the way of tiles that are still to come.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    y, h, bias, out, sums, line, block, row, there,
    LINES: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EACH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """From y fp32 [BLOCK, TILE] and, to be added, h [BLOCK, TILE] to what is stored. It is rounded wherever kernels of
    their own would round."""
    if BIAS:
        y += tl.load(bias + line).to(tl.float32)[:, None]
    if GATE:
        y = y.to(out.dtype.element_ty).to(tl.float32)
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, EACH, TILE)), (1, 2, 0)))
        y = gate / (1 + tl.exp(-gate)) * up
    own = block * EACH + tl.arange(0, EACH)
    inside = (own < LINES)[:, None] & there[None, :]
    to = row.to(tl.int64)[None, :] * LINES + own[:, None]
    y = y.to(out.dtype.element_ty)
    if ADD:
        y = (y.to(tl.float32) + h.to(tl.float32)).to(out.dtype.element_ty)
        exact = tl.where(inside, y.to(tl.float32), 0.0)
        tl.store(sums + row * tl.cdiv(LINES, EACH) + block, tl.sum(exact * exact, axis=0), mask=there)
    tl.store(out + to, y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _product(  # type: ignore[no-untyped-def]
    x, squares, norm, eps, weight, bias, residual, out, sums, left, counters, rows, parts,
    WIDTH: tl.constexpr, LINES: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, GATE: tl.constexpr,
    ADD: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = BLOCK // 2 if GATE else BLOCK
    SHARE: tl.constexpr = (WIDTH + SPLIT * COLUMNS - 1) // (SPLIT * COLUMNS) * COLUMNS
    WHOLE: tl.constexpr = WIDTH % (SPLIT * COLUMNS) == 0
    block, split = tl.program_id(0), tl.program_id(1)
    begin = split * SHARE
    if PDL:
        gdc_wait()
    i = tl.arange(0, BLOCK)
    line = tl.minimum(block * EACH + i % EACH, LINES - 1)
    if GATE:
        line += i // EACH * LINES
    lines = weight + line.to(tl.int64)[:, None] * WIDTH
    row = tl.arange(0, TILE)
    there = row < rows
    if NORM or SCALE:
        part = tl.arange(0, PARTS)
        known = there[:, None] & (part < parts)[None, :]
        known_squares = tl.load(squares + row[:, None] * parts + part[None, :], mask=known, other=0.0)
        scale = tl.zeros((TILE,), dtype=tl.float32)
    y = tl.zeros((BLOCK, TILE), dtype=tl.float32)
    h = y
    if ADD:
        own = block * BLOCK + i
        inside = (own < LINES)[:, None] & there[None, :]
        h = tl.load(residual + row.to(tl.int64)[None, :] * LINES + own[:, None], mask=inside, other=0.0)
    for first in tl.range(begin, min(begin + SHARE, WIDTH), COLUMNS, num_stages=STAGES):
        if NORM:  # noqa: SIM102 - one of the two is known when the kernel is compiled
            # Here, where the first tiles are on their way already.
            if first == begin:
                scale = 1 / tl.sqrt(tl.sum(known_squares, axis=1) / WIDTH + eps)
        column = first + tl.arange(0, COLUMNS)
        real = column < WIDTH
        if WHOLE:
            w = tl.load(lines + column[None, :], eviction_policy="evict_first")
            v = tl.load(x + row[:, None] * WIDTH + column[None, :], mask=there[:, None], other=0.0)
        else:
            w = tl.load(lines + column[None, :], mask=real[None, :], other=0.0, eviction_policy="evict_first")
            v = tl.load(x + row[:, None] * WIDTH + column[None, :], mask=there[:, None] & real[None, :], other=0.0)
        if NORM:
            g = tl.load(norm + column) if WHOLE else tl.load(norm + column, mask=real, other=0.0)
            v = (v.to(tl.float32) * scale[:, None] * g[None, :]).to(w.dtype)
        y = tl.dot(w, tl.trans(v), y)
    if PDL:
        gdc_launch_dependents()
    if SCALE:
        y *= (1 / tl.sqrt(tl.sum(known_squares, axis=1) / WIDTH + eps))[None, :]
    if SPLIT == 1:
        _finish(y, h, bias, out, sums, line, block, row, there, LINES, GATE, ADD, BIAS, EACH, TILE)
    else:
        place = left + (block.to(tl.int64) * SPLIT * BLOCK + i)[:, None] * TILE + row[None, :]
        tl.store(place + split * (BLOCK * TILE), y)
        tl.debug_barrier()
        if tl.atomic_add(counters + block, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.debug_barrier()
            y = tl.load(place, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                y += tl.load(place + other * (BLOCK * TILE), cache_modifier=".cg")
            tl.store(counters + block, 0)
            _finish(y, h, bias, out, sums, line, block, row, there, LINES, GATE, ADD, BIAS, EACH, TILE)


@triton.jit
def _squares(  # type: ignore[no-untyped-def]
    x, added, total, sums, ADD: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    inside = column < WIDTH
    at = row.to(tl.int64) * WIDTH + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v = (v + tl.load(added + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, v, mask=inside)
        v = v.to(tl.float32)
    tl.store(sums + row, tl.sum(v * v, axis=0))


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x, added, norm, total, out, eps, ADD: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    inside = column < WIDTH
    at = row.to(tl.int64) * WIDTH + column
    w = tl.load(norm + column, mask=inside, other=0.0)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v = (v + tl.load(added + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, v, mask=inside)
        v = v.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(v * v, axis=0) / WIDTH + eps)
    tl.store(out + at, (v * scale * w).to(out.dtype.element_ty), mask=inside)


class Form(NamedTuple):
    """How a product is cut up. Only `split`, and whether `block` is 64 or more, change the order of its sums."""

    block: int
    """Lines of the weights that a program has; of 64 and more wgmma makes the products."""
    columns: int
    """At a time."""
    split: int
    stages: int
    warps: int
    apart: bool = False
    """The norm is a kernel of its own: none of the tiles of x goes through registers."""


FORMS = (
    Form(64, 128, 1, 4, 4),
    Form(64, 128, 1, 6, 4),
    Form(64, 128, 1, 8, 4),
    Form(64, 256, 1, 3, 4),
    Form(128, 128, 1, 3, 8),
    Form(64, 128, 2, 5, 4),
    Form(64, 128, 2, 8, 4),
    Form(64, 128, 4, 4, 4),
)
"""Those that were the fastest of some shape, or near it; narrower blocks never were."""
APART = tuple(form._replace(apart=True) for form in FORMS if form.split == 1)


def tile_of(rows: int) -> int:
    """Rows of the tile that so many are padded to."""
    return max(16, int(triton.next_power_of_2(rows)))


def launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    form: Form,
    *,
    norm: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    sums: Tensor | None = None,
    counters: Tensor | None = None,
    warmup: bool = False,
    early: bool | None = None,
) -> None:
    """x [M, K] times weight [N, K] into out [M, N] (gated: [M, N / 2]).

    norm fp32 [K] with squares fp32 [M, parts], which add up to each row's sum of squares: x is normed first; squares
    without a norm: out is divided by the root mean squares. residual
    [M, N] is added; sums [M, blocks] then gets the sum of squares of out, by blocks of form.block. counters int32
    [blocks] are 0 before and after, where form.split > 1. With `warmup` the kernel is only compiled. `early` as in
    `begun_early`.
    """
    (rows, width), lines = x.shape, out.shape[1]
    each = form.block // 2 if gated else form.block
    blocks = triton.cdiv(lines, each)
    left = x
    if form.split > 1:
        left = torch.empty(blocks, form.split, form.block, tile_of(rows), dtype=torch.float32, device=x.device)
    parts = 1 if squares is None else squares.shape[1]
    with torch.cuda.device_of(x):
        _product.run(
            x, x if squares is None else squares, x if norm is None else norm, eps, weight,
            weight if bias is None else bias, x if residual is None else residual, out,
            out if sums is None else sums, left, left if counters is None else counters, rows, parts,
            WIDTH=width, LINES=lines, NORM=norm is not None,
            SCALE=norm is None and squares is not None, GATE=gated, ADD=residual is not None,
            BIAS=bias is not None, PARTS=triton.next_power_of_2(parts), TILE=tile_of(rows), BLOCK=form.block,
            COLUMNS=form.columns, SPLIT=form.split, STAGES=form.stages,
            num_warps=form.warps, grid=(blocks, form.split), warmup=warmup, **begun_early(x, early),
        )  # fmt: skip


def summed(x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + added (None: nothing), [M, K], and of each row the sum of squares, fp32 [M, 1]."""
    rows, width = x.shape
    total = x if added is None else torch.empty_like(x)
    sums = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _squares[(rows,)](
            x, x if added is None else added, total, sums, ADD=added is not None, WIDTH=width, COLUMNS=columns,
            num_warps=8 if columns > 1024 else 4, **begun_early(x),
        )  # fmt: skip
    return total, sums


def normed(
    x: Tensor, added: Tensor | None, norm: Tensor, eps: float, warmup: bool = False, early: bool | None = None
) -> tuple[Tensor, Tensor]:
    """x + added (None: nothing) and its norm, [M, K] each; norm fp32 [K]. The rest as in `launch`."""
    rows, width = x.shape
    total, out = x if added is None else torch.empty_like(x), torch.empty_like(x)
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _norm.run(
            x, x if added is None else added, norm, total, out, eps, ADD=added is not None, WIDTH=width,
            COLUMNS=columns, num_warps=8 if columns > 1024 else 4, grid=(rows,), warmup=warmup,
            **begun_early(x, early),
        )  # fmt: skip
    return total, out
