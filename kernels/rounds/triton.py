"""The small operations of a decoding round as one kernel each, or two where a row's logits are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .reference import Ring, Rows

WHOLE = 1 << 14
"""Logits of a row that one program reads alone: beyond, a second kernel takes less time than the wait."""
PART = 4096
"""Logits of a part."""
BLOCK = 1024
AGREE, STANDS, GIVEN = (tl.constexpr(mode) for mode in range(3))
GOLDEN, MIX_A, MIX_B = (tl.constexpr(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@triton.jit
def _largest(logits, values, places, stride, width, PART: tl.constexpr, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a part of each row the largest value and its lowest index; with LAST only the index, of the whole row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    index = part * PART + tl.arange(0, PART)
    value = tl.load(logits + row * stride + index, mask=index < width, other=-float("inf"))
    value = tl.where(value != value, float("inf"), value)
    most = tl.max(value, 0)
    first = tl.min(tl.where((value == most) & (index < width), index, 0x7FFFFFFF), 0).to(tl.int64)
    if LAST:
        tl.store(places + row, first)
    else:
        tl.store(values + row * tl.num_programs(1) + part, most)
        tl.store(places + row * tl.num_programs(1) + part, first)


@triton.jit
def _largest_part(values, places, tokens, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    value = tl.load(values + row * parts + part, mask=part < parts, other=-float("inf"))
    place = tl.load(places + row * parts + part, mask=part < parts, other=0x7FFFFFFF)
    tl.store(tokens + row, tl.min(tl.where(value == tl.max(value, 0), place, 0x7FFFFFFF), 0))


def _warps(part: int) -> int:
    """With which a program has all of a part on the way at once."""
    return max(1, min(16, part // 512))


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The index of the largest of logits [..., V], the lowest of equal ones: int64 [...]. A number that is none counts
    as infinity. Rows of [B, V] may lie apart."""
    width, rows = logits.shape[-1], logits.numel() // logits.shape[-1]
    stride = logits.stride(0) if logits.dim() == 2 else width
    tokens = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device) if out is None else out
    if width <= WHOLE:
        part = triton.next_power_of_2(width)
        _largest[(rows, 1)](logits, logits, tokens, stride, width, PART=part, LAST=True, num_warps=_warps(part))
        return tokens
    parts = triton.cdiv(width, PART)
    values = torch.empty(rows, parts, dtype=logits.dtype, device=logits.device)
    places = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    _largest[(rows, parts)](logits, values, places, stride, width, PART=PART, LAST=False, num_warps=_warps(PART))
    _largest_part[(rows,)](values, places, tokens, parts, PARTS=triton.next_power_of_2(parts))
    return tokens


@triton.jit
def _ending(ids, length, tokens, start, stride, count, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, COUNT)
    first = tl.load(length + row) - count
    token = tl.load(ids + row * stride + first + place, mask=place < count)
    tl.store(tokens + row * count + place, token, mask=place < count)
    tl.store(start + row, first.to(tl.int32))


def ending(ids: Tensor, length: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last tokens of texts, int64 [B, count], and the position of the first of them, int32 [B]."""
    batch = len(length)
    tokens = torch.empty(batch, count, dtype=torch.int64, device=ids.device)
    start = torch.empty(batch, dtype=torch.int32, device=ids.device)
    _ending[(batch,)](ids, length, tokens, start, ids.stride(0), count, COUNT=triton.next_power_of_2(count))
    return tokens, start


@triton.jit
def _match(  # type: ignore[no-untyped-def]
    ids, length, drafts, real, stride, k,
    SHORTEST: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    text = ids + row * stride
    count = tl.load(length + row).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    # Longer matches come first, then later ones: matched tokens in the high bits, where the match ends in the low.
    best = tl.zeros([BLOCK], tl.int64)
    for first in range(1, count, BLOCK):
        end = first + lane
        matched = tl.zeros([BLOCK], tl.int32)
        same = end < count
        for back in tl.static_range(LONGEST):
            same = same & (end > back)
            wanted = tl.load(text + count - 1 - back, mask=count > back, other=0)
            same = same & (tl.load(text + end - 1 - back, mask=same, other=0) == wanted)
            matched += same.to(tl.int32)
        found = tl.where(matched >= SHORTEST, (matched.to(tl.int64) << 32) + end, 0)
        best = tl.maximum(best, found)
    most = tl.max(best, 0)
    end = (most & 0x7FFFFFFF).to(tl.int32)
    period = tl.where(most > 0, count - end, 1)
    place = tl.arange(0, K)
    token = tl.load(text + end + place % period, mask=place < k)
    tl.store(drafts + row * k + place, token, mask=place < k)
    tl.store(real + row, tl.where(most > 0, k, 0))


def match(ids: Tensor, length: Tensor, k: int, longest: int, shortest: int) -> tuple[Tensor, Tensor]:
    """Looks the ends of texts up in themselves; shapes as in the room's `match`."""
    batch = len(length)
    drafts = torch.empty(batch, k, dtype=torch.int64, device=ids.device)
    real = torch.empty(batch, dtype=torch.int32, device=ids.device)
    _match[(batch,)](ids, length, drafts, real, ids.stride(0), k, SHORTEST=shortest, LONGEST=longest, BLOCK=BLOCK,
                     K=triton.next_power_of_2(k), num_warps=8)  # fmt: skip
    return drafts, real


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    ids, length, full, running, stops, slots, turn, tokens, drafts, real, verdict,
    stride, ring, batch, width, k, across, along, stop_count, K1: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K1)
    token = tl.load(tokens + row * (k + 1) + place, mask=place <= k, other=0)
    draft = tl.load(drafts + row * across + place * along, mask=place < k, other=0)
    drafted = tl.minimum(tl.load(real + row).to(tl.int32), k)
    if MODE == GIVEN:
        accepted = tl.load(verdict + row).to(tl.int32)
    else:
        stands = tl.load(verdict + row * k + place, mask=place < k, other=0) != 0 if MODE == STANDS else draft == token
        accepted = tl.min(tl.where(stands & (place < drafted), k + 1, place), 0)
    token = tl.where(place < accepted, draft, token)

    before = tl.load(length + row)
    limit = tl.load(full + row)
    runs = tl.load(running + row) != 0
    tl.store(ids + row * stride + before + place, token, mask=place <= k)
    grown = tl.minimum(before + accepted + 1, limit)
    stop = k + 1
    for number in range(stop_count):
        wanted = tl.load(stops + number)
        stop = tl.minimum(stop, tl.min(tl.where((token == wanted) & (place <= k), place, k + 1), 0))
    ended = before + stop + 1
    stopped = ended <= grown
    grown = tl.minimum(grown, ended)
    now = tl.where(runs, grown, before)
    tl.store(length + row, now)
    tl.store(running + row, (runs & (stopped == 0) & (now < limit)).to(tl.int8))

    at = tl.load(turn + row)
    slot = slots + ((at % ring) * batch + row) * width
    tl.store(slot + place, token, mask=place <= k)
    tl.store(slot + width - 2, drafted.to(tl.int64))
    tl.store(slot + width - 1, accepted.to(tl.int64))
    tl.store(turn + row, at + 1)


