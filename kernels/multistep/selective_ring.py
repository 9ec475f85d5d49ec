"""The decoding step of a Mamba-1 layer over a ring of its projections, by a Triton kernel where it serves.

A layer keeps a checkpoint of its state and, in a ring, what the input projections made of the tokens since then: x
before the convolution, B behind its rotation, if there is one, and dt before softplus. Position p lies in slot p mod S.
Each channel has a convolution and step sizes of its own, so that a replay makes them again from little;
docs/decoding-kernels.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv.reference import conv_few
from ..support import Support, chosen, installed, kernel, served
from .ring import DTYPES, LONGEST, Plan, between_tokens, turned
from .selective import selective_multistep

MODULE = f"{__package__}.triton1"
WIDEST = 16
"""States of a channel: a thread holds them in registers."""


@dataclass(frozen=True, slots=True)
class Channels:
    """What is the same for all tokens of a layer, fp32 or fp64."""

    A: Tensor
    """[D, N], negative."""
    D: Tensor
    """[D]."""
    dt_bias: Tensor
    """[D], added to dt before softplus."""
    weight: Tensor
    """[D, W], of the convolution."""
    bias: Tensor
    """[D], of the convolution."""
    silu: bool
    """Whether SiLU stands behind the convolution."""
    gate_bias: Tensor | None = None
    """[D], added to z."""
    repeat: int = 1
    """Channels that share an x and its B: `span` side by side do not, and then the same `span` come again."""
    span: int = 1

    @property
    def sources(self) -> int:
        """X, the channels that x has."""
        return self.A.shape[0] // self.repeat

    def source(self) -> Tensor:
        """int64 [D]: which x each channel reads."""
        channel = torch.arange(self.A.shape[0], device=self.A.device)
        return channel // (self.span * self.repeat) * self.span + channel % self.span


@dataclass(frozen=True, slots=True)
class Projected:
    """T new tokens a row, as the projections made them."""

    x: Tensor
    """[B, T, X]."""
    B: Tensor
    """[B, T, K N]: K groups, each of X / K channels of x side by side."""
    C: Tensor
    """[B, T, K' N]: K' groups, each of D / K' channels side by side."""
    dt: Tensor
    """[B, T, D], before its bias and softplus."""
    z: Tensor | None = None
    """[B, T, D]: y is multiplied by SiLU(z + gate_bias)."""
    rotary: Tensor | None = None
    """[capacity, 2, P]: cos and sin of every position, whose halves are alike, by which each P numbers of B and C are
    rotated first, as Llama rotates queries and keys."""

    def parts(self) -> list[Tensor]:
        return [t for t in (self.x, self.B, self.C, self.dt, self.z) if t is not None]


def selective_ring_supports(like: Tensor, size: int, steps: int) -> Support:
    """Whether layers with `size` states a channel keep a ring for the kernel, in `like`'s dtype and on its device."""
    support = served(like, DTYPES)
    if not support:
        return support
    if size > WIDEST or steps > LONGEST:
        return Support.no(f"the kernel has {WIDEST} states of a channel and calls of up to {LONGEST} tokens")
    return installed("triton")


def supports(new: Projected, layer: Channels, ring: Tensor, state: Tensor) -> Support:
    """Whether `selective_ring_multistep` runs as a kernel."""
    support = selective_ring_supports(new.x, state.shape[2], new.x.shape[1])
    if not support:
        return support
    if any(t.dtype != new.x.dtype for t in (*new.parts(), ring)):
        return Support.no("the kernel takes projections in one dtype")
    exact = layer.A, layer.D, layer.dt_bias, layer.weight, layer.bias, state
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in exact) or not ring.is_contiguous():
        return Support.no("the kernel takes a contiguous ring, and a contiguous state and parameters in fp32")
    if not all(between_tokens(t) for t in new.parts()):
        return Support.no("the kernel takes tokens one behind the other")
    if new.rotary is not None and (new.rotary.dtype != new.x.dtype or not new.rotary.is_contiguous()):
        return Support.no("the kernel takes contiguous cos and sin in the projections' dtype")
    return Support.yes()


def selective_ring_multistep(
    new: Projected, layer: Channels, ring: Tensor, state: Tensor, start: Tensor, saved: Tensor, plan: Plan
) -> Tensor:
    """T tokens at `start` int32 [B], which are added to the ring.

    ring [B, S, X + K N + D] holds x, rotated B and dt of earlier tokens, S >= plan.replay + plan.steps + W - 1; state
    [B, D, N]: the checkpoint at `saved` int32 [B], moved to `start` in the rows that are `plan.due`, of which the
    caller takes note behind its last layer. saved <= start <= saved + plan.replay. Returns y [B, T, D] in x's dtype,
    or better in plain PyTorch.
    """
    if chosen("selective_ring_multistep", supports(new, layer, ring, state)):
        run = kernel(MODULE, "selective_ring_multistep")
        y: Tensor = run(new, layer, ring, state, start, saved, plan)
        return y
    return plain_selective_ring_multistep(new, layer, ring, state, start, saved, plan)


def plain_selective_ring_multistep(
    new: Projected, layer: Channels, ring: Tensor, state: Tensor, start: Tensor, saved: Tensor, plan: Plan
) -> Tensor:
    """The same in PyTorch, on a copy of what it reads."""
    (batch, count), (channels, size), taps = new.x.shape[:2], layer.A.shape, layer.weight.shape[1]
    rows = torch.arange(batch, device=start.device).unsqueeze(1)
    positions = start.long().unsqueeze(1) + torch.arange(1 - taps - plan.replay, count, device=start.device)
    slots = positions % ring.shape[1]
    B, C = new.B, new.C
    if new.rotary is not None:
        B, C = (turned(t, new.rotary, positions[:, -count:]) for t in (B, C))
    ring[rows, slots[:, -count:]] = torch.cat((new.x, B, new.dt), dim=2)
    x, b, raw = ring[rows, slots].split((layer.sources, new.B.shape[2], channels), dim=2)
    gone = (positions[:, taps - 1 :] < saved.unsqueeze(1)).unsqueeze(2)
    source, taken = layer.source(), plan.replay + count
    x = conv_few(x[..., source], layer.weight, layer.bias)
    x = (F.silu(x) if layer.silu else x).masked_fill(gone, 0)
    raw = raw[:, taps - 1 :].to(state.dtype) + layer.dt_bias.to(state.dtype)
    dt = F.softplus(raw).masked_fill(gone, 0)
    b = b[:, taps - 1 :].masked_fill(gone, 0).unflatten(2, (-1, size))
    b = b[:, :, source // (layer.sources // b.shape[2])]
    c = C.unflatten(2, (-1, size))
    c = c.repeat_interleave(channels // c.shape[2], dim=2)
    moved = state.clone()
    y = selective_multistep(x[:, -taken:], dt, layer.A, b, c, layer.D, moved, True)
    torch.where(plan.due(start, saved).view(-1, 1, 1), moved, state, out=state)
    if new.z is None:
        return y
    z = new.z.to(y.dtype)
    return y * F.silu(z if layer.gate_bias is None else z + layer.gate_bias.to(y.dtype))
