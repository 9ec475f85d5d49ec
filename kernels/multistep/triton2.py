"""The decoding step of a Mamba-2 layer as one Triton kernel, and the convolution in front of it as another.

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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begins_early
from .forms import fastest, measurable
from .ring import between_tokens
from .triton_pieces import exp, softplus

if TYPE_CHECKING:
    from .ring import Plan, Ring


@triton.jit
def _times(a, b, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """a fp32 [M, K] times b [K, N]: in fp32 if PIECES is 0, in tf32 if 1, else with a as the sum of PIECES bf16."""
    if PIECES == 0:
        out = tl.dot(a, b.to(tl.float32), input_precision="ieee")
    elif PIECES == 1:
        out = tl.dot(a, b.to(tl.float32), input_precision="tf32")
    else:
        first = a.to(tl.bfloat16)
        rest = a - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        if PIECES == 3:
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            out = tl.dot(third, b)
            out = tl.dot(second, b, out)
        else:
            out = tl.dot(second, b)
        out = tl.dot(first, b, out)
    return out


@triton.jit
def _mixed(a, b, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [M, K], of the ring, times b fp32 [K, N]: in fp32, or with b as the sum of two bf16."""
    if EXACT:
        out = tl.dot(a.to(tl.float32), b, input_precision="ieee")
    else:
        first = b.to(tl.bfloat16)
        second = (b - first.to(tl.float32)).to(tl.bfloat16)
        out = tl.dot(a, second)
        out = tl.dot(a, first, out)
    return out


