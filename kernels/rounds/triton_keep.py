"""Top-k and top-p without a sort: the logit of the last token that is kept is found by its bits, from the highest down.

Logits are compared as whole numbers of the same order, as in `filters`. A pass asks of 15 thresholds at once how many
logits, or what mass, each part of a row has at or above them; the next pass begins with the sum of that over the parts.
So fp32 logits take eight passes, which are recorded in a graph one behind the other, and nobody waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import parts_of

BITS = 4
TRIED = 1 << BITS


@triton.jit
def _keys(value, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whole numbers in the order of the logits, equal where these are, as zeros are."""
    value = value + 0.0
    bits = value.to(tl.int64 if WIDE else tl.int32, bitcast=True)
    negative = (bits >> 63) & 0x7FFFFFFFFFFFFFFF if WIDE else (bits >> 31) & 0x7FFFFFFF
    return (bits ^ negative).to(tl.int64)


@triton.jit
def _largest(logits, most, stride, width, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * PART + tl.arange(0, PART)
    value = tl.load(logits + row * stride + index, mask=index < width, other=-float("inf"))
    tl.store(most + row * tl.num_programs(1) + tl.program_id(1), tl.max(value, 0).to(tl.float64))


@triton.jit
def _top(most, row, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(most + row * parts + part, mask=part < parts, other=-float("inf")), 0)


@triton.jit
def _weights(value, inside, top, COUNTS: tl.constexpr, TEMPERATURE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a logit counts: one, or its weight."""
    value = value.to(tl.float64)
    some = inside & (value > -float("inf"))
    weight = value * 0 + 1 if COUNTS else tl.exp((value - top) / TEMPERATURE)
    return tl.where(some, weight, 0.0)


@triton.jit
def _found(  # type: ignore[no-untyped-def]
    masses, found, row, parts, turn, rows, shift,
    NEED: tl.constexpr, COUNTS: tl.constexpr, PARTS: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """After `turn` passes, of which the last tried multiples of 1 << shift: the largest threshold at or above which
    there is what is needed, as far as its bits are known; and what is needed."""
    part = tl.arange(0, PARTS)
    tried = tl.arange(0, TRIED)
    place = (((turn - 1) * rows + row) * parts + part[:, None]) * TRIED + tried[None, :]
    sums = tl.sum(tl.load(masses + place, mask=(part < parts)[:, None], other=0.0), 0)
    whole = tl.sum(tl.load(masses + (row * parts + part) * TRIED, mask=part < parts, other=0.0), 0)
    need = NEED + 0.0 * whole if COUNTS else tl.maximum(NEED * whole, 2.2250738585072014e-308)
    hits = tl.sum(tl.where((tried > 0) & (sums >= need), 1, 0), 0).to(tl.int64)
    return tl.load(found + (turn - 1) * rows + row) + (hits << shift), need


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    logits, most, masses, found, stride, width, parts, rows, turn, shift,
    NEED: tl.constexpr, FIRST: tl.constexpr, COUNTS: tl.constexpr, WIDE: tl.constexpr,
    TEMPERATURE: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """One pass over a part of a row. The sum for threshold 0 is that of all."""
    row = tl.program_id(0).to(tl.int64)
    if FIRST:
        at = tl.full([], -1, tl.int64) << (BITS + shift - 1)
    else:
        at, _ = _found(masses, found, row, parts, turn, rows, shift + BITS, NEED, COUNTS, PARTS, TRIED)
    tl.store(found + turn * rows + row, at)
    index = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = index < width
    value = tl.load(logits + row * stride + index, mask=inside, other=-float("inf"))
    weight = _weights(value, inside, _top(most, row, parts, PARTS), COUNTS, TEMPERATURE)
    key = _keys(value, WIDE)
    place = ((turn * rows + row) * parts + tl.program_id(1)) * TRIED
    tl.store(masses + place, tl.sum(weight, 0))
    step = tl.full([], 1, tl.int64) << shift
    for tried in tl.static_range(1, TRIED):
        tl.store(masses + place + tried, tl.sum(tl.where(key >= at + tried * step, weight, 0.0), 0))


@triton.jit
def _equals(  # type: ignore[no-untyped-def]
    logits, most, masses, found, above, equal, stride, width, parts, rows, turn,
    NEED: tl.constexpr, COUNTS: tl.constexpr, WIDE: tl.constexpr, TEMPERATURE: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """Of a part what stands above the threshold, and how many logits are equal to it."""
    row = tl.program_id(0).to(tl.int64)
    least, _ = _found(masses, found, row, parts, turn, rows, 0, NEED, COUNTS, PARTS, TRIED)
    index = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = index < width
    value = tl.load(logits + row * stride + index, mask=inside, other=-float("inf"))
    weight = _weights(value, inside, _top(most, row, parts, PARTS), COUNTS, TEMPERATURE)
    key = _keys(value, WIDE)
    place = row * parts + tl.program_id(1)
    tl.store(above + place, tl.sum(tl.where(key > least, weight, 0.0), 0))
    tl.store(equal + place, tl.sum(tl.where((key == least) & (weight > 0), 1, 0), 0))


@triton.jit
def _leave(  # type: ignore[no-untyped-def]
    logits, most, masses, found, above, equal, out, stride, width, parts, rows, turn,
    NEED: tl.constexpr, COUNTS: tl.constexpr, WIDE: tl.constexpr, TEMPERATURE: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """The part without what is left out: of those equal to the threshold the first are kept, until there is enough."""
    row = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1)
    least, need = _found(masses, found, row, parts, turn, rows, 0, NEED, COUNTS, PARTS, TRIED)
    part = tl.arange(0, PARTS)
    higher = tl.sum(tl.load(above + row * parts + part, mask=part < parts, other=0.0), 0)
    before = tl.sum(tl.load(equal + row * parts + part, mask=part < mine, other=0), 0)
    index = mine * PART + tl.arange(0, PART)
    inside = index < width
    value = tl.load(logits + row * stride + index, mask=inside, other=-float("inf"))
    weight = _weights(value, inside, _top(most, row, parts, PARTS), COUNTS, TEMPERATURE)
    key = _keys(value, WIDE)
    same = (key == least) & (weight > 0)
    standing = before + tl.cumsum(same.to(tl.int32), 0) - 1
    stays = ((key > least) & (weight > 0)) | (same & (higher + standing * weight < need))
    tl.store(out + row * width + index, tl.where(stays, value, -float("inf")), mask=inside)


def keep(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits [B, V], whose rows may lie apart, or [B, T, V] with -inf in place of what the filters leave out."""
    width = logits.shape[-1]
    if 0 < top_k < width:
        logits = _kept(logits, 1.0, top_k, counts=True)
    return _kept(logits, temperature, top_p, counts=False) if top_p < 1 else logits


def _kept(logits: Tensor, temperature: float, need: float, counts: bool) -> Tensor:
    width, rows = logits.shape[-1], logits.numel() // logits.shape[-1]
    stride = logits.stride(0) if logits.dim() == 2 else width
    wide, (parts, part) = logits.dtype == torch.float64, parts_of(width)
    turns = (64 if wide else 32) // BITS
    empty = logits.new_empty
    most, above = empty(rows, parts, dtype=torch.float64), empty(rows, parts, dtype=torch.float64)
    equal = empty(rows, parts, dtype=torch.int32)
    masses, found = empty(turns, rows, parts, TRIED, dtype=torch.float64), empty(turns, rows, dtype=torch.int64)
    out = empty(logits.shape)
    shapes = {"COUNTS": counts, "WIDE": wide, "TEMPERATURE": temperature, "TRIED": TRIED, "num_warps": 8}
    shapes |= {"PARTS": triton.next_power_of_2(parts), "PART": part, "NEED": float(need)}
    grid = rows, parts
    _largest[grid](logits, most, stride, width, PART=part, num_warps=8)
    for turn in range(turns):
        _search[grid](
            logits, most, masses, found, stride, width, parts, rows, turn, BITS * (turns - 1 - turn),
            FIRST=turn == 0, BITS=BITS, **shapes,
        )  # fmt: skip
    sizes = stride, width, parts, rows, turns
    _equals[grid](logits, most, masses, found, above, equal, *sizes, **shapes)
    _leave[grid](logits, most, masses, found, above, equal, out, *sizes, **shapes)
    return out
