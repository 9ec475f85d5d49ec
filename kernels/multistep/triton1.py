"""The decoding step of a Mamba-1 layer, its convolution and its gate, as one Triton kernel.

docs/decoding-kernels.md has the formulas and what the forms cost. A program has the states [BLOCK, N] of some channels
of a row, which it reads once. It runs the replayed tokens, stores the checkpoint where it is due, and runs the new
ones. Nobody else has these channels, so a replay makes their convolution again from what the ring keeps of its inputs.
States are held in PARTS pieces [BLOCK, N / PARTS]: with as many as make pieces of four numbers a thread has whole
channels, and neither sums over states nor what all states of a channel share are divided among threads.
"""

# Triton knows tuples that are added up, not ones that are unpacked; they grow where a loop is unrolled.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

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
from .ring import between_tokens
from .triton_pieces import rotated, softplus

if TYPE_CHECKING:
    from .ring import Plan
    from .selective_ring import Channels, Projected

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pieces(  # type: ignore[no-untyped-def]
    pointers, inside, PARTS: tl.constexpr, Q: tl.constexpr, SIZE: tl.constexpr, CACHE: tl.constexpr
):
    """SIZE numbers of each of `pointers` [BLOCK], as PARTS tiles [BLOCK, Q]."""
    n = tl.arange(0, Q)
    found = ()
    for j in tl.static_range(PARTS):
        there = inside[:, None]
        if PARTS * Q > SIZE:
            there = there & (n[None, :] + j * Q < SIZE)
        found = found + (tl.load(pointers[:, None] + j * Q + n[None, :], mask=there, other=0.0, cache_modifier=CACHE),)
    return found


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    place, first, angles, inside, PARTS: tl.constexpr, Q: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr
):
    """`_pieces` at numbers `first` [BLOCK] of `place`, a token's B or C, behind the rotation that mixes the halves of
    each WIDE numbers; `angles` has the cos of its position, then the sin."""
    n = tl.arange(0, Q)
    half: tl.constexpr = WIDE // 2
    found = ()
    for j in tl.static_range(PARTS):
        there = inside[:, None]
        if PARTS * Q > SIZE:
            there = there & (n[None, :] + j * Q < SIZE)
        at = first[:, None] + j * Q + n[None, :]
        within = at % WIDE
        own = tl.load(place + at, mask=there, other=0.0)
        other = tl.load(place + tl.where(within < half, at + half, at - half), mask=there, other=0.0)
        cos = tl.load(angles + within, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
        sin = tl.load(angles + WIDE + within, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
        found = found + (rotated(own, other, cos, tl.where(within < half, -sin, sin)),)
    return found


@triton.jit
def _token(  # type: ignore[no-untyped-def]
    x, window, taps, bias, raw, step, decays, states, inputs,
    TAPS: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One token: the convolution of x [BLOCK] behind its window, dt, and the states after it."""
    total = bias
    for tap in tl.static_range(TAPS - 1):
        total += window[tap] * taps[tap]
    total += x * taps[TAPS - 1]
    if SILU:
        total = total * tl.sigmoid(total)
    dt = softplus(raw.to(tl.float32) + step)
    added = dt * total
    after = ()
    for j in tl.static_range(PARTS):
        after = after + (states[j] * tl.exp2(dt[:, None] * decays[j]) + added[:, None] * inputs[j].to(tl.float32),)
    return total, after


@triton.jit
def _selective(  # type: ignore[no-untyped-def]
    x_ptr, b_ptr, c_ptr, raw_ptr, z_ptr, ring_ptr, state_ptr, start_ptr, saved_ptr, y_ptr,
    taps_ptr, bias_ptr, step_ptr, decay_ptr, skip_ptr, gate_ptr, rotary_ptr,
    x_token, b_token, c_token, raw_token, z_token, SLOTS, STEPS, REPLAY, POSITIONS,
    CHANNELS: tl.constexpr, SOURCES: tl.constexpr, NUMBERS: tl.constexpr, SPAN: tl.constexpr, REPEAT: tl.constexpr,
    GROUP: tl.constexpr, C_GROUP: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, SETTLE: tl.constexpr,
    TAPS: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, OPEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, Q: tl.constexpr, COPY: tl.constexpr, T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs behind those of the channels copy what new tokens leave in the ring: nobody reads it in this call.

    Old tokens are replayed while the kernel before, which brings the new ones, may still run: they are read from the L2
    cache, since nothing has yet made a processor's own let go of what earlier calls read. The next token is always
    fetched before one is worked on; behind the last one that is any, and not used.
    """
    parts: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    kept: tl.constexpr = SOURCES + NUMBERS + CHANNELS
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + row, cache_modifier=".cg")
    ring_ptr += row * SLOTS * kept
    x_ptr += row * COUNT * x_token
    b_ptr += row * COUNT * b_token
    raw_ptr += row * COUNT * raw_token
    if part < parts:
        d = part * BLOCK + tl.arange(0, BLOCK)
        there = tl.full([BLOCK], 1, tl.int1) if CHANNELS % BLOCK == 0 else d < CHANNELS
        source = d // (SPAN * REPEAT) * SPAN + d % SPAN
        group = source // GROUP * SIZE
        states_at = state_ptr + (row * CHANNELS + d) * SIZE
        states = _pieces(states_at, there, PARTS, Q, SIZE, ".cg")
        saved = tl.load(saved_ptr + row, cache_modifier=".cg")
        replayed = start - saved

        slot = saved % SLOTS
        slot_at = ring_ptr + slot * kept
        old_x = tl.load(slot_at + source, mask=there, cache_modifier=".cg")
        old_raw = tl.load(slot_at + SOURCES + NUMBERS + d, mask=there, cache_modifier=".cg")
        old_b = _pieces(slot_at + SOURCES + group, there, PARTS, Q, SIZE, ".cg")
        window = ()
        for tap in tl.static_range(TAPS - 1):
            before = (saved - (TAPS - 1 - tap) + SLOTS) % SLOTS
            old = tl.load(ring_ptr + before * kept + source, mask=there, cache_modifier=".cg")
            window = window + (old.to(tl.float32),)
        taps = ()
        for tap in tl.static_range(TAPS):
            taps = taps + (tl.load(taps_ptr + d * TAPS + tap, mask=there),)
        bias = tl.load(bias_ptr + d, mask=there)
        step = tl.load(step_ptr + d, mask=there)
        rates = _pieces(decay_ptr + d * SIZE, there, PARTS, Q, SIZE, "")
        decays = ()
        for j in tl.static_range(PARTS):
            decays = decays + (rates[j] * LOG2E,)

        for _ in range(replayed):
            now, now_raw, now_b = old_x.to(tl.float32), old_raw, old_b
            slot = tl.where(slot + 1 == SLOTS, 0, slot + 1)
            slot_at = ring_ptr + slot * kept
            old_x = tl.load(slot_at + source, mask=there, cache_modifier=".cg")
            old_raw = tl.load(slot_at + SOURCES + NUMBERS + d, mask=there, cache_modifier=".cg")
            old_b = _pieces(slot_at + SOURCES + group, there, PARTS, Q, SIZE, ".cg")
            _, states = _token(now, window, taps, bias, now_raw, step, decays, states, now_b, TAPS, PARTS, SILU)
            if TAPS > 1:
                window = window[1:] + (now,)

        skip = tl.load(skip_ptr + d, mask=there)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        gate = tl.load(gate_ptr + d, mask=there) if OPEN else 0.0
        c_at = c_ptr + row * COUNT * c_token + d // C_GROUP * SIZE
        z_at = z_ptr + row * COUNT * z_token + d
        y_at = y_ptr + row * COUNT * CHANNELS + d
        x = tl.load(x_ptr + source, mask=there)
        raw = tl.load(raw_ptr + d, mask=there)
        if rotary_ptr is not None:
            c_group = d // C_GROUP * SIZE
            c_ptr += row * COUNT * c_token
            angles = rotary_ptr + tl.minimum(start, POSITIONS - 1) * (2 * WIDE)
            b = _turned(b_ptr, group, angles, there, PARTS, Q, SIZE, WIDE)
            c = _turned(c_ptr, c_group, angles, there, PARTS, Q, SIZE, WIDE)
        else:
            b = _pieces(b_ptr + group, there, PARTS, Q, SIZE, "")
            c = _pieces(c_at, there, PARTS, Q, SIZE, "")
        z = tl.load(z_at, mask=there) if GATED else x
        if SETTLE:  # noqa: SIM102 - one of the two is known when the kernel is compiled
            if (replayed > 0) & (replayed + STEPS > REPLAY):
                n = tl.arange(0, Q)
                for j in tl.static_range(PARTS):
                    inside = there[:, None]
                    if PARTS * Q > SIZE:
                        inside = inside & (n[None, :] + j * Q < SIZE)
                    tl.store(states_at[:, None] + j * Q + n[None, :], states[j], mask=inside)

        for t in range(COUNT):
            now, now_raw, now_b, now_c, now_z = x.to(tl.float32), raw, b, c, z
            after = tl.minimum(t + 1, COUNT - 1)
            x = tl.load(x_ptr + after * x_token + source, mask=there)
            raw = tl.load(raw_ptr + after * raw_token + d, mask=there)
            if rotary_ptr is not None:
                angles = rotary_ptr + tl.minimum(start + after, POSITIONS - 1) * (2 * WIDE)
                b = _turned(b_ptr + after * b_token, group, angles, there, PARTS, Q, SIZE, WIDE)
                c = _turned(c_ptr + after * c_token, c_group, angles, there, PARTS, Q, SIZE, WIDE)
            else:
                b = _pieces(b_ptr + after * b_token + group, there, PARTS, Q, SIZE, "")
                c = _pieces(c_at + after * c_token, there, PARTS, Q, SIZE, "")
            z = tl.load(z_at + after * z_token, mask=there) if GATED else x
            total, states = _token(now, window, taps, bias, now_raw, step, decays, states, now_b, TAPS, PARTS, SILU)
            if TAPS > 1:
                window = window[1:] + (now,)
            seen = states[0] * now_c[0].to(tl.float32)
            for j in tl.static_range(1, PARTS):
                seen += states[j] * now_c[j].to(tl.float32)
            y = tl.sum(seen, axis=1) + skip * total
            if GATED:
                opened = now_z.to(tl.float32) + gate
                y = y * opened * tl.sigmoid(opened)
            tl.store(y_at + t * CHANNELS, y.to(y_ptr.dtype.element_ty), mask=there)
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        column = ((part - parts) * COPY + tl.arange(0, COPY))[None, :]
        new = tl.arange(0, T)[:, None]
        of_x, of_raw = column < SOURCES, column >= SOURCES + NUMBERS
        inside = (new < COUNT) & (column < kept)
        first = tl.load(x_ptr + new * x_token + column, mask=inside & of_x, other=0.0)
        second = b_ptr + new * b_token + column - SOURCES
        of_b = inside & (column >= SOURCES) & (column < SOURCES + NUMBERS)
        if rotary_ptr is not None:
            within = (column - SOURCES) % WIDE
            low = within < WIDE // 2
            other = tl.load(second + tl.where(low, WIDE // 2, -(WIDE // 2)), mask=of_b, other=0.0)
            angle = rotary_ptr + tl.minimum(start + new, POSITIONS - 1) * (2 * WIDE) + within
            cos = tl.load(angle, mask=of_b, other=0.0, cache_modifier=".cg").to(tl.float32)
            sin = tl.load(angle + WIDE, mask=of_b, other=0.0, cache_modifier=".cg").to(tl.float32)
            first += rotated(tl.load(second, mask=of_b, other=0.0), other, cos, tl.where(low, -sin, sin))
        else:
            first += tl.load(second, mask=of_b, other=0.0)
        third = raw_ptr + new * raw_token + column - SOURCES - NUMBERS
        first += tl.load(third, mask=inside & of_raw, other=0.0)
        tl.store(ring_ptr + (start + new) % SLOTS * kept + column, first, mask=inside)


class Form(NamedTuple):
    """How a call is cut up. None changes a result by more than the order of its sums."""

    block: int
    """Channels of a program."""
    warps: int
    parts: int
    """Pieces of a channel's states. Fewer of them leave more to do side by side: for few rows."""


FORMS = (Form(32, 4, 1), Form(32, 2, 2), Form(64, 4, 2), Form(32, 1, 4), Form(64, 2, 4), Form(128, 4, 4))
COPIED, TURNED = 2048, 512
"""Numbers of new tokens that a warp copies into the ring, and where it rotates B, which takes more registers."""

_best: dict[tuple[Any, ...], Form] = {}


def forms_for(state: Tensor) -> list[Form]:
    """Those with no more pieces than there are states."""
    return [form for form in FORMS if form.parts <= triton.next_power_of_2(state.shape[2])]


def form_for(new: Projected, layer: Channels, ring: Tensor, state: Tensor, plan: Plan) -> Form:
    """The fastest where memory is large enough for that to matter and can be measured now, else one that keeps a GPU
    busy."""
    read = *ring.shape[1:], new.C.shape[2], layer.repeat, new.z is None, new.rotary is None
    kind = *state.shape, *read, plan, new.x.dtype, state.device
    if kind not in _best and measurable(state, MEASURED):
        _best[kind] = settled(kind, forms_for(state), partial(tune, new, layer, ring, state, plan), FORMS[0])
    return _best.get(kind, FORMS[0])


def tune(new: Projected, layer: Channels, ring: Tensor, state: Tensor, plan: Plan) -> Form:
    """Times every form on memory of its own."""
    scratch = torch.zeros_like(ring)

    def run(form: Form, checkpoint: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> Tensor:
        return selective_ring_multistep(new, layer, scratch, checkpoint, start, saved, plan, form, warmup)

    return fastest(forms_for(state), state, plan, run)


def selective_ring_multistep(
    new: Projected,
    layer: Channels,
    ring: Tensor,
    state: Tensor,
    start: Tensor,
    saved: Tensor,
    plan: Plan,
    form: Form | None = None,
    warmup: bool = False,
    early: bool | None = None,
) -> Tensor:
    """Shapes as in `selective_ring`; y [B, T, D] in x's dtype. With `warmup` the kernel is only compiled. `early`
    (default: where the GPU can): it may begin before the one before has ended, which then must not be a step of the
    same layer."""
    batch, channels, size = state.shape
    form = form or form_for(new, layer, ring, state, plan)
    y = torch.empty(batch, plan.count, channels, dtype=new.x.dtype, device=state.device)
    numbers, wide, tile = new.B.shape[2], triton.next_power_of_2(size), triton.next_power_of_2(plan.count)
    copy = max(32, (COPIED if new.rotary is None else TURNED) * form.warps // tile)
    programs = triton.cdiv(channels, form.block) + triton.cdiv(ring.shape[2], copy)
    z = new.x if new.z is None else new.z
    gate = layer.D if layer.gate_bias is None else layer.gate_bias
    with torch.cuda.device_of(state):
        _selective.run(
            new.x, new.B, new.C, new.dt, z, ring, state, start, saved, y,
            layer.weight, layer.bias, layer.dt_bias, layer.A, layer.D, gate, new.rotary,
            *(between_tokens(t) for t in (new.x, new.B, new.C, new.dt, z)), ring.shape[1], plan.steps, plan.replay,
            None if new.rotary is None else len(new.rotary),
            CHANNELS=channels, SOURCES=layer.sources, NUMBERS=numbers, SPAN=layer.span, REPEAT=layer.repeat,
            GROUP=layer.sources * size // numbers, C_GROUP=channels * size // new.C.shape[2], SIZE=size,
            COUNT=plan.count, SETTLE=plan.settle, TAPS=layer.weight.shape[1], SILU=layer.silu,
            GATED=new.z is not None, OPEN=layer.gate_bias is not None,
            WIDE=0 if new.rotary is None else new.rotary.shape[2], BLOCK=form.block, PARTS=form.parts,
            Q=wide // form.parts, COPY=copy, T=tile, num_warps=form.warps, grid=(programs, batch), warmup=warmup,
            **begun_early(state, early),
        )  # fmt: skip
    return y
