"""Several tokens from a state that can be taken back: the decoding step of a Mamba-2 layer, in plain PyTorch.

A recurrent state cannot be rolled back, so a layer keeps the state at an earlier position and whatever it needs to run
the tokens since then again. A call replays those without output, may make the state reached the new checkpoint, and
runs T new tokens with output. Tokens that a verifier rejects are simply not replayed (Algorithm 2 of arXiv 2408.15237,
with positions instead of step counts). The recurrence itself is that of `kernels.scan`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scan.reference import aligned, scan_loop


def visible(replayed: int, count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """What each output may see of R replayed and T new tokens: 0, or -inf where it may not. The same for all layers.

    [1 + T, R + T]: the first row is for the state after the replayed tokens, the others are for the new ones. [T, T]
    where nothing is replayed.
    """
    first = max(replayed - 1, 0)
    mask = torch.full((replayed + count - first, replayed + count), -torch.inf, dtype=dtype, device=device)
    return mask.triu(first + 1)


def multistep_loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, settle: bool
) -> Tensor:
    """One scan after the other, token by token: the truth. Shapes and effects as in `multistep`."""
    replayed, now = x.shape[1] - C.shape[1], state
    if replayed:
        unread = C[:, :1].expand(-1, replayed, -1, -1)
        _, now = scan_loop(x[:, :replayed], dt[:, :replayed], A, B[:, :replayed], unread, None, state)
    y, _ = scan_loop(x[:, replayed:], dt[:, replayed:], A, B[:, replayed:], C, D, now)
    if settle:
        state.copy_(now)
    return y


def _cast(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """`tensor.to(kind)` without its overhead where there is nothing to do: at small sizes that is what a step costs."""
    return tensor if tensor.dtype == kind else tensor.to(kind)


def multistep(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    mask: Tensor,
    settle: bool,
) -> Tensor:
    """R replayed tokens, then T new ones. A replayed token whose dt is 0 leaves the state as it is.

    x [B, R + T, G, P], dt [B, R + T, H] (after softplus), A [H] (negative), B [B, R + T, G, N], C [B, T, H, N], D [H];
    state [B, H, P, N] fp32 or fp64: the checkpoint, replaced by the state after the replayed tokens if `settle`; mask:
    `visible(R, T)` in the state's dtype. Head h reads group h // (H / G). Returns y [B, T, H, P] in the state's dtype.

    Both kinds are one sequence from the checkpoint S on, of which the new tokens have outputs: with a_t the sum of dt A
    up to token t, y_t = exp(a_t) S C_t + sum_{s <= t} exp(a_t - a_s) dt_s (C_t B_s) x_s + D x_t.
    """
    x, B, C = aligned(x, B, C, dt.shape[2])
    batch, length, groups, width = x.shape
    count, heads, size = C.shape[1:]
    replayed = length - count
    x, B, C = (_cast(t, state.dtype).transpose(1, 2) for t in (x, B, C))  # x, B [B, G, R + T, …], C [B, H, T, N]
    dt = _cast(dt, state.dtype)
    decays = torch.cumsum(dt * _cast(A, dt.dtype), dim=1).transpose(1, 2)  # [B, H, R + T]
    rows = decays[..., -mask.shape[0] :]
    weights = torch.exp(rows.unsqueeze(-1) - decays.unsqueeze(-2) + mask)  # [B, H, 1 + T, R + T]
    weights = weights * dt.transpose(1, 2).unsqueeze(-2)
    carry = torch.exp(rows).unsqueeze(-1)

    mixing = (C.reshape(batch, groups, -1, size) @ B.mT).view(batch, heads, count, length) * weights[:, :, -count:]
    mixing.diagonal(replayed, 2, 3).add_(_cast(D, dt.dtype).unsqueeze(-1))
    y = (mixing.reshape(batch, groups, -1, length) @ x).view(batch, heads, count, width)
    y = torch.addcmul(y, C @ state.mT, carry[:, :, -count:])
    if settle and replayed:
        inputs = x.mT.unsqueeze(2) * weights[:, :, 0].view(batch, groups, -1, 1, length)
        added = (inputs.flatten(2, 3) @ B).view(state.shape)
        torch.addcmul(added, state, carry[:, :, :1], out=state)
    return y.transpose(1, 2)
