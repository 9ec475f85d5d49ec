"""The other way to take tokens back: a state for every token that may go. A call replays nothing and writes T states,
where a checkpoint and a ring of inputs write one, or none. It is what the ring is compared with.

Row b's state before position p lies in slot p mod S of states [B, S, …], S one more than the tokens that may go. A call
at `start` reads the slot of `start` and writes those of start + 1 … start + T: none that it reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, chosen, installed, kernel, served
from .ring import LONGEST, WIDEST, Ring

MODULE = f"{__package__}.triton_snapshot"


def snapshot_multistep(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor, start: Tensor
) -> Tensor:
    """T tokens of a Mamba-2 layer from `start` int32 [B] on. x [B, T, G, P], dt [B, T, H] (after softplus), A [H]
    (negative), B [B, T, G, N], C [B, T, H, N], D [H], states [B, S, H, P, N] fp32 or fp64. Head h reads group
    h // (H / G). Returns y [B, T, H, P] in the states' dtype."""
    heads, kind = states.shape[2], states.dtype
    x, B = (t.to(kind).repeat_interleave(heads // t.shape[2], dim=2) for t in (x, B))
    dt, C = dt.to(kind), C.to(kind)
    row, now = torch.arange(len(start), device=start.device), _before(states, start)
    outputs = []
    for t in range(x.shape[1]):
        inputs = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        now = torch.addcmul(inputs, now, torch.exp(dt[:, t] * A.to(kind))[..., None, None])
        states[row, (start + t + 1) % states.shape[1]] = now
        outputs.append((now @ C[:, t].unsqueeze(-1)).squeeze(-1) + D.to(kind).unsqueeze(-1) * x[:, t])
    return torch.stack(outputs, dim=1)


def selective_snapshot_multistep(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor, start: Tensor
) -> Tensor:
    """The same of a Mamba-1 layer: x and dt [B, T, D], A [D, N], B and C [B, T, K, N], D [D], states [B, S, D, N].
    Channel d reads group d // (D / K). Returns y [B, T, D] in the states' dtype."""
    kind, channels = states.dtype, A.shape[0]
    x, dt, A = x.to(kind), dt.to(kind), A.to(kind)
    B, C = (t.to(kind).repeat_interleave(channels // t.shape[2], dim=2) for t in (B, C))
    row, now = torch.arange(len(start), device=start.device), _before(states, start)
    outputs = []
    for t in range(x.shape[1]):
        inputs = (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t]
        now = torch.addcmul(inputs, now, torch.exp(dt[:, t].unsqueeze(-1) * A))
        states[row, (start + t + 1) % states.shape[1]] = now
        outputs.append((now * C[:, t]).sum(-1) + D.to(kind) * x[:, t])
    return torch.stack(outputs, dim=1)


def supports(ring: Ring, C: Tensor, states: Tensor) -> Support:
    """Whether `snapshot_ring_multistep` runs as a kernel."""
    support = served(ring.x, (torch.bfloat16, torch.float32))
    if not support:
        return support
    if states.dtype != torch.float32 or not states.is_contiguous():
        return Support.no("the kernel takes contiguous states in fp32")
    if max(states.shape[3:]) > WIDEST or C.shape[1] > LONGEST:
        return Support.no(f"the kernel has states of up to {WIDEST} and calls of up to {LONGEST} tokens")
    if any(t.stride(3) != 1 or t.stride(2) != t.shape[3] for t in (ring.x, ring.B, C)) or ring.dt.stride(2) != 1:
        return Support.no("the kernel takes a token's numbers side by side")
    return installed("triton")


def snapshot_ring_multistep(ring: Ring, C: Tensor, A: Tensor, D: Tensor, states: Tensor, start: Tensor) -> Tensor:
    """`snapshot_multistep` of T tokens that are in a ring already, position p in slot p mod its slots, at least T.
    C [B, T, G'', N], of which each group serves an equal number of heads. Returns y [B, T, H, P] in x's dtype, or
    better in plain PyTorch."""
    if chosen("snapshot_multistep", supports(ring, C, states)):
        y: Tensor = kernel(MODULE, "snapshot_multistep")(ring.x, ring.B, ring.dt, C, A, D, states, start)
        return y
    positions = start.long().unsqueeze(1) + torch.arange(C.shape[1], device=start.device)
    taken = torch.arange(len(start), device=start.device).unsqueeze(1), positions % ring.dt.shape[1]
    x, B, dt = (t[taken] for t in ring.parts())
    C = C.repeat_interleave(states.shape[2] // C.shape[2], dim=2)
    return snapshot_multistep(x, dt, A, B, C, D, states, start)


def _before(states: Tensor, start: Tensor) -> Tensor:
    return states[torch.arange(len(start), device=start.device), start % states.shape[1]]
