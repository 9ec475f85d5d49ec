"""Drawing from softmax(logits / temperature), and judging drafts that were drawn so, without the distributions in
memory.

Rows are cut into parts. Each leaves its largest logit and the mass of its weights beside that; who draws finds the part
in which the distribution function passes the random number, and then the token in it. Everything is fp64, as in the
plain form, which sums in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .reference import Drawn, parts_of
from .triton import random_number

TOKEN, ACCEPT = tl.constexpr(reference.TOKEN), tl.constexpr(reference.ACCEPT)


@triton.jit
def _mass(logits, kept, most, mass, stride, width, KEEP: tl.constexpr, TEMPERATURE: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Of a part of each row the largest logit and the sum of exp((logit - largest) / temperature). With KEEP the row is
    copied."""
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
    PURPOSE: tl.constexpr, TEMPERATURE: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
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
        logits, copy, most, mass, stride, width, KEEP=kept is not None, TEMPERATURE=temperature, PART=part, num_warps=8
    )
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
    )  # fmt: skip
    return tokens


@triton.jit
def _judge(  # type: ignore[no-untyped-def]
    target, most, mass, kept, kept_most, kept_mass, drafts, real, stream, before, accepted, verdict,
    batch, width, parts, count, judged, across, along,
    TEMPERATURE: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of each row how many drafts stand, and what to draw from then: largest logit and 1 / sum of weights of the target
    and of the draft, 0 where nothing is taken off, and whether all K + 1 drafts stand."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    part = tl.arange(0, PARTS)
    inside = (place < count)[:, None] & (part < parts)[None, :]
    at = (row * count + place)[:, None] * parts + part[None, :]
    tops = tl.load(most + at, mask=inside, other=-float("inf"))
    masses = tl.load(mass + at, mask=inside, other=0.0)
    top_p = tl.max(tops, 1)
    sum_p = tl.sum(tl.where(masses > 0, masses * tl.exp((tops - top_p[:, None]) / TEMPERATURE), 0.0), 1)
    asked = place < judged
    inside = asked[:, None] & (part < parts)[None, :]
    at = (place.to(tl.int64) * batch + row)[:, None] * parts + part[None, :]
    tops = tl.load(kept_most + at, mask=inside, other=-float("inf"))
    masses = tl.load(kept_mass + at, mask=inside, other=0.0)
    top_q = tl.max(tops, 1)
    sum_q = tl.sum(tl.where(masses > 0, masses * tl.exp((tops - top_q[:, None]) / TEMPERATURE), 0.0), 1)

    draft = tl.load(drafts + row * across + place * along, mask=asked, other=0)
    counts = asked & (place < tl.load(real + row))
    said = tl.load(target + (row * count + place) * width + draft, mask=asked, other=0.0).to(tl.float64)
    own = tl.load(kept + (place.to(tl.int64) * batch + row) * width + draft, mask=asked, other=0.0).to(tl.float64)
    p = tl.where(asked, tl.exp((said - top_p) / TEMPERATURE) / sum_p, 0.0)
    q = tl.where(asked, tl.exp((own - top_q) / TEMPERATURE) / sum_q, 0.0)
    position = tl.load(before + row).to(tl.int64) + 1 + place
    chance = random_number(tl.load(stream + row) + tl.zeros([PLACES], tl.int64), position, ACCEPT)
    stands = (chance * q < p) & counts
    standing = tl.min(tl.where(stands, PLACES, tl.minimum(place, judged)), 0)
    standing = tl.minimum(standing, judged)
    end = tl.minimum(standing, count - 1)
    off = tl.sum(tl.where((place == end) & counts, 1, 0), 0)
    tl.store(accepted + row, end.to(tl.int64))
    here = place == end
    tl.store(verdict + row * 5, tl.sum(tl.where(here, top_p, 0.0), 0))
    tl.store(verdict + row * 5 + 1, 1 / tl.sum(tl.where(here, sum_p, 0.0), 0))
    tl.store(verdict + row * 5 + 2, tl.where(off > 0, tl.sum(tl.where(here & asked, top_q, 0.0), 0), 0.0))
    tl.store(verdict + row * 5 + 3, tl.where(off > 0, 1 / tl.sum(tl.where(here & asked, sum_q, 0.0), 0), 0.0))
    tl.store(verdict + row * 5 + 4, (standing >= count).to(tl.float64))


@triton.jit
def _left(target, kept, verdict, row, end, index, batch, width, count, judged, TEMPERATURE: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """p and max(p - q, 0) of tokens `index`."""
    inside = index < width
    facts = verdict + row * 5
    said = tl.load(target + (row * count + end) * width + index, mask=inside, other=-float("inf")).to(tl.float64)
    p = tl.where(said > -float("inf"), tl.exp((said - tl.load(facts)) / TEMPERATURE) * tl.load(facts + 1), 0.0)
    share = tl.load(facts + 3)
    tried = tl.minimum(end, judged - 1)
    own = tl.load(kept + (tried * batch + row) * width + index, mask=inside, other=-float("inf")).to(tl.float64)
    q = tl.where(own > -float("inf"), tl.exp((own - tl.load(facts + 2)) / TEMPERATURE) * share, 0.0)
    return p, tl.where(share > 0, tl.maximum(p - q, 0.0), p)


@triton.jit
def _residual(  # type: ignore[no-untyped-def]
    target, kept, verdict, accepted, masses, batch, width, count, judged,
    TEMPERATURE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(accepted + row)
    index = tl.program_id(1) * PART + tl.arange(0, PART)
    p, left = _left(target, kept, verdict, row, end, index, batch, width, count, judged, TEMPERATURE)
    place = (row * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(masses + place, tl.sum(p, 0))
    tl.store(masses + place + 1, tl.sum(left, 0))


@triton.jit
def _after(  # type: ignore[no-untyped-def]
    target, kept, verdict, accepted, masses, drafts, stream, before, tokens,
    batch, width, parts, count, judged, across, along,
    TEMPERATURE: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(accepted + row)
    part = tl.arange(0, PARTS)
    place = (row * parts + part) * 2
    whole = tl.load(masses + place, mask=part < parts, other=0.0)
    left = tl.load(masses + place + 1, mask=part < parts, other=0.0)
    any_left = tl.sum(left, 0) > 0
    at = random_number(tl.load(stream + row), tl.load(before + row).to(tl.int64) + 1 + end, TOKEN)
    chosen, passed, reach = _part_of(tl.where(any_left, left, whole), at, PARTS)
    index = chosen * PART + tl.arange(0, PART)
    p, rest = _left(target, kept, verdict, row, end, index, batch, width, count, judged, TEMPERATURE)
    token = chosen * PART + _token_of(tl.where(any_left, rest, p), passed, reach, PART)
    token = tl.minimum(token, width - 1).to(tl.int64)
    place = tl.arange(0, PLACES)
    draft = tl.load(drafts + row * across + place * along, mask=place < judged, other=0)
    all_stand = tl.load(verdict + row * 5 + 4) > 0
    token = tl.where((place == end) & (all_stand == 0), token, draft)
    tl.store(tokens + row * count + place, token, mask=place < count)


def rejected(
    target: Tensor, kept: Drawn, drafts: Tensor, real: Tensor, stream: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling of drafts int64 [B, J], any strides, that `kept` tells of, against logits target [B, T, V]."""
    batch, count, width = target.shape
    judged, temperature, (parts, part) = drafts.shape[1], kept.temperature, parts_of(width)
    most, mass = _measured(target, temperature, None, 0)
    accepted = torch.empty(batch, dtype=torch.int64, device=target.device)
    verdict = torch.empty(batch, 5, dtype=torch.float64, device=target.device)
    masses = torch.empty(batch, parts, 2, dtype=torch.float64, device=target.device)
    tokens = torch.empty(batch, count, dtype=torch.int64, device=target.device)
    shapes = {"TEMPERATURE": temperature}
    places, rows = triton.next_power_of_2(count), triton.next_power_of_2(parts)
    _judge[(batch,)](
        target, most, mass, kept.logits, kept.most, kept.mass, drafts, real, stream, before, accepted, verdict,
        batch, width, parts, count, judged, *drafts.stride(), PLACES=places, PARTS=rows, **shapes,
    )  # fmt: skip
    _residual[(batch, parts)](
        target, kept.logits, verdict, accepted, masses, batch, width, count, judged, PART=part, num_warps=8, **shapes
    )  # fmt: skip
    _after[(batch,)](
        target, kept.logits, verdict, accepted, masses, drafts, stream, before, tokens, batch, width, parts, count,
        judged, *drafts.stride(), PLACES=places, PARTS=rows, PART=part, num_warps=8, **shapes,
    )  # fmt: skip
    return accepted, tokens
