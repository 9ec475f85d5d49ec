"""The small operations of a decoding round as one kernel each, or two where a row's logits are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early
from . import reference
from .reference import WHOLE

if TYPE_CHECKING:
    from .reference import Ring, Rows

PART = 4096
"""Logits of a part."""
BLOCK = 4096
"""Tokens of a text that are looked at at a time."""
FEW = 1 << 16
"""Logits of all tokens of a row that one program reads alone, if it ends the round too."""
COLUMNS = 1024
"""Of them at a time."""
AGREE, CHANCE, GIVEN = (tl.constexpr(mode) for mode in range(3))
ACCEPT = tl.constexpr(reference.ACCEPT)
GOLDEN, MIX_A, MIX_B = (tl.constexpr(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@triton.jit
def largest_of(line, index, width):  # type: ignore[no-untyped-def]
    """Of logits `index` of a row of `width` the largest value, and the lowest index of that. A number that is none
    counts as infinity."""
    value = tl.load(line + index, mask=index < width, other=-float("inf"))
    value = tl.where(value != value, float("inf"), value)
    most = tl.max(value, 0)
    return most, tl.min(tl.where((value == most) & (index < width), index, 0x7FFFFFFF), 0).to(tl.int64)


@triton.jit
def _largest(  # type: ignore[no-untyped-def]
    logits, values, places, stride, width, PART: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr
):
    """Of a part of each row the largest value and its lowest index; with LAST only the index, of the whole row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    index = part * PART + tl.arange(0, PART)
    most, first = largest_of(logits + row * stride, index, width)
    if LAST:
        tl.store(places + row, first)
    else:
        tl.store(values + row * tl.num_programs(1) + part, most)
        tl.store(places + row * tl.num_programs(1) + part, first)


