"""Several tokens from a state that can be taken back: the decoding step of a Mamba-1 layer, in plain PyTorch.

As in `reference`, with the recurrence of `kernels.selective_scan`: a step size per channel, a decay per channel and
state, and B and C per group of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_multistep_loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, settle: bool
) -> Tensor:
    """Token by token: the truth. Shapes and effects as in `selective_multistep`."""
    kind, channels = state.dtype, A.shape[0]
    count, replayed, now, outputs = C.shape[1], x.shape[1] - C.shape[1], state.clone(), []
    x, dt, A, D = x.to(kind), dt.to(kind), A.to(kind), D.to(kind)
    B, C = (t.to(kind).repeat_interleave(channels // t.shape[2], dim=2) for t in (B, C))
    for t in range(replayed + count):
        if t == replayed and settle:
            state.copy_(now)
        now = torch.exp(dt[:, t, :, None] * A) * now + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t]
        if t >= replayed:
            outputs.append((now * C[:, t - replayed]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, dim=1)


def selective_multistep(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, settle: bool
) -> Tensor:
    """R replayed tokens, then T new ones. A replayed token whose dt is 0 leaves the state as it is.

    x and dt [B, R + T, D] (dt after softplus), A [D, N] (negative), B [B, R + T, K, N], C [B, T, K, N], D [D]; state
    [B, D, N] fp32 or fp64: the checkpoint, replaced by the state after the replayed tokens if `settle`. Channel d
    reads group d // (D / K). Returns y [B, T, D] in the state's dtype.

    Replayed tokens need no outputs and are one sum, each input decayed to where the new tokens begin; those go on from
    there one after the other.
    """
    kind, (batch, channels, size) = state.dtype, state.shape
    count, groups = C.shape[1:3]
    replayed = x.shape[1] - count
    x, dt, A, B, C = (t.to(kind) for t in (x, dt, A, B, C))
    grouped = batch, x.shape[1], groups, -1, 1
    added = ((dt * x).view(grouped) * B.unsqueeze(3)).view(batch, -1, channels, size)
    now = state
    if replayed:
        old, passed = added[:, :replayed], dt[:, :replayed].flip(1).cumsum(1).flip(1)
        after = passed - dt[:, :replayed]
        now = torch.exp(passed[:, 0].unsqueeze(-1) * A) * state
        now = now + (torch.exp(after.unsqueeze(-1) * A) * old).sum(1)
    decay = torch.exp(dt[:, replayed:].unsqueeze(-1) * A)
    states = torch.empty_like(decay)
    before = now
    for t in range(count):
        before = torch.addcmul(added[:, replayed + t], decay[:, t], before, out=states[:, t])
    if settle and replayed:
        state.copy_(now)
    y = (states.view(batch, count, groups, -1, size) * C.unsqueeze(3)).sum(-1).view(batch, count, channels)
    return torch.addcmul(y, D.to(kind), x[:, replayed:])
