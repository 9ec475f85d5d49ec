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

import torch
from torch import Tensor


def _rows(start: Tensor) -> Tensor:
    return torch.arange(start.shape[0], device=start.device).unsqueeze(1)


def _slots(start: Tensor, count: int, size: int) -> Tensor:
    """Ring slots int64 [B, count] of the positions from `start` [B] on."""
    return (start.long().unsqueeze(1) + torch.arange(count, device=start.device)) % size


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
    """Row by row and token by token: the truth. Shapes and effects as in `multistep`."""
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


def replay(
    state: Tensor, ring: tuple[Tensor, Tensor, Tensor], A: Tensor, settled: Tensor, start: Tensor, longest: int
) -> Tensor:
    """The state at `start` from the checkpoint at `settled`: decays folded into the inputs, a sum of outer products.

    state [B, H, P, N]; ring: x [B, S, G, P], dt [B, S, H], B [B, S, G, N]; A [H]; settled, start int [B];
    `longest` bounds start - settled from above. Returns a new tensor unless `longest` is 0.
    """
    if longest == 0:
        return state
    ring_x, ring_dt, ring_b = ring
    kind, (batch, heads, width, size), groups = state.dtype, state.shape, ring_x.shape[2]
    rows, slots = _rows(start), _slots(settled, longest, ring_x.shape[1])
    live = torch.arange(longest, device=start.device) < (start - settled).unsqueeze(1)
    x, b = ring_x[rows, slots].to(kind), ring_b[rows, slots].to(kind)
    dt = (ring_dt[rows, slots].to(kind) * live.unsqueeze(-1)).transpose(1, 2)  # [B, H, R]
    decays = torch.cumsum(dt * A.to(kind).unsqueeze(-1), dim=-1)
    last = decays[..., -1:]
    weights = (torch.exp(last - decays) * dt).view(batch, groups, -1, 1, longest)
    added = (x.permute(0, 2, 3, 1).unsqueeze(2) * weights) @ b.transpose(1, 2).unsqueeze(2)  # [B, G, R, P, N]
    return torch.exp(last).unsqueeze(-1) * state + added.view(batch, heads, width, size)


def multistep(
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
    longest: int | None = None,
) -> Tensor:
    """T tokens at positions start[b] … start[b] + T - 1.

    x [B, T, G, P] and B [B, T, G, N] after the convolution, dt [B, T, H] after softplus, A [H] (negative), C [B, T,
    H, N], D [H]; state [B, H, P, N] fp32 or fp64: the checkpoint at `settled`, replaced by the one at `start` if
    `settle`; ring: x [B, S, G, P], dt [B, S, H], B [B, S, G, N], read from `settled` to `start` and written from
    `start` on, in whatever dtype they have: new values are rounded to it before use, so that a replay makes the very
    state that this call saw. settled, start int [B]. `longest` bounds start - settled from above; without it the
    host reads it from the device. Returns y [B, T, H, P] in the state's dtype.
    """
    batch, count, groups, width = x.shape
    heads, size = C.shape[2:]
    repeat, kind = heads // groups, state.dtype
    if longest is None:
        longest = int((start - settled).max())
    now = replay(state, ring, A, settled, start, longest)
    if settle and longest:
        state.copy_(now)

    rows, slots = _rows(start), _slots(start, count, ring[0].shape[1])
    rounded = []
    for store, new in zip(ring, (x, dt, B), strict=True):
        new = new.to(store.dtype)
        store[rows, slots] = new
        rounded.append(new.to(kind))
    x, dt, B = rounded

    dt = dt.transpose(1, 2)  # [B, H, T]
    decays = torch.cumsum(dt * A.to(kind).unsqueeze(-1), dim=-1)
    read = C.to(kind).transpose(1, 2)  # [B, H, T, N]
    y = torch.exp(decays).unsqueeze(-1) * (read @ now.transpose(-1, -2))
    mixing = (read.reshape(batch, groups, repeat * count, size) @ B.permute(0, 2, 3, 1)).view(
        batch, heads, count, count
    )
    if count > 1:
        later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        between = (decays.unsqueeze(-1) - decays.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
        mixing = mixing * between
    mixing = mixing * dt.unsqueeze(-2)
    inputs = x.transpose(1, 2)  # [B, G, T, P]
    y = y + (mixing.view(batch, groups, repeat * count, count) @ inputs).view(batch, heads, count, width)
    y = y.transpose(1, 2)
    return y + (D.to(kind).view(groups, repeat, 1) * x.unsqueeze(3)).view(batch, count, heads, width)