@triton.jit
def _part(pointers, rows, columns, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is there of a tile; `columns` need not be looked at where all of them are."""
    if WHOLE:
        return tl.load(pointers, mask=rows, other=0.0)
    return tl.load(pointers, mask=rows & columns, other=0.0)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, skip_ptr, state_ptr, start_ptr, saved_ptr, y_ptr,
    x_row, x_slot, b_row, b_slot, c_row, c_token, dt_row, dt_slot,
    SLOTS, MARGIN, HEADS, X_HEADS, B_HEADS, C_HEADS,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REPLAY: tl.constexpr, SETTLE: tl.constexpr,
    BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    PIECES: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What an earlier call left is read while the kernel before, which brings the new tokens, may still run."""
    tiles: tl.constexpr = (WIDTH + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // tiles
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    inside = (p < WIDTH)[:, None] & (n < SIZE)[None, :]
    whole: tl.constexpr = WIDTH % BLOCK_P == 0 and SIZE == N

    states = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, None] * SIZE + n[None, :]
    state = tl.load(states) if whole else tl.load(states, mask=inside, other=0.0)

    start = tl.load(start_ptr + row)
    replayed = start - tl.load(saved_ptr + row)
    r = tl.arange(0, R)
    t = tl.arange(0, T)
    old = r < replayed
    new = t < COUNT
    old_slots = ((start - replayed + r) % SLOTS).to(tl.int64)
    new_slots = ((start + t) % SLOTS).to(tl.int64)
    dt_ptr += row * dt_row + head
    old_dt = tl.load(dt_ptr + old_slots * dt_slot, mask=old, other=0.0)
    x_ptr += row * x_row + head // X_HEADS * WIDTH
    b_ptr += row * b_row + head // B_HEADS * SIZE
    c_ptr += row * c_row + head // C_HEADS * SIZE
    wide = (p < WIDTH)[:, None]
    long = n < SIZE
    old_b = _part(b_ptr + old_slots[:, None] * b_slot + n[None, :], old[:, None], long[None, :], whole)
    old_x = _part(x_ptr + old_slots[None, :] * x_slot + p[:, None], old[None, :], wide, whole)
    decay = tl.load(decay_ptr + head)
    skip = tl.load(skip_ptr + head)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    new_dt = tl.load(dt_ptr + new_slots * dt_slot, mask=new, other=0.0)
    c = _part(c_ptr + t[None, :] * c_token + n[:, None], new[None, :], long[:, None], whole)
    new_b = _part(b_ptr + new_slots[:, None] * b_slot + n[None, :], new[:, None], long[None, :], whole)
    new_x = _part(x_ptr + new_slots[None, :] * x_slot + p[:, None], new[None, :], wide, whole)

    old_decays = old_dt * decay
    total = tl.sum(old_decays, axis=0)
    carry = exp(total)
    weights = exp(total - tl.cumsum(old_decays, axis=0)) * old_dt
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

    y = _times(state, c, PIECES) * carry
    y += _mixed(old_x, old_mixing * weights[:, None], EXACT)
    y = y * exp(since)[None, :]
    y += _mixed(new_x, new_mixing, EXACT)
    y_ptr += (row * COUNT * HEADS + head) * WIDTH
    outputs = y_ptr + t[None, :] * (HEADS * WIDTH) + p[:, None]
    tl.store(outputs, y.to(y_ptr.dtype.element_ty), mask=new[None, :] & wide)

    if SETTLE:  # noqa: SIM102 - one of the two is known when the kernel is compiled
        if (replayed > 0) & (replayed + MARGIN > REPLAY):
            inputs = old_x.to(tl.float32) * weights[None, :]
            if COLUMNS == N:
                added = _times(inputs, old_b, 0 if EXACT else 3)
                if whole:
                    tl.store(states, state * carry + added)
                else:
                    tl.store(states, state * carry + added, mask=inside)
            else:
                for first in range(0, N, COLUMNS):
                    m = first + tl.arange(0, COLUMNS)
                    short = m < SIZE
                    b = _part(b_ptr + old_slots[:, None] * b_slot + m[None, :], old[:, None], short[None, :], whole)
                    part = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, None] * SIZE + m[None, :]
                    added = _times(inputs, b, 0 if EXACT else 3)
                    before = _part(part, wide, short[None, :], whole)
                    tl.store(part, before * carry + added, mask=wide & short[None, :])


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    u_ptr, weight_ptr, bias_ptr, dt_bias_ptr, window_ptr, ring_ptr, left_ptr, dt_ptr, start_ptr,
    u_row, CHANNELS, KEPT, HEADS, WINDOW_SLOTS, SLOTS,
    COUNT: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK channels of all new tokens of a row; the last ones have the step sizes of BLOCK heads.

    What it reads of the window lies in slots that no new input goes to.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + row)
    t = tl.arange(0, T)[:, None]
    new = t < COUNT
    parts = tl.cdiv(CHANNELS, BLOCK)
    slots = row * SLOTS + (start + t) % SLOTS
    whole = CHANNELS + HEADS
    u_ptr += row * COUNT * u_row
    window_ptr += row * WINDOW_SLOTS * whole
    window_slots = (start + t) % WINDOW_SLOTS
    if part < parts:
        channel = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
        there = channel < CHANNELS
        total = tl.load(bias_ptr + channel, mask=there, other=0.0)
        for tap in tl.static_range(TAPS - 1):
            at = t + (tap - TAPS + 1)
            u = tl.load(u_ptr + at * u_row + channel, mask=(at >= 0) & new & there, other=0.0)
            before = (start + at + WINDOW_SLOTS) % WINDOW_SLOTS
            u += tl.load(window_ptr + before * whole + channel, mask=(at < 0) & new & there, other=0.0)
            total += u.to(tl.float32) * tl.load(weight_ptr + channel * TAPS + tap, mask=there, other=0.0)
        u = tl.load(u_ptr + t * u_row + channel, mask=new & there, other=0.0)
        total += u.to(tl.float32) * tl.load(weight_ptr + channel * TAPS + TAPS - 1, mask=there, other=0.0)
        if SILU:
            total = total * tl.sigmoid(total)
        total = total.to(ring_ptr.dtype.element_ty)
        tl.store(ring_ptr + slots * KEPT + channel, total, mask=new & (channel < KEPT))
        left = (row * COUNT + t) * (CHANNELS - KEPT) + channel - KEPT
        tl.store(left_ptr + left, total, mask=new & there & (channel >= KEPT))
        tl.store(window_ptr + window_slots * whole + channel, u, mask=new & there)
    else:
        head = ((part - parts) * BLOCK + tl.arange(0, BLOCK))[None, :]
        there = head < HEADS
        given = tl.load(u_ptr + t * u_row + CHANNELS + head, mask=new & there, other=0.0)
        tl.store(window_ptr + window_slots * whole + CHANNELS + head, given, mask=new & there)
        raw = given.to(tl.float32) + tl.load(dt_bias_ptr + head, mask=there, other=0.0)
        tl.store(dt_ptr + slots * HEADS + head, softplus(raw), mask=new & there)


class Form(NamedTuple):
    """How a call is cut up. None changes a result by more than the order of its sums."""

    block: int
    """Rows of a head's state that a program has."""
    warps: int
    columns: int = 0
    """0: what is written is made of what was read, which a program holds all along. Else so many columns at a time are
    read again, from the cache, and fewer registers let more programs run side by side."""


TILES = ((16, 1), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4))
FORMS = tuple(Form(block, warps, columns) for columns in (0, 32) for block, warps in TILES)
PIECES = 1
"""Of the checkpoint where it meets bf16 C: 1 is tf32, 2 and 3 are sums of as many bf16."""
CONVOLVED = 256
"""Channels of a program of `convolve`."""

