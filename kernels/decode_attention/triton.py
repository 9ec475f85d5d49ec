"""Decoding attention in two Triton kernels: the cache in SPLITS parts a row and group, then their sum.

A program has one group of one row: its R heads times T tokens are the rows of one query tile, so that keys and values
are read once. What a row has before `start` is divided into SPLITS parts on the device, by the length that it has now:
the grid never depends on data, a CUDA graph serves every length, and all programs have work whatever the capacity. The
last part also has the new tokens, whose keys it turns and writes: no other program reads those slots. Queries are
normed and turned by every part, since they are few.

A program begins while the kernel before ends: what that writes are new queries, keys and values, while where a row
begins and what it has before were there already. It has the first tile of these brought to the L2 cache, then waits.

Softmax is in base 2 and fp32, without a maximum that is fixed beforehand: each part leaves its own with its sum.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early

if TYPE_CHECKING:
    from .reference import Norms

LOG2E = 1.4426950408889634
MOST = 64
"""Parts of a row at most: a program of the second kernel holds one number of each, and a head of each."""


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    heads, at, there, position, rotary, weight, eps, WIDTH: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr
):
    """fp32 [M, P]: the heads that begin at `at` [M], normed and turned as at `position` [M]."""
    column = tl.arange(0, P)
    partner = tl.where(column < WIDTH // 2, column + WIDTH // 2, column - WIDTH // 2)
    inside = there[:, None] & (column < WIDTH)[None, :]
    x = tl.load(heads + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(heads + at[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
        x *= scale[:, None] * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        y *= scale[:, None] * tl.load(weight + partner, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    turn = rotary + position.to(tl.int64)[:, None] * (2 * WIDTH) + column[None, :]
    cos = tl.load(turn, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(turn + WIDTH, mask=inside, other=0.0).to(tl.float32)
    return x * cos + tl.where(column < WIDTH // 2, -1.0, 1.0)[None, :] * y * sin


@triton.jit
def _merged(top, total, y, scores, v, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Running maximum [M], sum [M] and output [M, P] with scores [M, N] (-inf: unseen) of values v [N, P]."""
    new = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new == -float("inf"), 0.0, new)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, axis=1)
    y = tl.dot(weights.to(v.dtype), v, acc=y * fade[:, None], input_precision=PRECISION)
    return new, total, y


