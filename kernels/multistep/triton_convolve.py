"""The convolution in front of a Mamba-2 layer's decoding step, as one Triton kernel, which puts what it makes into the
ring that the step reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early
from .ring import between_tokens
from .triton_pieces import rotated, softplus

if TYPE_CHECKING:
    from .ring import Rotation


@triton.jit
def _weights(weight_ptr, bias_ptr, channel, there, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bias, then the weights tap by tap."""
    found = (tl.load(bias_ptr + channel, mask=there, other=0.0),)
    for tap in tl.static_range(TAPS):
        found += (tl.load(weight_ptr + channel * TAPS + tap, mask=there, other=0.0),)  # type: ignore[assignment]
    return found


@triton.jit
def _kept(  # type: ignore[no-untyped-def]
    window_ptr, channel, there, start, whole, WINDOW_SLOTS: tl.constexpr, TAPS: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """The inputs before the new ones; with AHEAD all slots of the window."""
    found = ()
    for slot in tl.static_range(WINDOW_SLOTS if AHEAD else TAPS - 1):
        read = slot if AHEAD else (start + (WINDOW_SLOTS - TAPS + 1 + slot)) % WINDOW_SLOTS
        at = window_ptr + read * whole + channel
        found += (tl.load(at, mask=there, other=0.0, cache_modifier=".cg"),)  # type: ignore[assignment]
    return found


@triton.jit
def _before(kept, start, WINDOW_SLOTS: tl.constexpr, TAPS: tl.constexpr, AHEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inputs before the new ones."""
    found = kept
    if AHEAD:
        found = ()
        for tap in tl.static_range(TAPS - 1):
            wanted = (start + (WINDOW_SLOTS - TAPS + 1 + tap)) % WINDOW_SLOTS
            u = kept[0]
            for slot in tl.static_range(1, WINDOW_SLOTS):
                u = tl.where(wanted == slot, kept[slot], u)
            found += (u,)
    return found


@triton.jit
def _given(u_ptr, channel, there, u_row, FIRST: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The new inputs from token FIRST on."""
    found = ()
    for t in tl.static_range(TOKENS):
        found += (tl.load(u_ptr + (FIRST + t) * u_row + channel, mask=there, other=0.0),)  # type: ignore[assignment]
    return found


@triton.jit
def _angles(place, there, start, POSITIONS, SIZE: tl.constexpr, FIRST: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """cos and sin of the new tokens from token FIRST on; what is not there is not rotated."""
    found = ()
    for t in tl.static_range(TOKENS):
        at = place + tl.minimum(start + FIRST + t, POSITIONS - 1) * (2 * SIZE)
        cos = tl.load(at, mask=there, other=1.0, cache_modifier=".cg")
        found += (cos, tl.load(at + SIZE, mask=there, other=0.0, cache_modifier=".cg"))  # type: ignore[assignment]
    return found


@triton.jit
def _convolved(inputs, weights, TAPS: tl.constexpr, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token."""
    total = weights[0]
    for tap in tl.static_range(TAPS):
        total += inputs[tap].to(tl.float32) * weights[1 + tap]
    if SILU:
        total = total * tl.sigmoid(total)
    return total


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    u_ptr, weight_ptr, bias_ptr, dt_bias_ptr, window_ptr, ring_ptr, left_ptr, dt_ptr, start_ptr, rotary_ptr,
    u_row, CHANNELS, KEPT, HEADS, POSITIONS, UNTURNED, SIZE: tl.constexpr,
    WINDOW_SLOTS: tl.constexpr, SLOTS: tl.constexpr, COUNT: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK: tl.constexpr, H: tl.constexpr, AT_ONCE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK channels of all new tokens of a row; the last ones have the step sizes of H heads.

    What it reads of the window lies in slots that no new input goes to. With AHEAD all of these slots are read before
    it is known which. AT_ONCE tokens are read before the first of them is worked on. Where B and C are rotated, for
    each of their channels the one that it is mixed with is convolved too: it may belong to another program.
    """
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + row, cache_modifier=".cg")
    parts = tl.cdiv(CHANNELS, BLOCK)
    whole = CHANNELS + HEADS
    u_ptr += row * COUNT * u_row
    window_ptr += row * WINDOW_SLOTS * whole
    dt_ptr += row * SLOTS * HEADS
    ring_ptr += row * SLOTS * KEPT
    left_ptr += row * COUNT * (CHANNELS - KEPT)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    there = channel < CHANNELS
    weights = _weights(weight_ptr, bias_ptr, channel, there, TAPS)
    kept = _kept(window_ptr, channel, there, start, whole, WINDOW_SLOTS, TAPS, AHEAD)
    if rotary_ptr is not None:
        half: tl.constexpr = SIZE // 2
        place = (channel - UNTURNED) % SIZE
        turned = there & (channel >= UNTURNED)
        other = tl.where(place < half, channel + half, channel - half)
        other_weights = _weights(weight_ptr, bias_ptr, other, turned, TAPS)
        other_kept = _kept(window_ptr, other, turned, start, whole, WINDOW_SLOTS, TAPS, AHEAD)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if part < parts:
        given = _given(u_ptr, channel, there, u_row, 0, min(AT_ONCE, COUNT))
        if rotary_ptr is not None:
            other_given = _given(u_ptr, other, turned, u_row, 0, min(AT_ONCE, COUNT))
            angles = _angles(rotary_ptr + place, turned, start, POSITIONS, SIZE, 0, min(AT_ONCE, COUNT))
            other_before = _before(other_kept, start, WINDOW_SLOTS, TAPS, AHEAD)
        before = _before(kept, start, WINDOW_SLOTS, TAPS, AHEAD)
        for t in tl.static_range(COUNT):
            if t % AT_ONCE == 0 and t > 0:
                given = _given(u_ptr, channel, there, u_row, t, min(AT_ONCE, COUNT - t))
                if rotary_ptr is not None:
                    other_given = _given(u_ptr, other, turned, u_row, t, min(AT_ONCE, COUNT - t))
                    angles = _angles(rotary_ptr + place, turned, start, POSITIONS, SIZE, t, min(AT_ONCE, COUNT - t))
            u = given[t % AT_ONCE]
            before += (u,)
            total = _convolved(before, weights, TAPS, SILU).to(ring_ptr.dtype.element_ty)
            before = before[1:]
            if rotary_ptr is not None:
                other_before += (other_given[t % AT_ONCE],)
                mixed = _convolved(other_before, other_weights, TAPS, SILU).to(ring_ptr.dtype.element_ty)
                other_before = other_before[1:]
                cos = angles[2 * (t % AT_ONCE)].to(tl.float32)
                sin = angles[2 * (t % AT_ONCE) + 1].to(tl.float32)
                total = rotated(total, mixed, cos, tl.where(place < half, -sin, sin))
            tl.store(ring_ptr + (start + t) % SLOTS * KEPT + channel, total, mask=channel < KEPT)
            tl.store(left_ptr + t * (CHANNELS - KEPT) + channel - KEPT, total, mask=there & (channel >= KEPT))
            tl.store(window_ptr + (start + t) % WINDOW_SLOTS * whole + channel, u, mask=there)
    else:
        head = (part - parts) * H + tl.arange(0, H)
        known = head < HEADS
        dt_bias = tl.load(dt_bias_ptr + head, mask=known, other=0.0)
        later = tl.arange(0, AT_ONCE)[:, None]
        for first in tl.static_range(0, COUNT, AT_ONCE):
            new = (first + later < COUNT) & known[None, :]
            raw = tl.load(u_ptr + (first + later) * u_row + CHANNELS + head[None, :], mask=new, other=0.0)
            to = start + first + later
            tl.store(window_ptr + to % WINDOW_SLOTS * whole + CHANNELS + head[None, :], raw, mask=new)
            steps = softplus(raw.to(tl.float32) + dt_bias[None, :])
            tl.store(dt_ptr + to % SLOTS * HEADS + head[None, :], steps, mask=new)


class Cut(NamedTuple):
    """How a call of `convolve` is cut up."""

    block: int
    """Channels of a program."""
    warps: int
    ahead: bool
    """The whole window is read, so that nothing waits for the cursor."""


CUTS = tuple(Cut(32 * each * warps, warps, ahead) for ahead in (True, False) for warps in (1, 4) for each in (1, 2, 4))
FEW, MANY = Cut(64, 1, True), Cut(256, 4, False)
"""Of few rows and of many, as long as nothing else was measured."""
AHEAD = 16
"""The most slots of a window that is read whole."""


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
    rotation: Rotation | None = None,
    cut: Cut | None = None,
    warmup: bool = False,
) -> Tensor:
    """Shapes as in `ring`. With `warmup` the kernel is only compiled."""
    batch, count = u.shape[:2]
    channels, kept, heads = weight.shape[0], ring.shape[2], dt.shape[2]
    left = torch.empty(batch, count, channels - kept, dtype=ring.dtype, device=ring.device)
    block, warps, ahead = cut or (FEW if batch <= 8 else MANY)
    table, unturned = (None, None) if rotation is None else (rotation.table, rotation.unturned)
    with torch.cuda.device_of(u):
        _convolve.run(
            u, weight, bias, dt_bias, window, ring, left, dt, start, table, between_tokens(u), channels, kept, heads,
            None if table is None else len(table), unturned, SIZE=0 if table is None else table.shape[2],
            WINDOW_SLOTS=window.shape[1], SLOTS=ring.shape[1], COUNT=count, TAPS=weight.shape[1], SILU=silu,
            BLOCK=block, H=8 * warps, AT_ONCE=min(16 if table is None else 8, triton.next_power_of_2(count)),
            AHEAD=ahead and window.shape[1] <= AHEAD, num_warps=warps,
            grid=(triton.cdiv(channels, block) + triton.cdiv(heads, 8 * warps), batch), warmup=warmup, **begun_early(u),
        )  # fmt: skip
    return left
