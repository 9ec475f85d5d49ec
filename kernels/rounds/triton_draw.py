"""Drawing from softmax(logits / temperature), and judging drafts that were drawn so, without the distributions in
memory.

Rows are cut into parts. Each leaves its largest logit and the mass of its weights beside that; who draws finds the part
in which the distribution function passes the random number, and then the token in it. Everything is fp64, as in the
plain form, which sums in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early
from . import reference
from .reference import Drawn, parts_of
from .triton import CHANCE, GIVEN, end_round, of_round, random_number

if TYPE_CHECKING:
    from .reference import Ring, Rows

TOKEN, ACCEPT = tl.constexpr(reference.TOKEN), tl.constexpr(reference.ACCEPT)


@triton.jit
def _mass(  # type: ignore[no-untyped-def]
    logits, kept, most, mass, stride, width,
    KEEP: tl.constexpr, TEMPERATURE: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of a part of each row the largest logit and the sum of exp((logit - largest) / temperature). With KEEP the row is
    copied."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    index = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = index < width
    value = tl.load(logits + row * stride + index, mask=inside, other=-float("inf"))
    if KEEP:
        tl.store(kept + row * width + index, value, mask=inside)
    top = tl.max(value, 0).to(tl.float64)
    weight = tl.exp((value.to(tl.float64) - top) / TEMPERATURE)
    tl.store(most + part, top)
    tl.store(mass + part, tl.sum(tl.where(value.to(tl.float64) > -float("inf"), weight, 0.0), 0))


@triton.jit
def _part_of(weight, at, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The part in which the distribution function passes `at`, the mass before it and the mass to reach; the last part
    with any mass where rounding has none."""
    part = tl.arange(0, PARTS)
    cumulative = tl.cumsum(weight, 0)
    reach = at * tl.max(cumulative, 0)
    some = weight > 0
    chosen = tl.min(tl.where((cumulative > reach) & some, part, PARTS), 0)
    chosen = tl.where(chosen < PARTS, chosen, tl.max(tl.where(some, part, 0), 0))
    return chosen, tl.sum(tl.where(part < chosen, weight, 0.0), 0), reach


@triton.jit
def _token_of(weight, before, reach, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same within a part, whose weights these are."""
    lane = tl.arange(0, PART)
    some = weight > 0
    token = tl.min(tl.where((before + tl.cumsum(weight, 0) > reach) & some, lane, PART), 0)
    return tl.where(token < PART, token, tl.max(tl.where(some, lane, 0), 0))


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits, most, mass, stream, before, tokens, stride, width, parts, per,
    PURPOSE: tl.constexpr, TEMPERATURE: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(before + row // per).to(tl.int64) + 1 + row % per
    at = random_number(tl.load(stream + row // per), position, PURPOSE)
    part = tl.arange(0, PARTS)
    top = tl.load(most + row * parts + part, mask=part < parts, other=-float("inf"))
    weight = tl.load(mass + row * parts + part, mask=part < parts, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.where(weight > 0, weight * tl.exp((top - highest) / TEMPERATURE), 0.0)
    chosen, passed, reach = _part_of(weight, at, PARTS)
    index = chosen * PART + tl.arange(0, PART)
    value = tl.load(logits + row * stride + index, mask=index < width, other=-float("inf")).to(tl.float64)
    weight = tl.where(value > -float("inf"), tl.exp((value - highest) / TEMPERATURE), 0.0)
    token = chosen * PART + _token_of(weight, passed, reach, PART)
    tl.store(tokens + row, tl.minimum(token, width - 1).to(tl.int64))


def _measured(logits: Tensor, temperature: float, kept: Drawn | None, place: int) -> tuple[Tensor, Tensor]:
    """Largest logits and masses [rows, parts] fp64; with `kept` they, and the logits, are written there."""
    width, rows = logits.shape[-1], logits.numel() // logits.shape[-1]
    parts, part = parts_of(width)
    if kept is None:
        most = torch.empty(rows, parts, dtype=torch.float64, device=logits.device)
        copy, mass = logits, torch.empty_like(most)
    else:
        copy, most, mass = kept.logits[place], kept.most[place], kept.mass[place]
    stride = logits.stride(0) if logits.dim() == 2 else width
    _mass[(rows, parts)](
        logits, copy, most, mass, stride, width, KEEP=kept is not None, TEMPERATURE=temperature, PART=part, num_warps=8,
        **begun_early(logits),
    )  # fmt: skip
    return most, mass


def drawn(
    logits: Tensor, temperature: float, stream: Tensor, before: Tensor, purpose: int, kept: Drawn | None, place: int,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens int64 [B] or [B, T] drawn from logits [B, V], whose rows may lie apart, or [B, T, V]."""
    width = logits.shape[-1]
    most, mass = _measured(logits, temperature, kept, place)
    tokens = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device) if out is None else out
    rows, (parts, part) = len(most), parts_of(width)
    stride = logits.stride(0) if logits.dim() == 2 else width
    _draw[(rows,)](
        logits, most, mass, stream, before, tokens, stride, width, parts, rows // len(stream), PURPOSE=purpose,
        TEMPERATURE=temperature, PARTS=triton.next_power_of_2(parts), PART=part, num_warps=8,
        **begun_early(logits),
    )  # fmt: skip
    return tokens


