"""What the fused step of a Mamba-2 layer is put together from: the convolution of new tokens in registers, and sums
over them."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_pieces import after, exp, rotated, taken, times


@triton.jit
def inner_products(c, b, PIECES: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products [T, M] of rows of c [T, N] and b [M, N], of the ring or fp32."""
    if b.dtype == tl.float32 or EXACT:  # noqa: SIM108 - Triton types both ways of an expression
        out = taken(c, tl.trans(b).to(tl.float32), PIECES)
    else:
        out = tl.dot(c, tl.trans(b))
    return out


@triton.jit
def summed_tokens(mixing, x, T: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """mixing fp32 [T, M] times x [M, P], of the ring. Fewer than 16 of M = T are padded."""
    if mixing.shape[1] < 16:
        each: tl.constexpr = 16 // T
        for _ in tl.static_range(each.bit_length() - 1):
            mixing = tl.join(mixing, tl.zeros_like(mixing)).permute(0, 2, 1).reshape(T, 2 * mixing.shape[1])
            x = tl.join(x, tl.zeros_like(x)).permute(2, 0, 1).reshape(2 * x.shape[0], x.shape[1])
    return times(mixing, x, 0 if EXACT else 2)


@triton.jit
def tap_weights(taps_ptr, channel, there, CHANNELS: tl.constexpr, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the convolution: tap by tap, then the bias."""
    found = ()
    for tap in tl.static_range(TAPS + 1):
        one = tl.load(taps_ptr + tap * CHANNELS + channel, mask=there, other=0.0)
        found = found + (one,)  # type: ignore[assignment]  # noqa: RUF005 - what Triton reads
    return found


@triton.jit
def window_inputs(  # type: ignore[no-untyped-def]
    place, there, t, start, ENTRIES: tl.constexpr, WINDOW_SLOTS: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """What the convolution of tokens t reads of earlier tokens, tap by tap, from slots of `place`."""
    found = ()
    for tap in tl.static_range(TAPS - 1):
        at = t + (tap + 1 - TAPS)
        slot = (start + at + WINDOW_SLOTS) % WINDOW_SLOTS
        u = tl.load(place + slot * ENTRIES, mask=there & (at < 0), other=0.0, cache_modifier=".cg")
        found = found + (u,)  # type: ignore[assignment]  # noqa: RUF005 - what Triton reads
    return found


@triton.jit
def own_inputs(place, there, t, U_TOKEN: tl.constexpr, COUNT: tl.constexpr, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What it reads of new tokens, where `place` has each token's own. The first has none but that."""
    found = ()
    for tap in tl.static_range(max(TAPS - COUNT, 0), TAPS):
        u = tl.load(place + (tap + 1 - TAPS) * U_TOKEN, mask=there & (t + (tap + 1 - TAPS) >= 0), other=0.0)
        found = found + (u,)  # type: ignore[assignment]  # noqa: RUF005 - what Triton reads
    return found


@triton.jit
def joined_inputs(window, own, t, COUNT: tl.constexpr, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both: all that the convolution reads."""
    found = ()
    first: tl.constexpr = max(TAPS - COUNT, 0)
    for tap in tl.static_range(TAPS):
        if tap < first:
            u = window[tap]
        elif tap < TAPS - 1:
            u = tl.where(t + (tap + 1 - TAPS) < 0, window[tap], own[tap - first])
        else:
            u = own[tap - first]
        found = found + (u,)  # type: ignore[assignment]  # noqa: RUF005 - what Triton reads
    return found


@triton.jit
def convolved_tokens(inputs, weights, replayed, TAPS: tl.constexpr, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounded as the ring rounds it."""
    total = weights[TAPS].to(tl.float32)
    for tap in tl.static_range(TAPS):
        total = total + inputs[tap].to(tl.float32) * weights[tap].to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    return after(total.to(inputs[0].dtype), replayed)


@triton.jit
def mixed_with(n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a rotation mixes numbers n of a group with: as far into its other half, so that they lie side by side."""
    half: tl.constexpr = SIZE // 2
    run: tl.constexpr = half & -half
    return tl.max_contiguous(tl.multiple_of(tl.where(n < half, n + half, n - half), run), run)


@triton.jit
def angles(rotary_ptr, position, POSITIONS, n, there, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """cos and sin as `rotated` takes them."""
    at = rotary_ptr + tl.minimum(position, POSITIONS - 1) * (2 * SIZE) + n
    cos = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    return cos, tl.load(at + SIZE, mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def rotated_tokens(own, inputs, weights, turn, n, replayed, TAPS: tl.constexpr, SILU: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """B or C behind the convolution, rotated: `own`, and the same `inputs` and `weights` of what that is mixed with."""
    sin = turn[1].to(tl.float32)
    sin = tl.where(n < SIZE // 2, -sin, sin)
    return after(
        rotated(own, convolved_tokens(inputs, weights, replayed, TAPS, SILU), turn[0].to(tl.float32), sin), replayed
    )


@triton.jit
def held_back(x, arrived):  # type: ignore[no-untyped-def]
    """x, but nothing is made of it before the number `arrived` is there, which is never NaN where the result matters:
    or it would be waited for ahead of what is loaded beside that number."""
    return tl.where(arrived == arrived, x, float("nan"))


@triton.jit
def decayed_by(dt, decay):  # type: ignore[no-untyped-def]
    """Of replayed tokens counted back, with dt 0 where there is none: what weighs each at `start`, and what the
    checkpoint."""
    steps = dt * decay
    return exp(tl.cumsum(steps, axis=0) - steps) * dt, exp(tl.sum(steps, axis=0))
