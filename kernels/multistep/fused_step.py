"""All that a Mamba-2 layer does with a few tokens between its two projections, as one Triton kernel where that serves:
the convolution, the steps over a ring, the gate, and the norm where a program has all that it is over.

Where it does not, or is slower, the same is done by one kernel after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..few_rows import Unscaled
from ..gated_norm import gated_norm, silu_gated
from ..support import Support, chosen, kernel
from .ring import Plan, Ring, Rotation, convolve, convolve_supports, ring_multistep
from .ring import supports as steps_support

MODULE = f"{__package__}.triton2_fused"
TAPS = 8
"""The most of a convolution."""
TOKENS = 16
"""The most of a call: all that is convolved is held in registers."""
REPLAY = 32
"""The most tokens of a replay, which are one tile."""


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before the steps of a layer, as `ring.convolve` has it."""

    weight: Tensor
    """[E, W]."""
    bias: Tensor
    """[E]."""
    dt_bias: Tensor
    """[H]."""
    window: Tensor
    """[B, S', E + H]."""
    kept: Tensor
    """[B, S, E'], the ring's x and B."""
    silu: bool
    taps: Tensor
    """`tap_by_tap`."""
    rotation: Rotation | None = None
    """Of B and C, where they are rotated."""


def tap_by_tap(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """[W + 1, E]: weight [E, W] of every tap and the bias [E], in the dtype of what is convolved, in which the weights
    of a model are anyway."""
    return torch.cat((weight.T, bias.unsqueeze(0))).to(dtype)


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate behind the steps, and its norm as `gated_norm` has it."""

    weight: Tensor | None
    """[H P], of the norm; None where there is none."""
    bias: Tensor | None
    """[H P], of the gate."""
    width: int = 0
    """Of the norm."""
    eps: float = 0.0
    left: bool = False
    """The division by the root mean square may be left to the product behind. The norm is over all of a row then."""


def supports(u: Tensor, z: Tensor, front: Front, ring: Ring, state: Tensor, plan: Plan, gate: Gate) -> Support:
    """Whether one kernel makes these steps, faster than one after the other."""
    support = convolve_supports(u, front.weight, front.window, front.kept, ring.dt, front.rotation)
    if not support:
        return support
    support = steps_support(ring, ring.B, state, plan)
    if not support:
        return support
    taps, slots = front.weight.shape[1], front.window.shape[1]
    if taps > TAPS:
        return Support.no(f"the kernel has convolutions of up to {TAPS} taps, not {taps}")
    if plan.count > TOKENS or plan.replay > REPLAY:
        return Support.no(f"the kernel has calls of up to {TOKENS} tokens and replays of up to {REPLAY}")
    if slots < plan.count + taps - 1 or ring.dt.shape[1] < plan.replay + plan.count:
        return Support.no("the kernel reads no slot that it writes")
    if not z.dtype == u.dtype == front.taps.dtype or z.stride(1) != 1 or state.dtype != front.weight.dtype:
        return Support.no("the kernel takes inputs and gate in one dtype, weights in fp32")
    if gate.width % state.shape[2]:
        return Support.no("the kernel norms whole heads")
    if gate.left and gate.width != z.shape[1]:
        return Support.no("the product behind divides whole rows")
    if not kernel(MODULE, "faster")(u, z, front, ring, state, plan, gate):
        return Support.no(f"separate kernels are faster for {u.shape[0]} rows of {plan.count} tokens")
    return support


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
) -> Tensor | Unscaled:
    """T tokens from `start` int32 [B].

    u [B, T, E + H]: the convolution's inputs and dt, z [B * T, H P] the gate's; both are rows of one projection. The
    rest is as `convolve` and `ring_multistep` have it. Returns [B * T, H P], gated and normed, and where the gate
    allows it `Unscaled`.
    """
    given = u, z, front, ring, A, D, state, start, saved, plan, gate
    if chosen("fused_step", supports(u, z, front, ring, state, plan, gate)):
        out: Tensor | Unscaled = kernel(MODULE, "fused_step")(*given)
        return out
    return separate_step(*given)


def separate_step(
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
) -> Tensor:
    """The same by one kernel after the other."""
    made = front.window, front.kept, ring.dt
    C = convolve(u, front.weight, front.bias, front.dt_bias, *made, start, front.silu, front.rotation)
    y = ring_multistep(ring, C.unflatten(2, (-1, state.shape[3])), A, D, state, start, saved, plan)
    return gated(y.reshape(z.shape), z, gate)


def gated(y: Tensor, z: Tensor, gate: Gate) -> Tensor:
    """y [..., H P] behind the gate and its norm, in the dtype of z [..., H P]."""
    if gate.weight is not None:
        return gated_norm(y, z, gate.weight, gate.bias, gate.width, gate.eps)
    return silu_gated(y, z, gate.bias).to(z.dtype)
