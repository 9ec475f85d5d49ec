"""What a Mamba-2 layer does with a few tokens between its projections, as one Triton kernel.

A program has BLOCK_P rows of one head's state, for which it makes the steps of `triton2`, and convolves what these
need: its own x, and B and C of its head's groups, which other programs convolve as well. So nobody waits for anybody:
new tokens are handed on in registers, rounded as the ring would round them. Of programs with the same numbers the first
stores them: x those of the first head of a group, B and C the first tile of the first head of a group, dt the first
tile of a head.

No program reads what another one writes. New tokens go to ring slots start .. start + T - 1, while those of `saved` ..
start - 1 are read: apart modulo S, since S >= replay + T. They go to the same of the window, while start - W + 1 ..
start - 1 are read: apart, since S' >= T + W - 1. Where all slots of the ring are read, what does not lie between
`saved` and `start` is thrown away, whatever it is. A tile of the checkpoint is read and written by one program.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early
from .forms import fastest
from .fused_step import gated, separate_step
from .ring import between_tokens
from .triton_pieces import after, exp, softplus, taken, times

if TYPE_CHECKING:
    from .fused_step import Front, Gate
    from .ring import Plan, Ring


@triton.jit
def _inner(c, b, PIECES: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products [T, M] of rows of c [T, N] and b [M, N], of the ring or fp32; of a single token by ordinary cores."""
    if c.shape[0] == 1:
        out = tl.sum(b.to(tl.float32) * c.to(tl.float32), axis=1)[None, :]
    elif b.dtype == tl.float32 or EXACT:
        out = taken(c, tl.trans(b).to(tl.float32), PIECES)
    else:
        out = tl.dot(c, tl.trans(b))
    return out


