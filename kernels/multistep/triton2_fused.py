"""What a Mamba-2 layer does with a few tokens between its projections, as one Triton kernel.

A program has BLOCK_P rows of one head's state, for which it makes the steps of `triton2`, and convolves what these
need: its own x, and B and C of its head's groups, which other programs convolve as well. So nobody waits for anybody:
new tokens are handed on in registers, rounded as the ring would round them. Of programs with the same numbers the first
stores them: x those of the first head of a group, B and C the first tile of the first head of a group, dt the first
tile of a head.

No program reads what another one writes. New tokens go to ring slots start .. start + T - 1, while those of `saved` ..
start - 1 are read: apart modulo S, since S >= replay + T. They go to the same of the window, while start - W + 1 ..
start - 1 are read: apart, since S' >= T + W - 1. A tile of the checkpoint is read and written by one program.
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

from ..few_rows import Unscaled
from ..support import begun_early
from ..tuning import measurable, settled
from .forms import fastest
from .fused_step import gated, separate_step
from .ring import between_tokens
from .triton_fused_pieces import (
    angles,
    convolved_tokens,
    decayed_by,
    held_back,
    inner_products,
    joined_inputs,
    mixed_with,
    own_inputs,
    rotated_tokens,
    summed_tokens,
    tap_weights,
    window_inputs,
)
from .triton_pieces import after, exp, softplus, times

if TYPE_CHECKING:
    from .fused_step import Front, Gate
    from .ring import Plan, Ring


@triton.jit
def _few_step(  # type: ignore[no-untyped-def]
    u_ptr, z_ptr, taps_ptr, dt_bias_ptr, window_ptr, x_ptr, b_ptr, dt_ptr, decay_ptr, skip_ptr,
    gate_bias_ptr, norm_ptr, state_ptr, start_ptr, saved_ptr, out_ptr, squares_ptr, rotary_ptr, POSITIONS, eps,
    U_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr,
    X_HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, MARGIN: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW_SLOTS: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REPLAY: tl.constexpr, SETTLE: tl.constexpr,
    GATED: tl.constexpr, LEFT: tl.constexpr, BLOCK_P: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What an earlier call left is read while the kernel before, which brings u and z, may still run."""
    tiles: tl.constexpr = (WIDTH + BLOCK_P - 1) // BLOCK_P
    entries: tl.constexpr = CHANNELS + HEADS
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    r = tl.arange(0, R)
    token = tl.arange(0, T)
    t = token[:, None]
    new = token < COUNT
    inside = (p < WIDTH)[:, None] & (n < SIZE)[None, :]
    new_b = new[:, None] & (n < SIZE)[None, :]
    new_x = new[:, None] & (p < WIDTH)[None, :]

    start = tl.load(start_ptr + row, cache_modifier=".cg")
    replayed = start - tl.load(saved_ptr + row, cache_modifier=".cg")
    states = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, None] * SIZE + n[None, :]
    state = tl.load(states, mask=inside, other=0.0, cache_modifier=".cg")
    x_ptr += row * (SLOTS * KEPT) + head // X_HEADS * WIDTH
    b_ptr += row * (SLOTS * KEPT) + head // B_HEADS * SIZE
    dt_ptr += row * (SLOTS * HEADS) + head
    old = r < replayed
    slots = (start + (SLOTS - 1) - r) % SLOTS
    old_dt = tl.load(dt_ptr + slots * HEADS, mask=old, other=0.0, cache_modifier=".cg")
    at = b_ptr + slots[:, None] * KEPT + n[None, :]
    old_b = tl.load(at, mask=old[:, None] & (n < SIZE)[None, :], other=0.0, cache_modifier=".cg")
    at = x_ptr + slots[:, None] * KEPT + p[None, :]
    old_x = tl.load(at, mask=old[:, None] & (p < WIDTH)[None, :], other=0.0, cache_modifier=".cg")
    x_channel = head // X_HEADS * WIDTH + p[None, :]
    b_channel = HEADS // X_HEADS * WIDTH + head // B_HEADS * SIZE + n[None, :]
    c_channel = KEPT + head // C_HEADS * SIZE + n[None, :]
    b_weights = tap_weights(taps_ptr, b_channel + 0 * t, new_b, CHANNELS, TAPS)
    c_weights = tap_weights(taps_ptr, c_channel + 0 * t, new_b, CHANNELS, TAPS)
    x_weights = tap_weights(taps_ptr, x_channel + 0 * t, new_x, CHANNELS, TAPS)
    if rotary_ptr is not None:
        b_other = b_channel - n[None, :] + mixed_with(n, SIZE)[None, :]
        c_other = c_channel - n[None, :] + mixed_with(n, SIZE)[None, :]
        b_mixed_weights = tap_weights(taps_ptr, b_other + 0 * t, new_b, CHANNELS, TAPS)
        c_mixed_weights = tap_weights(taps_ptr, c_other + 0 * t, new_b, CHANNELS, TAPS)
    dt_bias = tl.load(dt_bias_ptr + head)
    decay = tl.load(decay_ptr + head)
    skip = tl.load(skip_ptr + head)
    u_ptr += row * (COUNT * U_TOKEN)
    window_ptr += row * (WINDOW_SLOTS * entries)
    b_window = window_inputs(window_ptr + b_channel, new_b, t, start, entries, WINDOW_SLOTS, TAPS)
    c_window = window_inputs(window_ptr + c_channel, new_b, t, start, entries, WINDOW_SLOTS, TAPS)
    x_window = window_inputs(window_ptr + x_channel, new_x, t, start, entries, WINDOW_SLOTS, TAPS)
    if rotary_ptr is not None:
        turn = angles(rotary_ptr, start + t, POSITIONS, n[None, :], new_b, SIZE)
        b_mixed_window = window_inputs(window_ptr + b_other, new_b, t, start, entries, WINDOW_SLOTS, TAPS)
        c_mixed_window = window_inputs(window_ptr + c_other, new_b, t, start, entries, WINDOW_SLOTS, TAPS)
    u_first = u_ptr + CHANNELS + head
    raws = u_first + token * U_TOKEN
    u_ptr += t * U_TOKEN
    if GATED:
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + (head * WIDTH + p[None, :] + 0 * t), mask=new_x, other=0.0)
        if gate_bias_ptr is not None:
            gate_bias = tl.load(gate_bias_ptr + (head * WIDTH + p[None, :] + 0 * t), mask=new_x, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    b_own = own_inputs(u_ptr + b_channel, new_b, t, U_TOKEN, COUNT, TAPS)
    c_own = own_inputs(u_ptr + c_channel, new_b, t, U_TOKEN, COUNT, TAPS)
    x_own = own_inputs(u_ptr + x_channel, new_x, t, U_TOKEN, COUNT, TAPS)
    if rotary_ptr is not None:
        b_mixed_own = own_inputs(u_ptr + b_other, new_b, t, U_TOKEN, COUNT, TAPS)
        c_mixed_own = own_inputs(u_ptr + c_other, new_b, t, U_TOKEN, COUNT, TAPS)
    raw = tl.load(raws, mask=new, other=0.0)
    arrived = tl.load(u_first).to(tl.float32)
    if GATED:
        z = tl.load(z_ptr + (row * COUNT + t) * Z_TOKEN + head * WIDTH + p[None, :], mask=new_x, other=0.0)

    state, old_b, old_x = after(state, replayed), after(old_b, replayed), after(old_x, replayed)
    weights, carry = decayed_by(held_back(old_dt, arrived), decay)
    b_inputs = joined_inputs(b_window, b_own, t, COUNT, TAPS)
    c_inputs = joined_inputs(c_window, c_own, t, COUNT, TAPS)
    x_inputs = joined_inputs(x_window, x_own, t, COUNT, TAPS)
    b = convolved_tokens(b_inputs, b_weights, replayed, TAPS, SILU)
    c = convolved_tokens(c_inputs, c_weights, replayed, TAPS, SILU)
    x = convolved_tokens(x_inputs, x_weights, replayed, TAPS, SILU)
    if rotary_ptr is not None:
        mixed = joined_inputs(b_mixed_window, b_mixed_own, t, COUNT, TAPS)
        b = rotated_tokens(b, mixed, b_mixed_weights, turn, n[None, :], replayed, TAPS, SILU, SIZE)
        mixed = joined_inputs(c_mixed_window, c_mixed_own, t, COUNT, TAPS)
        c = rotated_tokens(c, mixed, c_mixed_weights, turn, n[None, :], replayed, TAPS, SILU, SIZE)
    dt = tl.where(new, softplus(raw.to(tl.float32) + dt_bias), 0.0)

    kept = (start + token) % SLOTS
    window = (start + token) % WINDOW_SLOTS * entries
    tl.store(dt_ptr + kept * HEADS, dt, mask=new & (tile == 0))
    tl.store(window_ptr + window + CHANNELS + head, raw, mask=new & (tile == 0))
    own = new_b & (tile == 0) & (head % B_HEADS == 0)
    tl.store(b_ptr + kept[:, None] * KEPT + n[None, :], b, mask=own)
    tl.store(window_ptr + window[:, None] + b_channel, b_inputs[TAPS - 1], mask=own)
    own = new_b & (tile == 0) & (head % C_HEADS == 0)
    tl.store(window_ptr + window[:, None] + c_channel, c_inputs[TAPS - 1], mask=own)
    own = new_x & (head % X_HEADS == 0)
    tl.store(x_ptr + kept[:, None] * KEPT + p[None, :], x, mask=own)
    tl.store(window_ptr + window[:, None] + x_channel, x_inputs[TAPS - 1], mask=own)

    mixing = inner_products(c, old_b, PIECES, EXACT) * weights[None, :]
    y = inner_products(c, state, PIECES, EXACT) * carry + summed_tokens(mixing, old_x, T, EXACT)
    since = tl.cumsum(dt * decay, axis=0)
    between = tl.where(token[:, None] >= token[None, :], since[:, None] - since[None, :], float("-inf"))
    mixing = inner_products(c, b, PIECES, EXACT) * tl.exp(between) * dt[None, :]
    mixing += tl.where(token[:, None] == token[None, :], skip, 0.0)
    y = y * exp(since)[:, None] + summed_tokens(mixing, x, T, EXACT)
    y = y.to(x.dtype)
    if GATED:
        z = z.to(tl.float32)
        if gate_bias_ptr is not None:
            z += gate_bias
        y = y.to(tl.float32) * z * tl.sigmoid(z)
        if norm_ptr is not None:
            squares = tl.sum(y * y, axis=1)
            if LEFT:
                at = (row * COUNT + token) * (tiles * HEADS) + tl.program_id(0)
                tl.store(squares_ptr + at, squares, mask=new)
            else:
                y = y * (1 / tl.sqrt(squares / WIDTH + eps))[:, None]
            y = y * norm.to(tl.float32)
    at = out_ptr + row * (COUNT * HEADS * WIDTH) + t * (HEADS * WIDTH) + head * WIDTH + p[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=new_x)

    if SETTLE:  # noqa: SIM102 - one of the two is known when the kernel is compiled
        if (replayed > 0) & (replayed + MARGIN > REPLAY):
            inputs = tl.trans(old_x).to(tl.float32) * weights[None, :]
            added = times(inputs, old_b, 0 if EXACT else 3)
            tl.store(states, state * carry + added, mask=inside)


@triton.jit
def _single_step(  # type: ignore[no-untyped-def]
    u_ptr, z_ptr, taps_ptr, dt_bias_ptr, window_ptr, x_ptr, b_ptr, dt_ptr, decay_ptr, skip_ptr,
    gate_bias_ptr, norm_ptr, state_ptr, start_ptr, saved_ptr, out_ptr, squares_ptr, rotary_ptr, POSITIONS, eps,
    U_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr,
    X_HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, MARGIN: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW_SLOTS: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REPLAY: tl.constexpr, SETTLE: tl.constexpr,
    GATED: tl.constexpr, LEFT: tl.constexpr, BLOCK_P: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same of a single token, without matrix products.

    Each warp convolves B and C for itself and takes every WARPS-th row of what they meet, so that little goes from warp
    to warp: rows p of the head and replayed tokens r are numbered [.., WARPS].
    """
    tiles: tl.constexpr = (WIDTH + BLOCK_P - 1) // BLOCK_P
    entries: tl.constexpr = CHANNELS + HEADS
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tl.program_id(1).to(tl.int64)
    warp = tl.arange(0, WARPS)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P // WARPS)[:, None] * WARPS + warp[None, :]
    n = tl.arange(0, N)
    r = tl.arange(0, R)
    apart = tl.arange(0, R // WARPS)[:, None] * WARPS + warp[None, :]
    t = (warp * 0)[:, None]
    new_b = (warp < WARPS)[:, None] & (n < SIZE)[None, :]
    new_x = p < WIDTH
    inside = new_x[:, :, None] & (n < SIZE)[None, None, :]

    start = tl.load(start_ptr + row, cache_modifier=".cg")
    replayed = start - tl.load(saved_ptr + row, cache_modifier=".cg")
    states = state_ptr + (row * HEADS + head) * (WIDTH * SIZE) + p[:, :, None] * SIZE + n[None, None, :]
    state = tl.load(states, mask=inside, other=0.0, cache_modifier=".cg")
    x_ptr += row * (SLOTS * KEPT) + head // X_HEADS * WIDTH
    b_ptr += row * (SLOTS * KEPT) + head // B_HEADS * SIZE
    dt_ptr += row * (SLOTS * HEADS) + head
    old = r < replayed
    slots = (start + (SLOTS - 1) - r) % SLOTS
    old_dt = tl.load(dt_ptr + slots * HEADS, mask=old, other=0.0, cache_modifier=".cg")
    at = x_ptr + slots[:, None, None] * KEPT + p[None, :, :]
    old_x = tl.load(at, mask=old[:, None, None] & new_x[None, :, :], other=0.0, cache_modifier=".cg")
    slots = (start + (SLOTS - 1) - apart) % SLOTS
    at = b_ptr + slots[:, :, None] * KEPT + n[None, None, :]
    old_b = tl.load(
        at, mask=(apart < replayed)[:, :, None] & (n < SIZE)[None, None, :], other=0.0, cache_modifier=".cg"
    )
    x_channel = head // X_HEADS * WIDTH + p
    b_channel = HEADS // X_HEADS * WIDTH + head // B_HEADS * SIZE + n[None, :]
    c_channel = KEPT + head // C_HEADS * SIZE + n[None, :]
    b_weights = tap_weights(taps_ptr, b_channel + 0 * t, new_b, CHANNELS, TAPS)
    c_weights = tap_weights(taps_ptr, c_channel + 0 * t, new_b, CHANNELS, TAPS)
    x_weights = tap_weights(taps_ptr, x_channel, new_x, CHANNELS, TAPS)
    if rotary_ptr is not None:
        b_other = b_channel - n[None, :] + mixed_with(n, SIZE)[None, :] + 0 * t
        c_other = c_channel - n[None, :] + mixed_with(n, SIZE)[None, :] + 0 * t
        b_mixed_weights = tap_weights(taps_ptr, b_other, new_b, CHANNELS, TAPS)
        c_mixed_weights = tap_weights(taps_ptr, c_other, new_b, CHANNELS, TAPS)
    dt_bias = tl.load(dt_bias_ptr + head)
    decay = tl.load(decay_ptr + head)
    skip = tl.load(skip_ptr + head)
    u_ptr += row * U_TOKEN
    window_ptr += row * (WINDOW_SLOTS * entries)
    b_window = window_inputs(window_ptr + b_channel + 0 * t, new_b, 0, start, entries, WINDOW_SLOTS, TAPS)
    c_window = window_inputs(window_ptr + c_channel + 0 * t, new_b, 0, start, entries, WINDOW_SLOTS, TAPS)
    x_window = window_inputs(window_ptr + x_channel, new_x, 0, start, entries, WINDOW_SLOTS, TAPS)
    if rotary_ptr is not None:
        turn = angles(rotary_ptr, start, POSITIONS, n[None, :] + 0 * t, new_b, SIZE)
        b_mixed_window = window_inputs(window_ptr + b_other, new_b, 0, start, entries, WINDOW_SLOTS, TAPS)
        c_mixed_window = window_inputs(window_ptr + c_other, new_b, 0, start, entries, WINDOW_SLOTS, TAPS)
    if GATED:
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + head * WIDTH + p, mask=new_x, other=0.0)
        if gate_bias_ptr is not None:
            gate_bias = tl.load(gate_bias_ptr + head * WIDTH + p, mask=new_x, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    b_own = own_inputs(u_ptr + b_channel + 0 * t, new_b, 0, U_TOKEN, COUNT, TAPS)
    c_own = own_inputs(u_ptr + c_channel + 0 * t, new_b, 0, U_TOKEN, COUNT, TAPS)
    x_own = own_inputs(u_ptr + x_channel, new_x, 0, U_TOKEN, COUNT, TAPS)
    if rotary_ptr is not None:
        b_mixed_own = own_inputs(u_ptr + b_other, new_b, 0, U_TOKEN, COUNT, TAPS)
        c_mixed_own = own_inputs(u_ptr + c_other, new_b, 0, U_TOKEN, COUNT, TAPS)
    raw = tl.load(u_ptr + CHANNELS + head)
    if GATED:
        z = tl.load(z_ptr + row * Z_TOKEN + head * WIDTH + p, mask=new_x, other=0.0)

    state, old_b, old_x = after(state, replayed), after(old_b, replayed), after(old_x, replayed)
    weights, carry = decayed_by(held_back(old_dt, raw.to(tl.float32)), decay)
    b_inputs = joined_inputs(b_window, b_own, 0, COUNT, TAPS)
    c_inputs = joined_inputs(c_window, c_own, 0, COUNT, TAPS)
    x_inputs = joined_inputs(x_window, x_own, 0, COUNT, TAPS)
    b = convolved_tokens(b_inputs, b_weights, replayed, TAPS, SILU)
    c = convolved_tokens(c_inputs, c_weights, replayed, TAPS, SILU)
    x = convolved_tokens(x_inputs, x_weights, replayed, TAPS, SILU)
    if rotary_ptr is not None:
        mixed = joined_inputs(b_mixed_window, b_mixed_own, 0, COUNT, TAPS)
        b = rotated_tokens(b, mixed, b_mixed_weights, turn, n[None, :], replayed, TAPS, SILU, SIZE)
        mixed = joined_inputs(c_mixed_window, c_mixed_own, 0, COUNT, TAPS)
        c = rotated_tokens(c, mixed, c_mixed_weights, turn, n[None, :], replayed, TAPS, SILU, SIZE)
    dt = softplus(raw.to(tl.float32) + dt_bias)

    kept = start % SLOTS
    window_ptr += start % WINDOW_SLOTS * entries
    tl.store(dt_ptr + kept * HEADS, dt, mask=tile == 0)
    tl.store(window_ptr + CHANNELS + head, raw, mask=tile == 0)
    own = new_b & (warp == 0)[:, None] & (tile == 0)
    tl.store(b_ptr + kept * KEPT + n[None, :] + 0 * t, b, mask=own & (head % B_HEADS == 0))
    tl.store(window_ptr + b_channel + 0 * t, b_inputs[TAPS - 1], mask=own & (head % B_HEADS == 0))
    tl.store(window_ptr + c_channel + 0 * t, c_inputs[TAPS - 1], mask=own & (head % C_HEADS == 0))
    own = new_x & (head % X_HEADS == 0)
    tl.store(x_ptr + kept * KEPT + p, x, mask=own)
    tl.store(window_ptr + x_channel, x_inputs[TAPS - 1], mask=own)

    c = c.to(tl.float32)
    mixing = tl.sum(old_b.to(tl.float32) * c[None, :, :], axis=2)
    y = tl.sum(state * c[None, :, :], axis=2) * carry
    y += tl.sum(old_x.to(tl.float32) * (tl.reshape(mixing, (R,)) * weights)[:, None, None], axis=0)
    y = y * exp(dt * decay) + x.to(tl.float32) * (tl.sum(c * b.to(tl.float32), axis=1) * dt + skip)[None, :]
    y = y.to(x.dtype)
    if GATED:
        z = z.to(tl.float32)
        if gate_bias_ptr is not None:
            z += gate_bias
        y = y.to(tl.float32) * z * tl.sigmoid(z)
        if norm_ptr is not None:
            squares = tl.sum(y * y)
            if LEFT:
                tl.store(squares_ptr + row * (tiles * HEADS) + tl.program_id(0), squares)
            else:
                y = y * (1 / tl.sqrt(squares / WIDTH + eps))
            y = y * norm.to(tl.float32)
    at = out_ptr + row * (HEADS * WIDTH) + head * WIDTH + p
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=new_x)

    if SETTLE:  # noqa: SIM102 - one of the two is known when the kernel is compiled
        if (replayed > 0) & (replayed + MARGIN > REPLAY):
            inputs = tl.trans(tl.reshape(old_x, (R, BLOCK_P))).to(tl.float32) * weights[None, :]
            added = tl.reshape(
                times(inputs, tl.reshape(old_b, (R, N)), 0 if EXACT else 3), (BLOCK_P // WARPS, WARPS, N)
            )
            tl.store(states, state * carry + added, mask=inside)


class Form(NamedTuple):
    """How a call is cut up. None changes a result by more than the order of its sums."""

    block: int
    """Rows of a head's state that a program has."""
    warps: int
    normed: bool = False
    """The norm is made too, of heads that a program has whole; else it is a kernel of its own. A gate without a norm is
    made by any form."""


FORMS = tuple(Form(*tile) for tile in ((16, 2), (16, 4), (16, 8), (32, 4), (32, 8)))
PIECES = 1
"""Of the checkpoint where it meets bf16 C: 1 is tf32, 2 and 3 are sums of as many bf16."""
FEW = 32
"""Rows of a call up to which it is one kernel, as long as nothing was measured."""
SMALL = 1 << 12
"""Numbers of a head's state up to which its norm is made inside, as long as nothing was measured."""
MEASURED = 1 << 18
"""Bytes of a checkpoint from which on forms are timed."""

_best: dict[tuple[Any, ...], Form | None] = {}
"""None where separate kernels are faster."""


def _tile(size: int) -> int:
    """Matrix products have at least 16 of everything."""
    return max(16, int(triton.next_power_of_2(size)))


def _whole(state: Tensor, plan: Plan, gate: Gate) -> bool:
    """Whether a program can have a head whole, and make its norm.

    Products of 64 rows and more are of warp groups, which `triton2.forms_for` says when to trust.
    """
    return gate.width == state.shape[2] and (_tile(state.shape[2]) < 64 or _tile(plan.replay) == 16)


def forms_for(state: Tensor, plan: Plan, gate: Gate) -> list[Form]:
    """Those whose tiles a head fills, with the norm inside where a program has the whole group."""
    width = _tile(state.shape[2])
    found = [form for form in FORMS if form.block <= width]
    return [Form(width, width // 16, normed=True), *found] if _whole(state, plan, gate) else found


def usual(state: Tensor, plan: Plan, gate: Gate) -> Form | None:
    """As long as nothing was measured."""
    width, size = map(_tile, state.shape[2:])
    inside = _whole(state, plan, gate) and width * size <= SMALL
    return Form(width if inside else 16, 4, normed=inside) if state.shape[0] <= FEW else None


def form_for(u: Tensor, z: Tensor, front: Front, ring: Ring, state: Tensor, plan: Plan, gate: Gate) -> Form | None:
    """The fastest where that can be measured now; None where separate kernels are faster."""
    key = gate.width, gate.bias is None, gate.left, front.rotation is None
    groups = ring.x.shape[2], ring.B.shape[2], front.weight.shape
    kind = *state.shape, *groups, plan, *key, ring.dt.shape[1], ring.x.dtype, state.device
    if kind not in _best:
        if not measurable(state, MEASURED):
            return usual(state, plan, gate)
        choose = partial(tune, u, z, front, ring, state, plan, gate)
        _best[kind] = settled(kind, [*forms_for(state, plan, gate), None], choose, usual(state, plan, gate))
    return _best[kind]


def faster(u: Tensor, z: Tensor, front: Front, ring: Ring, state: Tensor, plan: Plan, gate: Gate) -> bool:
    """Whether one kernel is faster than one after the other."""
    return form_for(u, z, front, ring, state, plan, gate) is not None


def tune(u: Tensor, z: Tensor, front: Front, ring: Ring, state: Tensor, plan: Plan, gate: Gate) -> Form | None:
    """Times every form, and separate kernels, on memory of their own.

    Each call stands behind a kernel that lets none begin early, much as in a layer, where a product lets the next one
    begin at its end: right behind another step, a step would read its checkpoint while that one is at work.
    """
    kept, dt = torch.zeros_like(front.kept), torch.zeros_like(ring.dt)
    x, B = kept.split([t.shape[2] * t.shape[3] for t in (ring.x, ring.B)], dim=2)
    scratch = dataclasses.replace(ring, x=x.unflatten(2, ring.x.shape[2:]), B=B.unflatten(2, ring.B.shape[2:]), dt=dt)
    own = dataclasses.replace(front, window=torch.zeros_like(front.window), kept=kept)
    decay = skip = torch.zeros_like(front.dt_bias)
    ahead = torch.zeros_like(decay)

    def run(form: Form | None, checkpoint: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> object:
        given = u, z, own, scratch, decay, skip, checkpoint, start, saved, plan, gate
        if warmup:
            return fused_step(*given, form, warmup=True) if form is not None else None
        ahead.mul_(0)
        return fused_step(*given, form) if form is not None else separate_step(*given)

    return fastest([*forms_for(state, plan, gate), None], state, plan, run)


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
    gate: Gate,
    form: Form | None = None,
    pieces: int = PIECES,
    warmup: bool = False,
    early: bool | None = None,
) -> Tensor | Unscaled:
    """Shapes as in `fused_step`. With `warmup` the kernel is only compiled. `early` as in `support.begun_early`."""
    form = form or form_for(u, z, front, ring, state, plan, gate)
    assert form is not None
    batch, heads, width, size = state.shape
    channels, taps = front.weight.shape
    left = gate.left and not form.normed
    inside = gate if form.normed or left or gate.weight is None else None
    programs = triton.cdiv(width, form.block) * heads
    out = torch.empty(batch * plan.count, heads * width, dtype=z.dtype, device=z.device)
    squares = torch.empty(batch * plan.count, programs, dtype=torch.float32, device=z.device) if left else None
    exact = ring.x.dtype == torch.float32
    rotary = None if front.rotation is None else front.rotation.table
    with torch.cuda.device_of(state):
        (_single_step if plan.count == 1 else _few_step).run(
            u, z, front.taps, front.dt_bias, front.window, ring.x, ring.B, ring.dt, A, D,
            inside and inside.bias, inside and inside.weight, state, start, saved, out,
            squares, rotary, None if rotary is None else len(rotary), gate.eps,
            U_TOKEN=between_tokens(u), Z_TOKEN=z.stride(0), KEPT=front.kept.shape[2], CHANNELS=channels, HEADS=heads,
            X_HEADS=heads // ring.x.shape[2], B_HEADS=heads // ring.B.shape[2],
            C_HEADS=heads // ((channels - front.kept.shape[2]) // size), MARGIN=plan.steps, SLOTS=ring.dt.shape[1],
            WINDOW_SLOTS=front.window.shape[1], TAPS=taps, SILU=front.silu, WIDTH=width, SIZE=size, COUNT=plan.count,
            REPLAY=plan.replay, SETTLE=plan.settle, GATED=inside is not None, LEFT=left,
            BLOCK_P=form.block, N=_tile(size), T=triton.next_power_of_2(plan.count),
            R=_tile(plan.replay), WARPS=form.warps, PIECES=0 if exact else pieces,
            EXACT=exact, num_warps=form.warps, grid=(programs, batch), warmup=warmup, **begun_early(state, early),
        )  # fmt: skip
    if squares is not None:
        return Unscaled(out, squares, gate.eps)
    return out if inside or warmup else gated(out, z, gate)