_best: dict[tuple[Any, ...], Form] = {}


def _kind(ring: Ring, C: Tensor, state: Tensor, plan: Plan) -> tuple[Any, ...]:
    """What a form is chosen for: calls of other lengths, but of the same tiles, take about as long."""
    groups = (t.shape[2] for t in (ring.x, ring.B, C))
    return *state.shape, *groups, _tile(plan.count), _tile(plan.replay), plan.settle, ring.x.dtype, state.device


def form_for(ring: Ring, C: Tensor, A: Tensor, D: Tensor, state: Tensor, plan: Plan) -> Form:
    """The fastest where memory is large enough for that to matter and can be measured now, else one that keeps a GPU
    busy: wider tiles only where there are many."""
    kind = _kind(ring, C, state, plan)
    if kind not in _best and measurable(state):
        scratch = dataclasses.replace(
            ring, **{name: torch.zeros_like(getattr(ring, name)) for name in ("x", "B", "dt")}
        )

        def run(form: Form, checkpoint: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> Tensor:
            return ring_multistep(scratch, C, A, D, checkpoint, start, saved, plan, form, warmup=warmup)

        _best[kind] = fastest(forms_for(ring, state, plan), state, plan, run)
    few = state.shape[0] * state.shape[1] < 2048 or ring.x.dtype == torch.float32
    return _best.get(kind, Form(16, 4) if few or state.shape[2] <= 16 else Form(32, 4))


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
    early = begins_early(state.device) if early is None else early
    batch, heads, width, size = state.shape
    form = form or form_for(ring, C, A, D, state, plan)
    y = torch.empty(batch, plan.count, heads, width, dtype=ring.x.dtype, device=state.device)
    exact = ring.x.dtype == torch.float32
    with torch.cuda.device_of(state):
        _step.run(
            ring.x, ring.B, C, ring.dt, A, D, state, start, saved, y,
            *(t.stride(i) for t in (ring.x, ring.B, C, ring.dt) for i in (0, 1)),
            ring.dt.shape[1], plan.steps, heads, *(heads // t.shape[2] for t in (ring.x, ring.B, C)),
            WIDTH=width, SIZE=size, COUNT=plan.count, REPLAY=plan.replay, SETTLE=plan.settle,
            BLOCK_P=form.block, COLUMNS=form.columns or _tile(size), N=_tile(size), T=_tile(plan.count),
            R=_tile(plan.replay), PIECES=0 if exact else pieces, EXACT=exact, PDL=early,
            launch_pdl=early, num_warps=form.warps, grid=(triton.cdiv(width, form.block) * heads, batch), warmup=warmup,
        )  # fmt: skip
    return y


def _tile(size: int) -> int:
    """Matrix products have at least 16 of everything."""
    return max(16, int(triton.next_power_of_2(size)))


def forms_for(ring: Ring, state: Tensor, plan: Plan) -> list[Form]:
    """Those with no larger tiles than a head has; small ones for fp32, of which products are not made by tensor cores
    but in registers.

    64 rows are products of warp groups, for which Triton 3.6 and 3.7 make code that reads beyond its shared memory in
    some kernels of several products (its issues 11366 and 10629). A replay of more than 16 tokens ended in an illegal
    access on an H200, so such replays have smaller tiles.
    """
    width, size = (_tile(n) for n in state.shape[2:])
    most = 16 if ring.x.dtype == torch.float32 else 32 if _tile(plan.replay) > 16 else width
    return [form for form in FORMS if form.block <= min(width, most) and form.columns < size]


def convolve(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    window: Tensor,
    ring: Tensor,
    dt: Tensor,
    start: Tensor,
    silu: bool,
) -> Tensor:
    """Shapes as in `ring`."""
    batch, count = u.shape[:2]
    channels, kept, heads = weight.shape[0], ring.shape[2], dt.shape[2]
    left = torch.empty(batch, count, channels - kept, dtype=ring.dtype, device=ring.device)
    grid, early = (triton.cdiv(channels, CONVOLVED) + triton.cdiv(heads, CONVOLVED), batch), begins_early(u.device)
    with torch.cuda.device_of(u):
        _convolve[grid](
            u, weight, bias, dt_bias, window, ring, left, dt, start, between_tokens(u), channels, kept, heads,
            window.shape[1], ring.shape[1], COUNT=count, TAPS=weight.shape[1], SILU=silu, BLOCK=CONVOLVED,
            T=triton.next_power_of_2(count), PDL=early, launch_pdl=early, num_warps=4,
        )  # fmt: skip
    return left