@triton.jit
def _ask(keys, values, first, last, STRIDE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Has N keys and values brought to the L2 cache, where nothing is ever out of date: WIDTH numbers of 2 bytes each,
    from slot `first` on and before `last`, STRIDE numbers from slot to slot."""
    line = tl.arange(0, 2 * N)
    slot = first + line % N
    cache = tl.where(line < N, keys.to(tl.int64), values.to(tl.int64))
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [cache + slot.to(tl.int64) * (2 * STRIDE), (slot < last).to(tl.int32), 2 * WIDTH],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    projected, keys, values, starts, rotary, q_weight, k_weight, out, tops, totals, capacity, scale, eps,
    T: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    NORM: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, TP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, ASKS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = HEADS // GROUPS
    LINE: tl.constexpr = (HEADS + 2 * GROUPS) * WIDTH
    row, group, split = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1)
    # By the L2 cache: it was written by an earlier kernel than the one before, which alone may not have ended yet.
    begin = tl.load(starts + row, cache_modifier=".cg").to(tl.int32)
    low = 0
    if WINDOW:
        low = tl.maximum(begin - WINDOW + 1, 0)
    part = tl.cdiv(tl.cdiv(begin - low, SPLITS), N) * N
    first = low + split * part
    last = tl.minimum(first + part, begin)
    origin = (row.to(tl.int64) * capacity * GROUPS + group) * WIDTH
    if PDL:
        if ASKS:
            _ask(keys + origin, values + origin, first, last, GROUPS * WIDTH, WIDTH, N)
        gdc_wait()
        gdc_launch_dependents()
    column = tl.arange(0, P)
    query = tl.arange(0, M)
    token, head = query // R, group * R + query % R
    there = query < T * R
    line = row * T + token
    q = _turned(
        projected, line.to(tl.int64) * LINE + head * WIDTH, there, begin + token, rotary, q_weight, eps, WIDTH, P, NORM
    ).to(keys.dtype.element_ty)
    top = tl.full((M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    y = tl.zeros((M, P), dtype=tl.float32)

    cache = origin + column
    for at in tl.range(first, last, N, num_stages=STAGES):
        slot = at + tl.arange(0, N)
        where = cache[None, :] + slot.to(tl.int64)[:, None] * (GROUPS * WIDTH)
        inside = (slot < last)[:, None] & (column < WIDTH)[None, :]
        k = tl.load(keys + where, mask=inside, other=0.0)
        v = tl.load(values + where, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = (slot < last)[None, :]
        if WINDOW:
            seen = seen & (slot[None, :] > (begin + token)[:, None] - WINDOW)
        top, total, y = _merged(top, total, y, tl.where(seen, scores, -float("inf")), v, PRECISION)

    if split == SPLITS - 1:
        new = tl.arange(0, TP)
        fresh = new < T
        begins = (row * T + new).to(tl.int64) * LINE + (HEADS + group) * WIDTH
        own = _turned(projected, begins, fresh, begin + new, rotary, k_weight, eps, WIDTH, P, NORM)
        own = own.to(keys.dtype.element_ty)
        real = fresh[:, None] & (column < WIDTH)[None, :]
        brought = tl.load(projected + begins[:, None] + GROUPS * WIDTH + column[None, :], mask=real, other=0.0)
        slots = cache[None, :] + (begin + new).to(tl.int64)[:, None] * (GROUPS * WIDTH)
        held = real & (begin + new < capacity)[:, None]
        tl.store(keys + slots, own, mask=held)
        tl.store(values + slots, brought, mask=held)
        products = tl.dot(q, tl.trans(own), input_precision=PRECISION) * scale
        before = fresh[None, :] & (new[None, :] <= token[:, None])
        if WINDOW:
            before = before & (new[None, :] > token[:, None] - WINDOW)
        top, total, y = _merged(top, total, y, tl.where(before, products, -float("inf")), brought, PRECISION)

    written = there[:, None] & (column < WIDTH)[None, :]
    if SPLITS == 1:
        to = (line.to(tl.int64) * HEADS + head)[:, None] * WIDTH + column[None, :]
        y /= tl.where(there, total, 1.0)[:, None]
        tl.store(out + to, y.to(out.dtype.element_ty), mask=written)
    else:
        left = (tl.program_id(0).to(tl.int64) * SPLITS + split) * (T * R) + query
        tl.store(out + left[:, None] * WIDTH + column[None, :], y, mask=written & (total > 0)[:, None])
        tl.store(tops + left, top, mask=there)
        tl.store(totals + left, total, mask=there)


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    parts, tops, totals, out,
    T: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one token a program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    R: tl.constexpr = HEADS // GROUPS
    row, group, query = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1)
    where = (tl.program_id(0).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)) * (T * R) + query
    column = tl.arange(0, P)
    top = tl.load(tops + where)
    weight = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(totals + where), axis=0)
    inside = (top > -float("inf"))[:, None] & (column < WIDTH)[None, :]
    y = tl.load(parts + where[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    y = tl.sum(y * weight[:, None], axis=0) / total
    line = (row * T + query // R).to(tl.int64) * HEADS + group * R + query % R
    tl.store(out + line * WIDTH + column, y.to(out.dtype.element_ty), mask=column < WIDTH)


@functools.cache
def processors(device: torch.device) -> int:
    """Of the GPU; on a CPU (the interpreter) those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def splits(pairs: int, capacity: int, processors: int, tile: int) -> int:
    """Parts of each of the `pairs` of a row and a group: the power of 2 with which up to two programs fall to a
    processor, and no more than a full row has tiles."""
    wanted = max(1, 2 * processors // pairs)
    return min(MOST, 1 << wanted.bit_length() - 1, triton.next_power_of_2(triton.cdiv(capacity, tile)))


class Form(NamedTuple):
    """What a call is cut into. None of it changes what is computed but the order of sums."""

    parts: int
    """Of each row and group, a power of 2."""
    tile: int
    """Keys at a time."""
    stages: int
    """Tiles on their way from memory."""
    warps: int
    asks: bool = True
    """Programs ask for their first tile while the kernel before ends."""


def form_for(keys: Tensor, queries: int, window: int) -> Form:
    """The form for caches [B, S, G, P] and `queries` (heads of a group times tokens)."""
    batch, capacity, groups, width = keys.shape
    rows, wide = _padded(queries), _padded(width)
    tile = 64 if wide * keys.itemsize <= 256 else 32
    reach = min(capacity, window) if window else capacity
    parts = splits(batch * groups, reach, processors(keys.device), tile)
    return Form(parts, tile, 3, 8 if rows > 64 or (rows > 16 and keys.itemsize > 2) else 4)


def _padded(size: int) -> int:
    """The side of a tile for tensor cores."""
    return max(16, triton.next_power_of_2(size))


def decode_attention(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    rotary: Tensor,
    window: int,
    norms: Norms | None,
    form: Form | None = None,
    early: bool | None = None,
) -> Tensor:
    """Shapes as in the room's `decode_attention`; `early` as in `begun_early`."""
    batch, capacity, groups, width = keys.shape
    heads, count = projected.shape[1] // width - 2 * groups, projected.shape[0] // batch
    queries = heads // groups * count
    parts, tile, stages, warps, asks = form or form_for(keys, queries, window)
    y = torch.empty(projected.shape[0], heads * width, dtype=projected.dtype, device=keys.device)
    shape = batch * groups, parts, queries
    left = y if parts == 1 else torch.empty(*shape, width, dtype=torch.float32, device=keys.device)
    tops, totals = torch.empty(2, *shape, dtype=torch.float32, device=keys.device).unbind()
    q_weight, k_weight, eps = norms or (rotary, rotary, 0.0)
    sizes = {"T": count, "HEADS": heads, "GROUPS": groups, "WIDTH": width, "SPLITS": parts, "P": _padded(width)}
    sizes |= begun_early(keys, early)
    with torch.cuda.device_of(keys):
        _attend[(batch * groups, parts)](
            projected.contiguous(), keys, values, start, rotary, q_weight, k_weight, left, tops, totals, capacity,
            width**-0.5 * LOG2E, eps, **sizes, WINDOW=window, NORM=norms is not None, M=_padded(queries), N=tile, TP=16,
            PRECISION="tf32x3" if keys.dtype == torch.float32 else "tf32", STAGES=stages, num_warps=warps,
            ASKS=asks and keys.itemsize == 2 and width % 8 == 0,
        )  # fmt: skip
        if parts > 1:
            _sum[(batch * groups, queries)](left, tops, totals, y, **sizes, num_warps=4)
    return y
