"""The convolution in front of a Mamba-2 layer's decoding step, as one Triton kernel, which puts what it makes into the
ring that the step reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early
from .ring import between_tokens
from .triton_pieces import softplus


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    u_ptr, weight_ptr, bias_ptr, dt_bias_ptr, window_ptr, ring_ptr, left_ptr, dt_ptr, start_ptr,
    u_row, CHANNELS, KEPT, HEADS,
    WINDOW_SLOTS: tl.constexpr, SLOTS: tl.constexpr, COUNT: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK: tl.constexpr, H: tl.constexpr, AT_ONCE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK channels of all new tokens of a row; the last ones have the step sizes of H heads.

    What it reads of the window lies in slots that no new input goes to. With AHEAD all of these slots are read before
    it is known which. AT_ONCE tokens are read before the first of them is worked on.
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
    bias = tl.load(bias_ptr + channel, mask=there, other=0.0)
    weights = ()
    for tap in tl.static_range(TAPS):
        weights += (tl.load(weight_ptr + channel * TAPS + tap, mask=there, other=0.0),)  # type: ignore[assignment]
    kept = ()
    for slot in tl.static_range(WINDOW_SLOTS if AHEAD else TAPS - 1):
        read = slot if AHEAD else (start + (WINDOW_SLOTS - TAPS + 1 + slot)) % WINDOW_SLOTS
        at = window_ptr + read * whole + channel
        kept += (tl.load(at, mask=there, other=0.0, cache_modifier=".cg"),)  # type: ignore[assignment]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if part < parts:
        given = ()
        for t in tl.static_range(0, min(AT_ONCE, COUNT)):
            given += (tl.load(u_ptr + t * u_row + channel, mask=there, other=0.0),)  # type: ignore[assignment]
        before = kept
        if AHEAD:
            before = ()
            for tap in tl.static_range(TAPS - 1):
                wanted = (start + (WINDOW_SLOTS - TAPS + 1 + tap)) % WINDOW_SLOTS
                u = kept[0]  # type: ignore[misc]
                for slot in tl.static_range(1, WINDOW_SLOTS):
                    u = tl.where(wanted == slot, kept[slot], u)
                before += (u,)  # type: ignore[assignment]
        for t in tl.static_range(COUNT):
            if t % AT_ONCE == 0 and t > 0:
                given = ()
                for more in tl.static_range(0, min(AT_ONCE, COUNT - t)):
                    given += (tl.load(u_ptr + (t + more) * u_row + channel, mask=there, other=0.0),)  # type: ignore[assignment]
            u = given[t % AT_ONCE]
            before += (u,)  # type: ignore[assignment]
            total = bias
            for tap in tl.static_range(TAPS):
                total += before[tap].to(tl.float32) * weights[tap]
            before = before[1:]
            if SILU:
                total = total * tl.sigmoid(total)
            total = total.to(ring_ptr.dtype.element_ty)
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
    cut: Cut | None = None,
    warmup: bool = False,
) -> Tensor:
    """Shapes as in `ring`. With `warmup` the kernel is only compiled."""
    batch, count = u.shape[:2]
    channels, kept, heads = weight.shape[0], ring.shape[2], dt.shape[2]
    left = torch.empty(batch, count, channels - kept, dtype=ring.dtype, device=ring.device)
    block, warps, ahead = cut or (FEW if batch <= 8 else MANY)
    with torch.cuda.device_of(u):
        _convolve.run(
            u, weight, bias, dt_bias, window, ring, left, dt, start, between_tokens(u), channels, kept, heads,
            WINDOW_SLOTS=window.shape[1], SLOTS=ring.shape[1], COUNT=count, TAPS=weight.shape[1], SILU=silu,
            BLOCK=block, H=8 * warps, AT_ONCE=min(16, triton.next_power_of_2(count)),
            AHEAD=ahead and window.shape[1] <= AHEAD, num_warps=warps,
            grid=(triton.cdiv(channels, block) + triton.cdiv(heads, 8 * warps), batch), warmup=warmup, **begun_early(u),
        )  # fmt: skip
    return left