@triton.jit
def _left(  # type: ignore[no-untyped-def]
    target, kept, row, end, index, batch, width, count, judged, top_p, share_p, top_q, share_q,
    TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """p and max(p - q, 0) of tokens `index`; p where no share of q is to be taken off."""
    inside = index < width
    said = tl.load(target + (row * count + end) * width + index, mask=inside, other=-float("inf")).to(tl.float64)
    p = tl.where(said > -float("inf"), tl.exp((said - top_p) / TEMPERATURE) * share_p, 0.0)
    tried = tl.minimum(end, judged - 1)
    own = tl.load(kept + (tried * batch + row) * width + index, mask=inside, other=-float("inf")).to(tl.float64)
    q = tl.where(own > -float("inf"), tl.exp((own - top_q) / TEMPERATURE) * share_q, 0.0)
    return p, tl.where(share_q > 0, tl.maximum(p - q, 0.0), p)


@triton.jit
def _judge(  # type: ignore[no-untyped-def]
    target, most, mass, kept, kept_most, kept_mass, drafts, real, stream, length, verdict, masses,
    batch, width, parts, count, judged, across, along,
    TEMPERATURE: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """How many of a row's drafts stand, and of a part of the row the mass of what to draw from then, with and without
    the draft's share. Every program of a row finds the same verdict; the first leaves it: how many stand, whether all
    K + 1 do, largest logit and 1 / sum of weights of the target and of the draft, 0 where nothing is taken off."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    part = tl.arange(0, PARTS)
    inside = (place < count)[:, None] & (part < parts)[None, :]
    at = (row * count + place)[:, None] * parts + part[None, :]
    tops = tl.load(most + at, mask=inside, other=-float("inf"))
    weights = tl.load(mass + at, mask=inside, other=0.0)
    top_p = tl.max(tops, 1)
    sum_p = tl.sum(tl.where(weights > 0, weights * tl.exp((tops - top_p[:, None]) / TEMPERATURE), 0.0), 1)
    asked = place < judged
    inside = asked[:, None] & (part < parts)[None, :]
    at = (place.to(tl.int64) * batch + row)[:, None] * parts + part[None, :]
    tops = tl.load(kept_most + at, mask=inside, other=-float("inf"))
    weights = tl.load(kept_mass + at, mask=inside, other=0.0)
    top_q = tl.max(tops, 1)
    sum_q = tl.sum(tl.where(weights > 0, weights * tl.exp((tops - top_q[:, None]) / TEMPERATURE), 0.0), 1)

    draft = tl.load(drafts + row * across + place * along, mask=asked, other=0)
    counts = asked & (place < tl.load(real + row))
    said = tl.load(target + (row * count + place) * width + draft, mask=asked, other=0.0).to(tl.float64)
    own = tl.load(kept + (place.to(tl.int64) * batch + row) * width + draft, mask=asked, other=0.0).to(tl.float64)
    p = tl.where(asked, tl.exp((said - top_p) / TEMPERATURE) / sum_p, 0.0)
    q = tl.where(asked, tl.exp((own - top_q) / TEMPERATURE) / sum_q, 0.0)
    position = tl.load(length + row) + place
    chance = random_number(tl.load(stream + row) + tl.zeros([PLACES], tl.int64), position, ACCEPT)
    stands = (chance * q < p) & counts
    standing = tl.min(tl.where(stands, PLACES, tl.minimum(place, judged)), 0)
    standing = tl.minimum(standing, judged)
    end = tl.minimum(standing, count - 1)
    here = place == end
    off = tl.sum(tl.where(here & counts, 1, 0), 0) > 0
    top_p = tl.sum(tl.where(here, top_p, 0.0), 0)
    share_p = 1 / tl.sum(tl.where(here, sum_p, 0.0), 0)
    top_q = tl.where(off, tl.sum(tl.where(here & asked, top_q, 0.0), 0), 0.0)
    share_q = tl.where(off, 1 / tl.sum(tl.where(here & asked, sum_q, 0.0), 0), 0.0)
    if tl.program_id(1) == 0:
        facts = verdict + row * 6
        tl.store(facts, end.to(tl.float64))
        tl.store(facts + 1, (standing >= count).to(tl.float64))
        tl.store(facts + 2, top_p)
        tl.store(facts + 3, share_p)
        tl.store(facts + 4, top_q)
        tl.store(facts + 5, share_q)
    index = tl.program_id(1) * PART + tl.arange(0, PART)
    p, left = _left(
        target, kept, row, end, index, batch, width, count, judged, top_p, share_p, top_q, share_q, TEMPERATURE
    )
    at = (row * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(masses + at, tl.sum(p, 0))
    tl.store(masses + at + 1, tl.sum(left, 0))


@triton.jit
def _after(  # type: ignore[no-untyped-def]
    target, kept, verdict, masses, vocabulary, parts, count, judged, drafts, real,
    ids, length, full, running, stops, stream, slots, turn, fed, positions,
    stride, ring, batch, width, stop_count, apart, places, k, across, along,
    TEMPERATURE: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, CHANCE_OF: tl.constexpr, K1: tl.constexpr,
    PLACES: tl.constexpr, MODE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draws the token after the drafts that stand, and ends the round."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    facts = verdict + row * 6
    end = tl.load(facts).to(tl.int32)
    part = tl.arange(0, PARTS)
    at = (row * parts + part) * 2
    whole = tl.load(masses + at, mask=part < parts, other=0.0)
    left = tl.load(masses + at + 1, mask=part < parts, other=0.0)
    any_left = tl.sum(left, 0) > 0
    number = random_number(tl.load(stream + row), tl.load(length + row) + end, TOKEN)
    chosen, passed, reach = _part_of(tl.where(any_left, left, whole), number, PARTS)
    index = chosen * PART + tl.arange(0, PART)
    top_p, share_p, top_q, share_q = tl.load(facts + 2), tl.load(facts + 3), tl.load(facts + 4), tl.load(facts + 5)
    p, rest = _left(
        target, kept, row, end, index, batch, vocabulary, count, judged, top_p, share_p, top_q, share_q, TEMPERATURE
    )
    token = chosen * PART + _token_of(tl.where(any_left, rest, p), passed, reach, PART)
    token = tl.minimum(token, vocabulary - 1).to(tl.int64)
    place = tl.arange(0, K1)
    # Only chance has a use for what lies behind the draws.
    draft = tl.load(drafts + row * across + tl.where(place < judged, place, 0) * along)
    all_stand = tl.load(facts + 1) > 0
    token = tl.where((place == end) & (all_stand == 0), token, draft)
    end_round(
        row, token, drafts, real, end, CHANCE_OF,
        ids, length, full, running, stops, stream, slots, turn, fed, positions,
        stride, ring, batch, width, stop_count, apart, places, k, across, along, K1, PLACES, MODE,
    )  # fmt: skip


def finish_rejected(
    target: Tensor, kept: Drawn, drafts: Tensor, real: Tensor, rows: Rows, ring: Ring, chance: float | None = None
) -> None:
    """Rejection sampling of drafts int64 [B, J], any strides, that `kept` tells of, against logits target [B, T, V],
    and the end of the round."""
    batch, count, width = target.shape
    judged, temperature, (parts, part) = drafts.shape[1], kept.temperature, parts_of(width)
    most, mass = _measured(target, temperature, None, 0)
    verdict = torch.empty(batch, 6, dtype=torch.float64, device=target.device)
    masses = torch.empty(batch, parts, 2, dtype=torch.float64, device=target.device)
    shapes = {"TEMPERATURE": temperature, "PARTS": triton.next_power_of_2(parts), "PART": part}
    shapes |= {"num_warps": 8, **begun_early(target)}
    _judge[(batch, parts)](
        target, most, mass, kept.logits, kept.most, kept.mass, drafts, real, rows.stream, rows.length, verdict, masses,
        batch, width, parts, count, judged, *drafts.stride(), PLACES=triton.next_power_of_2(count), **shapes,
    )  # fmt: skip
    given, constants = of_round(rows, ring, drafts[:, : count - 1])
    _after[(batch,)](
        target, kept.logits, verdict, masses, width, parts, count, judged, drafts, real, *given, CHANCE_OF=chance,
        MODE=GIVEN if chance is None else CHANCE, **constants, **shapes,
    )  # fmt: skip