@triton.jit
def _summed(mixing, x, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """mixing fp32 [T, M] times x [M, P], of the ring; of a single token, or few, by ordinary cores."""
    if mixing.shape[0] == 1:
        out = tl.sum(tl.trans(mixing) * x.to(tl.float32), axis=0)[None, :]
    elif mixing.shape[1] < 16:
        out = tl.sum(mixing[:, :, None] * x.to(tl.float32)[None, :, :], axis=1)
    else:
        out = times(mixing, x, 0 if EXACT else 2)
    return out


@triton.jit
def _weights(weight_ptr, bias_ptr, channel, there, TAPS: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the convolution in channels [1, C]: the bias, then tap by tap."""
    found = (tl.load(bias_ptr + channel) if WHOLE else tl.load(bias_ptr + channel, mask=there, other=0.0),)
    for tap in tl.static_range(TAPS):
        at = weight_ptr + channel * TAPS + tap
        tap_weight = tl.load(at) if WHOLE else tl.load(at, mask=there, other=0.0)
        found = found + (tap_weight,)  # type: ignore[assignment]  # noqa: RUF005 - what Triton reads
    return found


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    u_ptr, window_ptr, channel, there, t, start, U_TOKEN: tl.constexpr, ENTRIES: tl.constexpr,
    WINDOW_SLOTS: tl.constexpr, COUNT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """What the convolution of tokens t [T, 1] in channels [1, C] reads, tap by tap: the last are the tokens' own."""
    found = ()
    for tap in tl.static_range(TAPS):
        at = t + (tap + 1 - TAPS)
        slot = (start + at + WINDOW_SLOTS) % WINDOW_SLOTS
        place = tl.where(at < 0, window_ptr + slot * ENTRIES, u_ptr + at * U_TOKEN)
        u = tl.load(place + channel, mask=(t < COUNT) & there, other=0.0)
        found = found + (u,)  # type: ignore[assignment]  # noqa: RUF005 - what Triton reads
    return found


@triton.jit
def _convolved(inputs, weights, like, replayed, TAPS: tl.constexpr, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounded as the ring rounds it."""
    total = weights[0]
    for tap in tl.static_range(TAPS):
        total = total + inputs[tap].to(tl.float32) * weights[tap + 1]
    if SILU:
        total = total * tl.sigmoid(total)
    return after(total.to(like.dtype.element_ty), replayed)


@triton.jit
def _fused_step(  # type: ignore[no-untyped-def]
    u_ptr, z_ptr, weight_ptr, bias_ptr, dt_bias_ptr, window_ptr, x_ptr, b_ptr, dt_ptr, decay_ptr, skip_ptr,
    gate_bias_ptr, norm_ptr, state_ptr, start_ptr, saved_ptr, out_ptr, eps,
    U_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr,
    X_HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, MARGIN: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW_SLOTS: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REPLAY: tl.constexpr, SETTLE: tl.constexpr,
    NORM: tl.constexpr, JOINT: tl.constexpr, BLOCK_P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    PIECES: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What an earlier call left is read while the kernel before, which brings u and z, may still run."""
    tiles: tl.constexpr = (WIDTH + BLOCK_P - 1) // BLOCK_P
    whole: tl.constexpr = WIDTH % BLOCK_P == 0 and SIZE == N
    entries: tl.constexpr = CHANNELS + HEADS
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    r = tl.arange(0, R)
    token = tl.arange(0, T)
    wide = p < WIDTH
    long = n < SIZE
    new = token < COUNT

    start = tl.load(start_ptr + row, cache_modifier=".cg")
    replayed = start - tl.load(saved_ptr + row, cache_modifier=".cg")
    states = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, None] * SIZE + n[None, :]
    inside = wide[:, None] & long[None, :]
    if whole:
        state = tl.load(states, cache_modifier=".cg")
    else:
        state = tl.load(states, mask=inside, other=0.0, cache_modifier=".cg")
    x_ptr += row * (SLOTS * KEPT) + head // X_HEADS * WIDTH
    b_ptr += row * (SLOTS * KEPT) + head // B_HEADS * SIZE
    dt_ptr += row * (SLOTS * HEADS) + head
    back = (start + (SLOTS - 1) - r) % SLOTS
    if JOINT:
        slots, there = r, r < SLOTS
    else:
        slots, back, there = back, r, r < replayed
    old = there & (back < replayed)
    old_dt = tl.load(dt_ptr + slots * HEADS, mask=there, other=0.0, cache_modifier=".cg")
    old_b = tl.load(
        b_ptr + slots[:, None] * KEPT + n[None, :], mask=there[:, None] & (long[None, :] | whole), other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    old_x = tl.load(
        x_ptr + slots[:, None] * KEPT + p[None, :], mask=there[:, None] & (wide[None, :] | whole), other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip

    x_channel = head // X_HEADS * WIDTH + p[None, :]
    b_channel = HEADS // X_HEADS * WIDTH + head // B_HEADS * SIZE + n[None, :]
    c_channel = KEPT + head // C_HEADS * SIZE + n[None, :]
    x_weights = _weights(weight_ptr, bias_ptr, x_channel, wide[None, :], TAPS, whole)
    b_weights = _weights(weight_ptr, bias_ptr, b_channel, long[None, :], TAPS, whole)
    c_weights = _weights(weight_ptr, bias_ptr, c_channel, long[None, :], TAPS, whole)
    dt_bias = tl.load(dt_bias_ptr + head)
    decay = tl.load(decay_ptr + head)
    skip = tl.load(skip_ptr + head)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    u_ptr += row * (COUNT * U_TOKEN)
    window_ptr += row * (WINDOW_SLOTS * entries)
    t = token[:, None]
    b_inputs = _inputs(
        u_ptr, window_ptr, b_channel, long[None, :] | whole, t, start, U_TOKEN, entries, WINDOW_SLOTS, COUNT, TAPS
    )
    c_inputs = _inputs(
        u_ptr, window_ptr, c_channel, long[None, :] | whole, t, start, U_TOKEN, entries, WINDOW_SLOTS, COUNT, TAPS
    )
    x_inputs = _inputs(
        u_ptr, window_ptr, x_channel, wide[None, :] | whole, t, start, U_TOKEN, entries, WINDOW_SLOTS, COUNT, TAPS
    )
    raw = tl.load(u_ptr + token * U_TOKEN + CHANNELS + head, mask=new, other=0.0)
    outputs = row * (COUNT * HEADS * WIDTH) + t * (HEADS * WIDTH) + head * WIDTH + p[None, :]
    shown = new[:, None] & (wide[None, :] | whole)
    if NORM:
        z = tl.load(z_ptr + (row * COUNT + t) * Z_TOKEN + head * WIDTH + p[None, :], mask=shown, other=0.0)
        z = z.to(tl.float32)
        if gate_bias_ptr is not None:
            z += tl.load(gate_bias_ptr + head * WIDTH + p, mask=wide, other=0.0)[None, :]
        norm = tl.load(norm_ptr + head * WIDTH + p, mask=wide, other=0.0).to(tl.float32)[None, :]

    state, old_b, old_x = after(state, replayed), after(old_b, replayed), after(old_x, replayed)
    b = _convolved(b_inputs, b_weights, b_ptr, replayed, TAPS, SILU)
    c = _convolved(c_inputs, c_weights, b_ptr, replayed, TAPS, SILU)
    x = _convolved(x_inputs, x_weights, x_ptr, replayed, TAPS, SILU)
    dt = tl.where(new, softplus(raw.to(tl.float32) + dt_bias), 0.0)

    kept = (start + token) % SLOTS
    window = (start + token) % WINDOW_SLOTS * entries
    first = new & (tile == 0)
    tl.store(dt_ptr + kept * HEADS, dt, mask=first)
    tl.store(window_ptr + window + CHANNELS + head, raw, mask=first)
    own = first[:, None] & (long[None, :] | whole) & (head % B_HEADS == 0)
    tl.store(b_ptr + kept[:, None] * KEPT + n[None, :], b, mask=own)
    tl.store(window_ptr + window[:, None] + b_channel, b_inputs[TAPS - 1], mask=own)
    own = first[:, None] & (long[None, :] | whole) & (head % C_HEADS == 0)
    tl.store(window_ptr + window[:, None] + c_channel, c_inputs[TAPS - 1], mask=own)
    own = shown & (head % X_HEADS == 0)
    tl.store(x_ptr + kept[:, None] * KEPT + p[None, :], x, mask=own)
    tl.store(window_ptr + window[:, None] + x_channel, x_inputs[TAPS - 1], mask=own)

    old_dt = tl.where(old, old_dt, 0.0)
    old_x = tl.where(old[:, None], old_x, 0.0)
    steps = old_dt * decay
    total = tl.sum(steps, axis=0)
    carry = exp(total)
    if JOINT:
        later = tl.sum(tl.where(back[:, None] < back[None, :], steps[:, None], 0.0), axis=0)
    else:
        later = tl.cumsum(steps, axis=0) - steps
    weights = exp(later) * old_dt
    mixing = tl.where(old[None, :], _inner(c, old_b, PIECES, EXACT), 0.0) * weights[None, :]
    y = _inner(c, state, PIECES, EXACT) * carry + _summed(mixing, old_x, EXACT)
    if T == 1:
        y = y * exp(dt * decay)[:, None]
        y += x.to(tl.float32) * (tl.sum(c.to(tl.float32) * b.to(tl.float32), axis=1) * dt + skip)[:, None]
    else:
        since = tl.cumsum(dt * decay, axis=0)
        between = tl.where(token[:, None] >= token[None, :], since[:, None] - since[None, :], float("-inf"))
        mixing = _inner(c, b, PIECES, EXACT) * tl.exp(between) * dt[None, :]
        mixing += tl.where(token[:, None] == token[None, :], skip, 0.0)
        y = y * exp(since)[:, None] + _summed(mixing, x, EXACT)
    y = y.to(x_ptr.dtype.element_ty)
    if NORM:
        y = y.to(tl.float32) * z * tl.sigmoid(z)
        scale = 1 / tl.sqrt(tl.sum(y * y, axis=1) / WIDTH + eps)
        y = y * scale[:, None] * norm
    tl.store(out_ptr + outputs, y.to(out_ptr.dtype.element_ty), mask=shown)

    if SETTLE:  # noqa: SIM102 - one of the two is known when the kernel is compiled
        if (replayed > 0) & (replayed + MARGIN > REPLAY):
            inputs = tl.trans(old_x).to(tl.float32) * weights[None, :]
            added = times(inputs, tl.where(old[:, None], old_b, 0.0), 0 if EXACT else 3)
            if whole:
                tl.store(states, state * carry + added)
            else:
                tl.store(states, state * carry + added, mask=inside)


class Form(NamedTuple):
    """How a call is cut up. None changes a result by more than the order of its sums."""

    block: int
    """Rows of a head's state that a program has."""
    warps: int
    joint: bool = False
    """All slots of the ring are read, so that nothing waits for the cursors."""
    normed: bool = False
    """The norm is made too, of heads that a program has whole; else it is a kernel of its own."""


TILES = ((16, 1), (16, 2), (16, 4), (16, 8), (32, 4), (32, 8))
WHOLE = ((64, 4), (64, 8), (128, 8))
"""Of heads whose norm is made too."""
PIECES = 1
"""Of the checkpoint where it meets bf16 C: 1 is tf32, 2 and 3 are sums of as many bf16."""
SLOTS = 64
"""The most of a ring that is read whole."""
FEW = 8
"""Rows of a call up to which it is one kernel, as long as nothing was measured."""
MEASURED = 1 << 18
"""Bytes of a checkpoint from which on forms are timed."""

_best: dict[tuple[Any, ...], Form | None] = {}
"""None where separate kernels are faster."""


def _tile(size: int) -> int:
    """Matrix products have at least 16 of everything."""
    return max(16, int(triton.next_power_of_2(size)))


def forms_for(ring: Ring, state: Tensor, plan: Plan, gate: Gate | None) -> list[Form]:
    """Those whose tiles a head fills, with the norm inside where a program has the whole group."""
    width = _tile(state.shape[2])
    joint = (False, True) if ring.dt.shape[1] <= SLOTS else (False,)
    found = [Form(*tile, all_slots) for all_slots in joint for tile in TILES if tile[0] <= width]
    if gate is not None and gate.width == state.shape[2]:
        tiles = [tile for tile in (*TILES, *WHOLE) if tile[0] == width]
        found = [*(Form(*tile, all_slots, True) for all_slots in joint for tile in tiles), *found]
    return found


def usual(state: Tensor, gate: Gate | None) -> Form | None:
    """As long as nothing was measured."""
    width = _tile(state.shape[2])
    return Form(16, 4, normed=gate is not None and width == 16) if state.shape[0] <= FEW else None


def form_for(
    u: Tensor, z: Tensor, front: Front, ring: Ring, state: Tensor, plan: Plan, gate: Gate | None
) -> Form | None:
    """The fastest where that can be measured now; None where separate kernels are faster."""
    key = None if gate is None else (gate.width, gate.bias is None)
    groups = ring.x.shape[2], ring.B.shape[2], front.weight.shape
    kind = *state.shape, *groups, plan, key, ring.dt.shape[1], ring.x.dtype, state.device
    if kind not in _best:
        few = state.nbytes < MEASURED or not state.is_cuda
        if few or torch.cuda.is_current_stream_capturing():
            return usual(state, gate)
        _best[kind] = tune(u, z, front, ring, state, plan, gate)
    return _best[kind]


def faster(u: Tensor, z: Tensor, front: Front, ring: Ring, state: Tensor, plan: Plan, gate: Gate | None) -> bool:
    """Whether one kernel is faster than one after the other."""
    return form_for(u, z, front, ring, state, plan, gate) is not None


def tune(u: Tensor, z: Tensor, front: Front, ring: Ring, state: Tensor, plan: Plan, gate: Gate | None) -> Form | None:
    """Times every form, and separate kernels, on memory of their own."""
    kept, dt = torch.zeros_like(front.kept), torch.zeros_like(ring.dt)
    x, B = kept.split([t.shape[2] * t.shape[3] for t in (ring.x, ring.B)], dim=2)
    scratch = dataclasses.replace(ring, x=x.unflatten(2, ring.x.shape[2:]), B=B.unflatten(2, ring.B.shape[2:]), dt=dt)
    own = dataclasses.replace(front, window=torch.zeros_like(front.window), kept=kept)
    decay = skip = torch.zeros_like(front.dt_bias)

    def run(form: Form | None, checkpoint: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> object:
        given = u, z, own, scratch, decay, skip, checkpoint, start, saved, plan, gate
        if form is not None:
            return fused_step(*given, form, warmup=warmup)
        return None if warmup else separate_step(*given)

    return fastest([*forms_for(ring, state, plan, gate), None], state, plan, run)


def fused_step(
    u: Tensor,
    z: Tensor,
    front: Front,
    ring: Ring,
    A: Tensor,
    D: Tensor,
    state: Tensor,
    start: Tensor,
    saved: Tensor,
    plan: Plan,
    gate: Gate | None,
    form: Form | None = None,
    pieces: int = PIECES,
    warmup: bool = False,
    early: bool | None = None,
) -> Tensor:
    """Shapes as in `fused_step`. With `warmup` the kernel is only compiled. `early` as in `support.begun_early`."""
    form = form or form_for(u, z, front, ring, state, plan, gate)
    assert form is not None
    batch, heads, width, size = state.shape
    channels, taps = front.weight.shape
    norm = gate if form.normed else None
    out = torch.empty(batch * plan.count, heads * width, dtype=z.dtype, device=z.device)
    exact = ring.x.dtype == torch.float32
    slots = ring.dt.shape[1]
    with torch.cuda.device_of(state):
        _fused_step.run(
            u, z, front.weight, front.bias, front.dt_bias, front.window, ring.x, ring.B, ring.dt, A, D,
            None if norm is None else norm.bias, None if norm is None else norm.weight, state, start, saved, out,
            0.0 if norm is None else norm.eps,
            U_TOKEN=between_tokens(u), Z_TOKEN=z.stride(0), KEPT=front.kept.shape[2], CHANNELS=channels, HEADS=heads,
            X_HEADS=heads // ring.x.shape[2], B_HEADS=heads // ring.B.shape[2],
            C_HEADS=heads // ((channels - front.kept.shape[2]) // size), MARGIN=plan.steps, SLOTS=slots,
            WINDOW_SLOTS=front.window.shape[1], TAPS=taps, SILU=front.silu, WIDTH=width, SIZE=size, COUNT=plan.count,
            REPLAY=plan.replay, SETTLE=plan.settle, NORM=norm is not None, JOINT=form.joint, BLOCK_P=form.block,
            N=_tile(size), T=triton.next_power_of_2(plan.count), R=_tile(slots if form.joint else plan.replay),
            PIECES=0 if exact else pieces, EXACT=exact, num_warps=form.warps,
            grid=(triton.cdiv(width, form.block) * heads, batch), warmup=warmup, **begun_early(state, early),
        )  # fmt: skip
    return out if form.normed or warmup else gated(out, z, gate)