def finish(
    tokens: Tensor,
    drafts: Tensor,
    real: Tensor,
    rows: Rows,
    ring: Ring,
    stands: Tensor | None = None,
    accepted: Tensor | None = None,
) -> None:
    """The end of a round; arguments as in the room's `finish`, contiguous but for `drafts`."""
    batch, k = drafts.shape
    mode, verdict = (GIVEN, accepted) if accepted is not None else (AGREE, real) if stands is None else (STANDS, stands)
    if verdict.dtype == torch.bool:
        verdict = verdict.view(torch.int8)
    _finish[(batch,)](
        rows.ids, rows.length, rows.full, rows.running.view(torch.int8), rows.stops, ring.slots, ring.turn,
        tokens, drafts, real, verdict, rows.ids.stride(0), ring.slots.shape[0], batch, ring.slots.shape[2], k,
        *drafts.stride(), rows.stops.numel(), K1=triton.next_power_of_2(k + 1), MODE=mode, num_warps=1,
    )  # fmt: skip


@triton.jit
def random_number(stream, position, purpose):  # type: ignore[no-untyped-def]
    """The random number of a key, fp64 in [0, 1)."""
    state = (stream.to(tl.uint64, bitcast=True) ^ position.to(tl.uint64, bitcast=True)) + GOLDEN
    state = (state ^ (state >> 30)) * MIX_A
    state = (state ^ (state >> 27)) * MIX_B
    state = ((state ^ (state >> 31)) ^ purpose) + GOLDEN
    state = (state ^ (state >> 30)) * MIX_A
    state = (state ^ (state >> 27)) * MIX_B
    return ((state ^ (state >> 31)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _uniform(stream, position, out, per, count, purpose: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    key = tl.load(stream + at // per, mask=inside, other=0)
    place = tl.load(position + at, mask=inside, other=0)
    tl.store(out + at, random_number(key, place, purpose), mask=inside)


def uniform(stream: Tensor, position: Tensor, purpose: int) -> Tensor:
    """Random numbers fp64 of the shape of position int64 [B, …], contiguous, whose rows' keys are stream int64 [B]."""
    out = torch.empty(position.shape, dtype=torch.float64, device=position.device)
    count = position.numel()
    grid = (triton.cdiv(count, 128),)
    _uniform[grid](stream, position, out, count // len(stream), count, purpose=purpose, BLOCK=128)
    return out


@triton.jit
def _mark_draft(place):  # type: ignore[no-untyped-def]
    tl.store(place, 0)


@triton.jit
def _mark_target(place):  # type: ignore[no-untyped-def]
    tl.store(place, 1)


@triton.jit
def _mark_rest(place):  # type: ignore[no-untyped-def]
    tl.store(place, 2)


MARKS = {"draft": _mark_draft, "target": _mark_target, "rest": _mark_rest}


def mark(place: Tensor, name: str) -> None:
    """A kernel of this name, which only writes `place`, int32 [1]."""
    MARKS[name][(1,)](place, num_warps=1)
