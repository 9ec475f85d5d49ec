"""Multi-step decoding of a Mamba-2 layer from a checkpoint and a ring of replayable inputs, in plain PyTorch.

A recurrent state cannot be rolled back, so a layer keeps the state at an earlier position (`settled`) and the inputs
of every token since then in a ring: position p lies in slot p mod S. A call that starts at `start` replays the ring
from `settled` to `start` without output, makes that state the new checkpoint if it settles, runs T new tokens with
output, and writes their inputs to the ring. Tokens that a verifier rejects are simply not replayed (Algorithm 2 of
arXiv 2408.15237, with positions instead of step counts).

New tokens must not land in slots that the same call replays, so S >= (start - settled) + T; two times the largest T
is enough for a caller that settles each round. The recurrence itself is that of `kernels.scan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _cast(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """`tensor.to(kind)` without its overhead where there is nothing to do: at small sizes that is what a step costs."""
    return tensor if tensor.dtype == kind else tensor.to(kind)


class Indices(NamedTuple):
    """Where one call reads and writes its rings: the same for every layer, so made once. Flat, over B x S slots."""

    old: Tensor
    """int64 [B * R]: the slots to replay, R of each row."""
    live: Tensor | None
    """[B, R, 1], 1 where a replayed slot is before `start`, else 0; in the dtype of the state. None without replay."""
    new: Tensor
    """int64 [B * T]: the slots of the new tokens."""
    longest: int
    """R."""


def indices(
    settled: Tensor, start: Tensor, count: int, size: int, longest: int | None = None, dtype: torch.dtype | None = None
) -> Indices:
    """Indices for `count` tokens at `start`, rings of `size` slots.

    settled, start int [B]; `longest` bounds start - settled from above (without it the host reads it from the
    device); `dtype` is that of the states (fp32 if not given).
    """
    if longest is None:
        longest = int((start - settled).max())
    device = start.device
    offset = (torch.arange(start.shape[0], device=device) * size).unsqueeze(1)
    tokens = torch.arange(max(count, longest), device=device)
    new = (offset + (start.unsqueeze(1) + tokens[:count]) % size).flatten()
    old = (offset + (settled.unsqueeze(1) + tokens[:longest]) % size).flatten()
    live = None
    if longest:
        live = (tokens[:longest] < (start - settled).unsqueeze(1)).unsqueeze(-1).to(dtype or torch.float32)
    return Indices(old, live, new, longest)


def multistep_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    ring: tuple[Tensor, Tensor, Tensor],
    settled: Tensor,
    start: Tensor,
    settle: bool,
) -> Tensor:
    """Row by row and token by token, positions in the open: the truth. Shapes and effects as in `multistep`;
    settled and start are int [B]."""
    ring_x, ring_dt, ring_b = ring
    heads, repeat, size = C.shape[2], C.shape[2] // x.shape[2], ring_x.shape[1]
    kind = state.dtype
    y = torch.empty(*x.shape[:2], heads, x.shape[3], dtype=kind, device=x.device)

    def step(now: Tensor, x_t: Tensor, dt_t: Tensor, b_t: Tensor) -> Tensor:
        x_t, b_t = (t.to(kind).repeat_interleave(repeat, dim=0) for t in (x_t, b_t))
        decay = torch.exp(dt_t.to(kind) * A.to(kind))
        return decay[:, None, None] * now + dt_t.to(kind)[:, None, None] * x_t[:, :, None] * b_t[:, None, :]

    for row in range(x.shape[0]):
        now = state[row].clone()
        for position in range(int(settled[row]), int(start[row])):
            slot = position % size
            now = step(now, ring_x[row, slot], ring_dt[row, slot], ring_b[row, slot])
        if settle:
            state[row] = now
        for t in range(x.shape[1]):
            slot = (int(start[row]) + t) % size
            for store, new in zip(ring, (x, dt, B), strict=True):
                store[row, slot] = new[row, t].to(store.dtype)
            now = step(now, ring_x[row, slot], ring_dt[row, slot], ring_b[row, slot])
            skip = D.to(kind)[:, None] * ring_x[row, slot].to(kind).repeat_interleave(repeat, dim=0)
            y[row, t] = (now * C[row, t].to(kind)[:, None, :]).sum(-1) + skip
    return y


def replay(state: Tensor, ring: tuple[Tensor, Tensor, Tensor], A: Tensor, at: Indices) -> Tensor:
    """The state at `start` from the checkpoint at `settled`: decays folded into the inputs, a sum of outer products.

    state [B, H, P, N]; ring: x [B, S, G, P], dt [B, S, H], B [B, S, G, N]; A [H]. Returns a new tensor, or `state`
    itself where nothing is to be replayed.
    """
    if at.live is None:
        return state
    kind, (batch, heads, width, size), groups = state.dtype, state.shape, ring[0].shape[2]
    x, dt, b = (
        _cast(t.view(-1, *t.shape[2:]).index_select(0, at.old), kind).view(batch, -1, *t.shape[2:]) for t in ring
    )
    dt = (dt * at.live).transpose(1, 2)  # [B, H, R]
    decays = torch.cumsum(dt * _cast(A, kind).unsqueeze(-1), dim=-1)
    last = decays[..., -1:]
    weights = (torch.exp(last - decays) * dt).view(batch, groups, -1, 1, at.longest)
    added = (x.permute(0, 2, 3, 1).unsqueeze(2) * weights) @ b.transpose(1, 2).unsqueeze(2)  # [B, G, R, P, N]
    return torch.addcmul(added.view(batch, heads, width, size), torch.exp(last).unsqueeze(-1), state)


def multistep(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    ring: tuple[Tensor, Tensor, Tensor],
    at: Indices,
    settle: bool,
) -> Tensor:
    """T tokens at positions start[b] … start[b] + T - 1, which `at` holds as ring slots.

    x [B, T, G, P] and B [B, T, G, N] after the convolution, dt [B, T, H] after softplus, A [H] (negative), C [B, T,
    H, N], D [H]; state [B, H, P, N] fp32 or fp64: the checkpoint at `settled`, replaced by the one at `start` if
    `settle`; ring: x [B, S, G, P], dt [B, S, H], B [B, S, G, N], contiguous, read from `settled` to `start` and
    written from `start` on, in whatever dtype they have: new values are rounded to it before use, so that a replay
    makes the very state that this call saw. Returns y [B, T, H, P] in the state's dtype.
    """
    batch, count, groups, width = x.shape
    heads, size = C.shape[2:]
    repeat, kind = heads // groups, state.dtype
    now = replay(state, ring, A, at)
    if settle and now is not state:
        state.copy_(now)

    rounded = []
    for store, new in zip(ring, (x, dt, B), strict=True):
        new = _cast(new, store.dtype)
        store.view(-1, *store.shape[2:]).index_copy_(0, at.new, new.flatten(0, 1))
        rounded.append(_cast(new, kind))
    x, dt, B = rounded

    dt = dt.transpose(1, 2)  # [B, H, T]
    decays = torch.cumsum(dt * _cast(A, kind).unsqueeze(-1), dim=-1)
    read = _cast(C, kind).transpose(1, 2)  # [B, H, T, N]
    carried = torch.exp(decays).unsqueeze(-1) * (read @ now.transpose(-1, -2))
    mixing = (read.reshape(batch, groups, repeat * count, size) @ B.permute(0, 2, 3, 1)).view(batch, heads, count, -1)
    if count > 1:
        between = decays.unsqueeze(-1) - decays.unsqueeze(-2)
        mixing = mixing * between.tril().exp().tril()
    mixing = (mixing * dt.unsqueeze(-2)).view(batch, groups, repeat * count, count)
    y = carried + (mixing @ x.transpose(1, 2)).view(batch, heads, count, width)
    skip = _cast(D, kind).view(groups, repeat, 1) * x.unsqueeze(3)
    return y.transpose(1, 2) + skip.view(batch, count, heads, width)