@triton.jit
def _largest_part(values, places, tokens, parts, PARTS: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    value = tl.load(values + row * parts + part, mask=part < parts, other=-float("inf"))
    place = tl.load(places + row * parts + part, mask=part < parts, other=0x7FFFFFFF)
    tl.store(tokens + row, tl.min(tl.where(value == tl.max(value, 0), place, 0x7FFFFFFF), 0))


def warps_of(part: int) -> int:
    """With which a program has all of a part on the way at once."""
    return max(1, min(16, part // 512))


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The index of the largest of logits [..., V], the lowest of equal ones: int64 [...]. A number that is none counts
    as infinity. Rows of [B, V] may lie apart."""
    width, rows = logits.shape[-1], logits.numel() // logits.shape[-1]
    stride = logits.stride(0) if logits.dim() == 2 else width
    tokens = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device) if out is None else out
    early = begun_early(logits)
    if width <= WHOLE:
        part = triton.next_power_of_2(width)
        _largest[(rows, 1)](
            logits, logits, tokens, stride, width, PART=part, LAST=True, num_warps=warps_of(part), **early
        )
        return tokens
    parts = triton.cdiv(width, PART)
    values = torch.empty(rows, parts, dtype=logits.dtype, device=logits.device)
    places = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    _largest[(rows, parts)](
        logits, values, places, stride, width, PART=PART, LAST=False, num_warps=warps_of(PART), **early
    )
    _largest_part[(rows,)](values, places, tokens, parts, PARTS=triton.next_power_of_2(parts), **early)
    return tokens


@triton.jit
def _match(  # type: ignore[no-untyped-def]
    ids, length, drafts, real, stride, k, across, along,
    SHORTEST: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
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
            # Loaded whether or not the later ones are the same, so that no load waits for another.
            inside = (end > back) & (end < count)
            wanted = tl.load(text + count - 1 - back, mask=count > back, other=0)
            same = same & inside & (tl.load(text + end - 1 - back, mask=inside, other=0) == wanted)
            matched += same.to(tl.int32)
        found = tl.where(matched >= SHORTEST, (matched.to(tl.int64) << 32) + end, 0)
        best = tl.maximum(best, found)
    most = tl.max(best, 0)
    end = (most & 0x7FFFFFFF).to(tl.int32)
    period = tl.where(most > 0, count - end, 1)
    place = tl.arange(0, K)
    token = tl.load(text + end + place % period, mask=place < k)
    tl.store(drafts + row * across + place * along, token, mask=place < k)
    tl.store(real + row, tl.where(most > 0, k, 0))


def match(
    ids: Tensor, length: Tensor, k: int, longest: int, shortest: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Looks the ends of texts up in themselves; shapes as in the room's `match`."""
    batch = len(length)
    drafts = torch.empty(batch, k, dtype=torch.int64, device=ids.device) if out is None else out
    real = torch.empty(batch, dtype=torch.int32, device=ids.device)
    _match[(batch,)](
        ids, length, drafts, real, ids.stride(0), k, *drafts.stride(), SHORTEST=shortest, LONGEST=longest, BLOCK=BLOCK,
        K=triton.next_power_of_2(k), num_warps=16, **begun_early(ids),
    )  # fmt: skip
    return drafts, real


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
def end_round(  # type: ignore[no-untyped-def]
    row, token, drafts, real, verdict, CHANCE_OF: tl.constexpr,
    ids, length, full, running, stops, stream, slots, turn, fed, positions,
    stride, ring, batch, width, stop_count, apart, places,
    k, across, along, K1: tl.constexpr, PLACES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The end of a row's round of tokens [K1]; no other program reads or writes what is the row's."""
    place = tl.arange(0, K1)
    draft = tl.load(drafts + row * across + place * along, mask=place < k, other=0)
    before = tl.load(length + row)
    limit = tl.load(full + row)
    runs = tl.load(running + row) != 0
    number = tl.load(turn + row)
    text = ids + row * stride
    last = tl.load(text + before - 1, mask=before > 0, other=0)
    last_but_one = tl.load(text + before - 2, mask=before > 1, other=0)
    if MODE == CHANCE:
        drafted = tl.zeros([], tl.int32) + k
        stands = random_number(tl.load(stream + row) + tl.zeros([K1], tl.int64), before + place, ACCEPT) < CHANCE_OF
    else:
        drafted = tl.minimum(tl.load(real + row).to(tl.int32), k)
        stands = draft == token
    accepted = verdict if MODE == GIVEN else tl.min(tl.where(stands & (place < drafted), k + 1, place), 0)
    token = tl.where(place < accepted, draft, token)
    grown = tl.minimum(before + accepted + 1, limit)
    stop = k + 1
    for end in range(stop_count):
        wanted = tl.load(stops + end)
        stop = tl.minimum(stop, tl.min(tl.where((token == wanted) & (place <= k), place, k + 1), 0))
    ended = before + stop + 1
    stopped = ended <= grown
    now = tl.where(runs, tl.minimum(grown, ended), before)
    more = now - before
    newest = tl.sum(tl.where(place == more - 1, token, 0), 0)
    newer = tl.sum(tl.where(place == more - 2, token, 0), 0)

    # Some warps may still be reading what others are about to write.
    tl.debug_barrier()
    tl.store(text + before + place, token, mask=place <= k)
    tl.store(length + row, now)
    tl.store(running + row, (runs & (stopped == 0) & (now < limit)).to(tl.int8))
    tl.store(fed + row, tl.where(more > 1, newer, tl.where(more > 0, last, last_but_one)))
    tl.store(fed + apart + row, tl.where(more > 0, newest, last))
    at = tl.arange(0, PLACES)
    tl.store(positions + at * apart + row, (now - 2 + at).to(tl.int32), mask=at < places)
    slot = slots + ((number % ring) * batch + row) * width
    tl.store(slot + place, token, mask=place <= k)
    tl.store(slot + width - 2, drafted.to(tl.int64))
    tl.store(slot + width - 1, accepted.to(tl.int64))
    tl.store(turn + row, number + 1)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    tokens, drafts, real, given,
    ids, length, full, running, stops, stream, slots, turn, fed, positions,
    stride, ring, batch, width, stop_count, apart, places, k, across, along,
    CHANCE_OF: tl.constexpr, K1: tl.constexpr, PLACES: tl.constexpr, MODE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K1)
    token = tl.load(tokens + row * (k + 1) + place, mask=place <= k, other=0)
    accepted = tl.load(given + row).to(tl.int32) if MODE == GIVEN else 0
    end_round(
        row, token, drafts, real, accepted, CHANCE_OF,
        ids, length, full, running, stops, stream, slots, turn, fed, positions,
        stride, ring, batch, width, stop_count, apart, places, k, across, along, K1, PLACES, MODE,
    )  # fmt: skip


@triton.jit
def _finish_greedy(  # type: ignore[no-untyped-def]
    logits, vocabulary, drafts, real,
    ids, length, full, running, stops, stream, slots, turn, fed, positions,
    stride, ring, batch, width, stop_count, apart, places, k, across, along,
    CHANCE_OF: tl.constexpr, K1: tl.constexpr, PLACES: tl.constexpr, MODE: tl.constexpr, PDL: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K1)
    best = tl.full([K1, COLUMNS], -float("inf"), logits.dtype.element_ty)
    where = tl.zeros([K1, COLUMNS], tl.int32)
    line = logits + (row * (k + 1) + place[:, None]) * vocabulary
    for first in tl.static_range(0, WHOLE, COLUMNS):
        index = first + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(line + index, mask=(index < vocabulary) & (place <= k)[:, None], other=-float("inf"))
        value = tl.where(value != value, float("inf"), value)
        where = tl.where(value > best, index, where)
        best = tl.maximum(best, value)
    token = tl.min(tl.where(best == tl.max(best, 1)[:, None], where, 0x7FFFFFFF), 1).to(tl.int64)
    end_round(
        row, token, drafts, real, 0, CHANCE_OF,
        ids, length, full, running, stops, stream, slots, turn, fed, positions,
        stride, ring, batch, width, stop_count, apart, places, k, across, along, K1, PLACES, MODE,
    )  # fmt: skip


def of_round(rows: Rows, ring: Ring, drafts: Tensor) -> tuple[tuple[Tensor | int, ...], dict[str, int]]:
    """What `end_round` is given behind the verdict: tensors and sizes, and constants. `k` and drafts' strides come
    last."""
    batch, k = drafts.shape
    slots, (fed, positions) = ring.slots if ring.mirror is None else ring.mirror, rows.inputs
    tensors = rows.ids, rows.length, rows.full, rows.running.view(torch.int8), rows.stops, rows.stream
    sizes = rows.ids.stride(0), len(slots), batch, slots.shape[2], rows.stops.numel(), fed.stride(0), len(fed)
    constants = {"K1": triton.next_power_of_2(k + 1), "PLACES": triton.next_power_of_2(len(fed))}
    return (*tensors, slots, ring.turn, fed, positions, *sizes, k, *drafts.stride()), constants


def finish(
    tokens: Tensor,
    drafts: Tensor,
    real: Tensor,
    rows: Rows,
    ring: Ring,
    chance: float | None = None,
    accepted: Tensor | None = None,
) -> None:
    """The end of a round; arguments as in the room's `finish`, contiguous but for `drafts`."""
    given, constants = of_round(rows, ring, drafts)
    mode = GIVEN if accepted is not None else AGREE if chance is None else CHANCE
    _finish[(len(drafts),)](
        tokens, drafts, real, real if accepted is None else accepted, *given, CHANCE_OF=chance, MODE=mode, num_warps=1,
        **constants, **begun_early(tokens),
    )  # fmt: skip


def finish_greedy(
    logits: Tensor, drafts: Tensor, real: Tensor, rows: Rows, ring: Ring, chance: float | None = None
) -> None:
    """The same of the likeliest tokens of logits [B, K + 1, V], by one kernel where they are few."""
    count, width = logits.shape[1:]
    if width > WHOLE or count * width > FEW:
        finish(greedy(logits), drafts, real, rows, ring, chance)
        return
    given, constants = of_round(rows, ring, drafts)
    whole = triton.next_power_of_2(width)
    columns = min(whole, COLUMNS * 8 // constants["K1"])
    _finish_greedy[(len(drafts),)](
        logits, width, drafts, real, *given, CHANCE_OF=chance, MODE=AGREE if chance is None else CHANCE,
        WHOLE=whole, COLUMNS=columns, num_warps=max(1, min(16, constants["K1"] * columns // 512)),
        **constants, **begun_early(logits),
    )  # fmt: skip


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
