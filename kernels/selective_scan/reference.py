"""The selective state-space scan in its Mamba-1 form (one step size per channel), in plain PyTorch.

The recurrence (Gu and Dao, arXiv 2312.00752, exponential-Euler discretisation), for channel d, state n and the
channel's group k = d // (D / K):

    h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] x_t[d] B_t[k, n]
    y_t[d] = sum_n C_t[k, n] h_t[d, n] + D[d] x_t[d]                              dt_t = softplus(raw_t + bias)

`selective_scan_loop` is the recurrence written down and the truth of every other version. `selective_scan` makes the
states of a chunk of tokens at a time and makes them again in backward, so that only those between chunks are kept:
memory is linear in the length, and small beside that of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..documents import Documents
from ..scan.reference import compute_dtype, exact


def step_sizes(raw: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """dt [B, L, D] in fp32 (fp64 for fp64 inputs) from raw [B, L, D], bias [D]; 0 where keep bool [B, L] is False, so
    that the token leaves the state as it is."""
    kind = compute_dtype(raw)
    dt = F.softplus(raw.to(kind) if bias is None else raw.to(kind) + bias.to(kind))
    return dt if keep is None else dt * keep.unsqueeze(-1)


def selective_scan_loop(
    x: Tensor,
    raw: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    keep: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time. Shapes as in `selective_scan`."""
    kind = compute_dtype(x)
    channels, size = A.shape
    dt, A, x = step_sizes(raw, bias, keep), A.to(kind), x.to(kind)
    B, C = (t.to(kind).repeat_interleave(channels // t.shape[2], dim=2) for t in (B, C))
    now = x.new_zeros(x.shape[0], channels, size) if state is None else state.to(kind)
    outputs = []
    for t in range(x.shape[1]):
        if documents is not None:
            now = now.masked_fill(documents.starts[:, t, None, None], 0)
        now = torch.exp(dt[:, t, :, None] * A) * now + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t]
        y = (now * C[:, t]).sum(-1)
        outputs.append(y if D is None else y + D.to(kind) * x[:, t])
    return torch.stack(outputs, dim=1), now


class _Recurrence(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + added_t: decay, added [B, L, …], h_{-1} [B, …] -> all h [B, L, …]."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, state: Tensor) -> Tensor:
        states, now = torch.empty_like(added), state
        for t in range(added.shape[1]):
            now = torch.addcmul(added[:, t], decay[:, t], now, out=states[:, t])
        ctx.save_for_backward(decay, state, states)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, state, states = ctx.saved_tensors
        reached = gradients[0].clone(memory_format=torch.contiguous_format)
        for t in range(reached.shape[1] - 2, -1, -1):
            reached[:, t].addcmul_(decay[:, t + 1], reached[:, t + 1])
        before = torch.cat((state.unsqueeze(1), states[:, :-1]), dim=1)
        return reached * before, reached, decay[:, 0] * reached[:, 0]


def _chunk(
    dt: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """dt and inputs = dt x [B, Q, D], starts bool [B, Q], state [B, D, N] -> y [B, Q, D] without the skip, state."""
    batch, length, groups = B.shape[:3]
    decay = torch.exp(dt.unsqueeze(-1) * A)
    if starts is not None:
        decay = decay * ~starts[..., None, None]
    added = inputs.view(batch, length, groups, -1, 1) * B.unsqueeze(3)
    states = _Recurrence.apply(decay, added.view(decay.shape), state)
    y = (states.view(added.shape) * C.unsqueeze(3)).sum(-1)
    # The last state alone: a view would keep those of the whole chunk for as long as the next chunk's inputs.
    return y.flatten(2), states[:, -1].clone()


@exact
def selective_scan(
    x: Tensor,
    raw: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    keep: Tensor | None = None,
    documents: Documents | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The scan by chunks.

    x [B, L, D], raw [B, L, D] (dt before bias [D] and softplus), A [D, N] (negative), B and C [B, L, K, N], D [D],
    state [B, D, N] (zero if not given; it continues the first document), keep bool [B, L]: other tokens leave the
    state alone and their outputs are meaningless. Channel d reads group d // (D / K). L is at least 1.
    Returns y [B, L, D] and the final state [B, D, N], in fp32 (fp64 for fp64 inputs).
    """
    kind = compute_dtype(x)
    channels, size = A.shape
    dt, A, B, C, x = step_sizes(raw, bias, keep), A.to(kind), B.to(kind), C.to(kind), x.to(kind)
    inputs = dt * x
    now = x.new_zeros(x.shape[0], channels, size) if state is None else state.to(kind)
    outputs = []
    for first in range(0, x.shape[1], chunk):
        part = slice(first, first + chunk)
        starts = None if documents is None else documents.starts[:, part]
        given = dt[:, part], inputs[:, part], A, B[:, part], C[:, part], starts, now
        if torch.is_grad_enabled():
            y, now = checkpoint(_chunk, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            y, now = _chunk(*given)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    return (y if D is None else torch.addcmul(y, D.to(kind), x)), now
