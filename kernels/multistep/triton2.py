"""The decoding step of a Mamba-2 layer as one Triton kernel; `triton_convolve` has the convolution in front of it.

docs/decoding-kernels.md has the formulas and what the forms cost. A program of `_step` has a tile of one head's
checkpoint S [BLOCK_P, N]: it is read once, first of all, and written only where it is due. With e_t the decay from
`start` up to new token t, and w_r that from replayed token r to `start` times its dt,

    y_t = e_t (exp(total) S C_t + sum_r w_r (C_t B_r) x_r) + sum_{s <= t} e_t / e_s dt_s (C_t B_s) x_s + D x_t
    S'  = exp(total) S + sum_r w_r x_r B_r

bf16 numbers enter matrix products as they are; fp32 numbers that meet them are cut into as many bf16 numbers as the
result needs, or rounded to tf32. That S' is added up apart and meets S in one multiply-add keeps it as exact as fp32.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early
from ..tuning import measurable, settled
from .forms import MEASURED, fastest
from .triton_pieces import after, exp, fetched, mixed, part, taken, times

if TYPE_CHECKING:
    from .ring import Plan, Ring


@triton.jit
def _written(x, weights, b, state, carry, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The checkpoint behind the tokens of x [P, R] and b [R, N]."""
    inputs = x.to(tl.float32) * weights[None, :]
    return state * carry + times(inputs, b, 0 if EXACT else 3)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, skip_ptr, state_ptr, start_ptr, saved_ptr, y_ptr,
    x_row, x_slot, b_row, b_slot, c_row, c_token, dt_row, dt_slot,
    MARGIN, HEADS: tl.constexpr, X_HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REPLAY: tl.constexpr,
    SETTLE: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, STRAIGHT: tl.constexpr, FETCH: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What an earlier call left is read while the kernel before, which brings the new tokens, may still run.

    Replayed tokens are counted back from `start`, so that decays are sums of what is between, not differences of sums.
    """
    tiles: tl.constexpr = (WIDTH + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // tiles
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    wide = (p < WIDTH)[:, None]
    long = n < SIZE
    inside = wide & long[None, :]
    whole: tl.constexpr = WIDTH % BLOCK_P == 0 and SIZE == N

    start = tl.load(start_ptr + row, cache_modifier=".cg")
    replayed = start - tl.load(saved_ptr + row, cache_modifier=".cg")
    decay = tl.load(decay_ptr + head)
    skip = tl.load(skip_ptr + head)
    states = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, None] * SIZE + n[None, :]
    state = part(states, wide, long[None, :], whole, ".cg")
    dt_ptr += row * dt_row + head
    x_ptr += row * x_row + head // X_HEADS * WIDTH
    b_ptr += row * b_row + head // B_HEADS * SIZE
    c_ptr += row * c_row + head // C_HEADS * SIZE
    if FETCH:
        slots = tl.minimum(tl.arange(0, FETCH), SLOTS - 1)
        lines = tl.minimum(64 * tl.arange(0, (N + 63) // 64), SIZE - 1)
        fetched(b_ptr + slots[:, None] * b_slot + lines[None, :])
        fetched(x_ptr + slots * x_slot + tl.program_id(0) % tiles * BLOCK_P)
        fetched(dt_ptr + slots * dt_slot)
    r = tl.arange(0, R)
    t = tl.arange(0, T)
    old = r < replayed
    new = t < COUNT
    old_slots = ((start - 1 - r) % SLOTS).to(tl.int64)
    new_slots = ((start + t) % SLOTS).to(tl.int64)
    old_dt = tl.load(dt_ptr + old_slots * dt_slot, mask=old, other=0.0, cache_modifier=".cg")
    old_b = part(b_ptr + old_slots[:, None] * b_slot + n[None, :], old[:, None], long[None, :], whole, ".cg")
    old_x = part(x_ptr + old_slots[None, :] * x_slot + p[:, None], old[None, :], wide, whole, ".cg")
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    new_dt = tl.load(dt_ptr + new_slots * dt_slot, mask=new, other=0.0)
    c = part(c_ptr + t[None, :] * c_token + n[:, None], new[None, :], long[:, None], whole, "")
    new_b = part(b_ptr + new_slots[:, None] * b_slot + n[None, :], new[:, None], long[None, :], whole, "")
    new_x = part(x_ptr + new_slots[None, :] * x_slot + p[:, None], new[None, :], wide, whole, "")
    state = after(state, replayed)
    old_b = after(old_b, replayed)
    old_x = after(old_x, replayed)
    c = after(c, replayed)
    new_b = after(new_b, replayed)
    new_x = after(new_x, replayed)

    old_decays = old_dt * decay
    total = tl.sum(old_decays, axis=0)
    carry = exp(total)
    weights = exp(tl.cumsum(old_decays, axis=0) - old_decays) * old_dt
    since = tl.cumsum(new_dt * decay, axis=0)
    if EXACT:
        old_mixing = tl.dot(old_b, c, input_precision="ieee")
        new_mixing = tl.dot(new_b, c, input_precision="ieee")
    else:
        old_mixing = tl.dot(old_b, c)
        new_mixing = tl.dot(new_b, c)
    between = tl.where(t[:, None] <= t[None, :], since[None, :] - since[:, None], float("-inf"))
    new_mixing = new_mixing * tl.exp(between) * new_dt[:, None]
    new_mixing += tl.where(t[:, None] == t[None, :], skip, 0.0)

    y = times(state, c, PIECES) * carry
    y += mixed(old_x, old_mixing * weights[:, None], EXACT)
    y = y * exp(since)[None, :]
    y += mixed(new_x, new_mixing, EXACT)
    y_ptr += (row * COUNT * HEADS + head) * WIDTH
    outputs = y_ptr + t[None, :] * (HEADS * WIDTH) + p[:, None]
    tl.store(outputs, y.to(y_ptr.dtype.element_ty), mask=new[None, :] & wide)

    if SETTLE:
        due = (replayed > 0) & (replayed + MARGIN > REPLAY)
        if STRAIGHT:
            tl.store(states, _written(old_x, weights, old_b, state, carry, EXACT), mask=inside & due)
        elif due:
            if COLUMNS == N:
                tl.store(states, _written(old_x, weights, old_b, state, carry, EXACT), mask=inside)
            else:
                inputs = old_x.to(tl.float32) * weights[None, :]
                for first in range(0, N, COLUMNS):
                    m = first + tl.arange(0, COLUMNS)
                    short = m < SIZE
                    b = part(b_ptr + old_slots[:, None] * b_slot + m[None, :], old[:, None], short[None, :], whole, "")
                    place = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, None] * SIZE + m[None, :]
                    added = times(inputs, b, 0 if EXACT else 3)
                    before = part(place, wide, short[None, :], whole, "")
                    tl.store(place, before * carry + added, mask=wide & short[None, :])


@triton.jit
def _joint_step(  # type: ignore[no-untyped-def]
    x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, skip_ptr, state_ptr, start_ptr, saved_ptr, y_ptr,
    x_row, x_slot, b_row, b_slot, c_row, c_token, dt_row, dt_slot,
    MARGIN, HEADS: tl.constexpr, X_HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REPLAY: tl.constexpr,
    SETTLE: tl.constexpr, BLOCK_P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    STRAIGHT: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same over all slots of the ring in their own order, so that nothing that is read waits for the cursors.

    Slot s has token `start` + index_s, of which those from 0 on are new; replayed ones are counted back from -1. What
    lies in other slots may be NaN. To a new token's own decay since `start`, decay_s adds what is between it and s.
    """
    tiles: tl.constexpr = (WIDTH + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // tiles
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    s = tl.arange(0, S)
    t = tl.arange(0, T)
    wide = p < WIDTH
    long = n < SIZE
    there = s < SLOTS
    inside = wide[:, None] & long[None, :]
    whole: tl.constexpr = WIDTH % BLOCK_P == 0 and SIZE == N
    states = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, None] * SIZE + n[None, :]

    start = tl.load(start_ptr + row, cache_modifier=".cg")
    replayed = start - tl.load(saved_ptr + row, cache_modifier=".cg")
    decay = tl.load(decay_ptr + head)
    skip = tl.load(skip_ptr + head)
    dt_ptr += row * dt_row + head
    b_ptr += row * b_row + head // B_HEADS * SIZE
    c_ptr += row * c_row + head // C_HEADS * SIZE
    x_ptr += row * x_row + head // X_HEADS * WIDTH
    if PDL:
        state = part(states, wide[:, None], long[None, :], whole, ".cg")
        slots = tl.minimum(s, SLOTS - 1)
        lines = tl.minimum(64 * tl.arange(0, (N + 63) // 64), SIZE - 1)
        fetched(b_ptr + slots[:, None] * b_slot + lines[None, :])
        fetched(x_ptr + slots * x_slot + tl.program_id(0) % tiles * BLOCK_P)
        fetched(dt_ptr + slots * dt_slot)
        gdc_wait()
        gdc_launch_dependents()
    dt = tl.load(dt_ptr + s * dt_slot, mask=there, other=0.0)
    b = part(b_ptr + s[:, None] * b_slot + n[None, :], there[:, None], long[None, :], whole, "")
    c = part(c_ptr + t[:, None] * c_token + n[None, :], (t < COUNT)[:, None], long[None, :], whole, "")
    x = part(x_ptr + s[:, None] * x_slot + p[None, :], there[:, None], wide[None, :], whole, "")
    if not PDL:
        state = part(states, wide[:, None], long[None, :], whole, "")

    ahead = s - start % SLOTS
    ahead = tl.where(ahead < 0, ahead + SLOTS, ahead)
    index = tl.where(ahead < COUNT, ahead, ahead - SLOTS)
    valid = there & (index >= -replayed)
    dt = tl.where(valid, dt, 0.0)
    b = tl.where(valid[:, None], b, 0.0)
    c = after(c, replayed)
    x = tl.where(valid[:, None], x, 0.0)
    if PDL:
        state = after(state, replayed)
    step = dt * decay
    signed = tl.where(index < 0, step, -step)
    low = tl.minimum(index + 1, 0)
    high = tl.maximum(index, -1)
    between = (index[:, None] >= low[None, :]) & (index[:, None] <= high[None, :])
    decays = tl.sum(tl.where(between, signed[:, None], 0.0), axis=0)
    since = -tl.sum(tl.where((index[:, None] == t[None, :]) & valid[:, None], decays[:, None], 0.0), axis=0)
    total = tl.sum(tl.where(index < 0, step, 0.0), axis=0)

    mixing = tl.dot(c, tl.trans(b), input_precision="ieee") if EXACT else tl.dot(c, tl.trans(b))
    mixing = mixing * tl.exp(since[:, None] + decays[None, :]) * dt[None, :]
    mixing = tl.where(valid[None, :] & (index[None, :] <= t[:, None]), mixing, 0.0)
    mixing += tl.where(valid[None, :] & (index[None, :] == t[:, None]), skip, 0.0)
    y = taken(c, tl.trans(state), PIECES) * exp(total + since)[:, None]
    y += times(mixing, x, 0 if EXACT else 2)
    y_ptr += (row * COUNT * HEADS + head) * WIDTH
    outputs = y_ptr + t[:, None] * (HEADS * WIDTH) + p[None, :]
    tl.store(outputs, y.to(y_ptr.dtype.element_ty), mask=(t < COUNT)[:, None] & wide[None, :])

    if SETTLE:
        due = (replayed > 0) & (replayed + MARGIN > REPLAY)
        weights = exp(tl.where(index < 0, decays, 0.0)) * tl.where(index < 0, dt, 0.0)
        if STRAIGHT:
            tl.store(states, _written(tl.trans(x), weights, b, state, exp(total), EXACT), mask=inside & due)
        elif due:
            tl.store(states, _written(tl.trans(x), weights, b, state, exp(total), EXACT), mask=inside)


class Form(NamedTuple):
    """How a call is cut up. None changes a result by more than the order of its sums."""

    block: int
    """Rows of a head's state that a program has."""
    warps: int
    columns: int = 0
    """0: what is written is made of what was read, which a program holds all along. Else so many columns at a time are
    read again, from the cache, and fewer registers let more programs run side by side."""
    joint: bool = False
    """All slots of the ring are read, so that nothing waits for the cursors, and are one tile."""
    straight: bool = False
    """The new checkpoint is worked out beside the outputs whether or not it is due."""
    fetch: bool = False
    """Of other forms: all slots are brought into the L2 cache while the cursors are on their way."""


TILES = ((16, 1), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4))
FORMS = (
    *(Form(block, warps, columns) for columns in (0, 32) for block, warps in TILES),
    *(Form(32, 1), Form(64, 2)),
    *(Form(16, warps, straight=True, fetch=True) for warps in (1, 2, 4)),
    *(Form(16, warps, fetch=True) for warps in (1, 4)),
    *(Form(*tile, joint=True, straight=True) for tile in ((16, 1), (16, 2), (16, 4), (32, 4))),
    *(Form(*tile, joint=True) for tile in ((16, 4), (32, 4))),
)
JOINT = 32
"""The most slots of a ring that is read whole."""
PIECES = 1
"""Of the checkpoint where it meets bf16 C: 1 is tf32, 2 and 3 are sums of as many bf16."""


_best: dict[tuple[Any, ...], Form] = {}


def _kind(ring: Ring, C: Tensor, state: Tensor, plan: Plan) -> tuple[Any, ...]:
    """What a form is chosen for: calls of other lengths, but of the same tiles, take about as long."""
    groups = (t.shape[2] for t in (ring.x, ring.B, C))
    slots = min(ring.dt.shape[1], JOINT + 1), fits(ring, plan)
    tiles = _tile(plan.count), _tile(plan.replay), *slots
    return *state.shape, *groups, *tiles, plan.settle, ring.x.dtype, state.device


def form_for(ring: Ring, C: Tensor, A: Tensor, D: Tensor, state: Tensor, plan: Plan) -> Form:
    """The fastest where memory is large enough for that to matter and can be measured now, else one that keeps a GPU
    busy: wider tiles only where there are many."""
    kind = _kind(ring, C, state, plan)
    few = state.shape[0] * state.shape[1] < 2048 or ring.x.dtype == torch.float32
    usual = Form(16, 4) if few or state.shape[2] <= 16 else Form(32, 4)
    if kind not in _best and measurable(state, MEASURED):
        _best[kind] = settled(kind, forms_for(ring, state, plan), partial(tune, ring, C, A, D, state, plan), usual)
    return _best.get(kind, usual)


def tune(ring: Ring, C: Tensor, A: Tensor, D: Tensor, state: Tensor, plan: Plan) -> Form:
    """Times every form on memory of its own."""
    scratch = dataclasses.replace(ring, **{name: torch.zeros_like(getattr(ring, name)) for name in ("x", "B", "dt")})

    def run(form: Form, checkpoint: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> Tensor:
        return ring_multistep(scratch, C, A, D, checkpoint, start, saved, plan, form, warmup=warmup)

    return fastest(forms_for(ring, state, plan), state, plan, run)


def ring_multistep(
    ring: Ring,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    state: Tensor,
    start: Tensor,
    saved: Tensor,
    plan: Plan,
    form: Form | None = None,
    pieces: int = PIECES,
    warmup: bool = False,
    early: bool | None = None,
) -> Tensor:
    """Shapes as in `ring`; y [B, T, H, P] in x's dtype. With `warmup` the kernel is only compiled. `early` (default:
    where the GPU can): it may begin before the one before has ended, which then must not be a step of the same layer.
    """
    batch, heads, width, size = state.shape
    form = form or form_for(ring, C, A, D, state, plan)
    y = torch.empty(batch, plan.count, heads, width, dtype=ring.x.dtype, device=state.device)
    exact = ring.x.dtype == torch.float32
    slots = ring.dt.shape[1]
    tensors = ring.x, ring.B, C, ring.dt, A, D, state, start, saved, y
    strides = (t.stride(i) for t in (ring.x, ring.B, C, ring.dt) for i in (0, 1))
    x_heads, b_heads, c_heads = (heads // t.shape[2] for t in (ring.x, ring.B, C))
    named = {
        "HEADS": heads, "X_HEADS": x_heads, "B_HEADS": b_heads, "C_HEADS": c_heads,
        "SLOTS": slots, "WIDTH": width, "SIZE": size, "COUNT": plan.count, "REPLAY": plan.replay,
        "SETTLE": plan.settle, "BLOCK_P": form.block, "N": _tile(size), "T": _tile(plan.count),
        "PIECES": 0 if exact else pieces, "EXACT": exact, "num_warps": form.warps,
        "grid": (triton.cdiv(width, form.block) * heads, batch), "warmup": warmup, **begun_early(state, early),
    }  # fmt: skip
    with torch.cuda.device_of(state):
        if form.joint:
            _joint_step.run(*tensors, *strides, plan.steps, S=_tile(slots), STRAIGHT=form.straight, **named)
        else:
            more = {"COLUMNS": form.columns or _tile(size), "R": _tile(plan.replay), "STRAIGHT": form.straight}
            more["FETCH"] = triton.next_power_of_2(slots) if form.fetch else 0
            _step.run(*tensors, *strides, plan.steps, **more, **named)
    return y


def _tile(size: int) -> int:
    """Matrix products have at least 16 of everything."""
    return max(16, int(triton.next_power_of_2(size)))


def fits(ring: Ring, plan: Plan) -> bool:
    """Whether joint forms serve: in a slot there is a replayed or a new token, never both."""
    slots = ring.dt.shape[1]
    return plan.replay + plan.count <= slots <= JOINT


def forms_for(ring: Ring, state: Tensor, plan: Plan) -> list[Form]:
    """Those with no larger tiles than a head has; small ones for fp32, of which products are not made by tensor cores
    but in registers.

    64 rows are products of warp groups, for which Triton 3.6 and 3.7 make code that reads beyond its shared memory in
    some kernels of several products (its issues 11366 and 10629). A replay of more than 16 tokens ended in an illegal
    access on an H200, so such replays have smaller tiles. One warp has not the registers for more than 32.
    """
    width, size = (_tile(n) for n in state.shape[2:])
    most = 16 if ring.x.dtype == torch.float32 else 32 if _tile(plan.replay) > 16 else width
    joint = fits(ring, plan) and ring.x.dtype != torch.float32
    fewest = 2 if _tile(plan.replay) > 32 else 1
    return [
        form
        for form in FORMS
        if form.block <= min(width, most) and form.columns < size and form.joint <= joint and form.warps >= fewest
    ]
