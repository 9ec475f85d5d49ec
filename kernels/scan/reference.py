"""The selective state-space scan in its Mamba-2 form (one decay per head), in plain PyTorch.

The recurrence (Dao and Gu, arXiv 2405.21060, with the exponential-Euler discretisation of Mamba), for head h and its
group g = h // (H / G):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        S [P, N]
    y_t = S_t C_t + D x_t

x and B have one row per group (a teacher's KV head), which is never repeated in memory; dt, A, C and D are per head.
x, B and C may each have groups of their own number, which serve equal numbers of heads side by side (`aligned`).
`scan_loop` is the recurrence written down and the truth of every other version. `scan` is the chunked form: inside a
chunk a masked matrix product, between chunks the state; memory is linear in the length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..documents import Documents

P = ParamSpec("P")
T = TypeVar("T")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """States and decays are fp32 in every precision below it, and fp64 for fp64 inputs."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mask_dt(dt: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeroes dt [B, L, H] at and after `lengths` [B], where a step then leaves the state as it is."""
    if lengths is None:
        return dt
    positions = torch.arange(dt.shape[1], device=dt.device)
    return dt * (positions < lengths[:, None]).unsqueeze(-1)


def aligned(x: Tensor, B: Tensor, C: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, L, G, P], B [B, L, G', N] and C [B, L, G'', N] -> the first two in as many groups, C in all heads."""
    groups = x.shape[2] if x.shape[2] == B.shape[2] else heads
    return repeated(x, groups), repeated(B, groups), repeated(C, heads)


def repeated(t: Tensor, groups: int) -> Tensor:
    """[B, L, G, P] -> [B, L, groups, P], each as often as it serves."""
    return t if t.shape[2] == groups else t.repeat_interleave(groups // t.shape[2], dim=2)


def scan_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time. Shapes as in `scan`."""
    kind = compute_dtype(x)
    heads = dt.shape[2]
    x, B, C = (repeated(t.to(kind), heads) for t in (x, B, C))
    batch, length, _, width = x.shape
    size = C.shape[3]
    dt, A = mask_dt(dt.to(kind), lengths), A.to(kind)
    state = x.new_zeros(batch, heads, width, size) if state is None else state.to(kind)
    outputs = []
    for t in range(length):
        if documents is not None:
            state = state.masked_fill(documents.starts[:, t, None, None, None], 0)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        y = (state * C[:, t, :, None, :]).sum(-1)
        outputs.append(y if D is None else y + D.to(kind)[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a function of tensors without autocast, which would make its matrix products low precision."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        device = next(t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


class _Same(NamedTuple):
    """Which tokens of K chunks of Q are of one document: `within` [B, 1, K, Q, Q] with each other, `last` with the
    chunk's last, `before` with the token before the chunk ([B, 1, 1, K, Q] both)."""

    within: Tensor
    last: Tensor
    before: Tensor


def _same_document(documents: Documents | None, pad: int, chunk: int) -> _Same | None:
    """Padding behind the row belongs to its last document, what stands before it to its first."""
    if documents is None:
        return None
    index = documents.index
    index = torch.cat((index, index[:, -1:].expand(-1, pad)), dim=1).view(index.shape[0], 1, 1, -1, chunk)
    ends = index[..., -1:]
    reached = torch.cat((index[..., :1, :1], ends[..., :-1, :]), dim=-2)
    return _Same(index.unsqueeze(-1).squeeze(1) == index.unsqueeze(-2).squeeze(1), index == ends, index == reached)


@exact
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk: int = 64,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked scan.

    x [B, L, G, P], dt [B, L, H] (after softplus), A [H] (negative), B [B, L, G, N], C [B, L, H, N], D [H],
    state [B, H, P, N] (zero if not given), lengths int [B] (tokens at or after them leave the state alone; their
    outputs are meaningless). Head h reads group h // (H / G). With documents nothing passes from one to the next; the
    state given belongs to the first.
    Returns y [B, L, H, P] and the final state [B, H, P, N], in fp32 (fp64 for fp64 inputs).
    """
    kind = compute_dtype(x)
    x, B, C = aligned(x, B, C, dt.shape[2])
    batch, length, groups, width = x.shape
    heads, size = C.shape[2:]
    repeat = heads // groups
    x, B, C, A = x.to(kind), B.to(kind), C.to(kind), A.to(kind)
    dt = mask_dt(dt.to(kind), lengths)

    chunk = min(chunk, max(length, 1))
    pad = -length % chunk
    if pad:
        x, B, C = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = torch.nn.functional.pad(dt, (0, 0, 0, pad))
    count = (length + pad) // chunk

    # From here on heads come first: x [B, G, K, Q, P], B [B, G, K, Q, N], C [B, G, R, K, Q, N], dt [B, G, R, K, Q].
    xs = x.view(batch, count, chunk, groups, width).permute(0, 3, 1, 2, 4)
    Bs = B.view(batch, count, chunk, groups, size).permute(0, 3, 1, 2, 4)
    Cs = C.view(batch, count, chunk, groups, repeat, size).permute(0, 3, 4, 1, 2, 5)
    steps = dt.view(batch, count, chunk, groups, repeat).permute(0, 3, 4, 1, 2)
    decays = torch.cumsum(steps * A.view(groups, repeat, 1, 1), dim=-1)

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    same = _same_document(documents, pad, chunk)
    if same is not None:
        later = later | ~same.within.unsqueeze(1)
    between = (decays.unsqueeze(-1) - decays.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    mixing = (Cs @ Bs.unsqueeze(2).transpose(-1, -2)) * between * steps.unsqueeze(-2)
    y = mixing @ xs.unsqueeze(2)

    to_end = torch.exp(decays[..., -1:] - decays) * steps
    since, whole = torch.exp(decays), torch.exp(decays[..., -1])
    if same is not None:
        to_end, since, whole = to_end * same.last, since * same.before, whole * same.before[..., -1]
    added = (xs.unsqueeze(2) * to_end.unsqueeze(-1)).transpose(-1, -2) @ Bs.unsqueeze(2)
    whole = whole[..., None, None]
    now = x.new_zeros(batch, groups, repeat, width, size)
    if state is not None:
        now = state.to(kind).view(batch, groups, repeat, width, size)
    before = []
    for index in range(count):
        before.append(now)
        now = whole[:, :, :, index] * now + added[:, :, :, index]
    if count:
        carried = torch.stack(before, dim=3)
        y = y + since.unsqueeze(-1) * (Cs @ carried.transpose(-1, -2))

    y = y.permute(0, 3, 4, 1, 2, 5).reshape(batch, count * chunk, heads, width)[:, :length]
    if D is not None:
        skip = D.to(kind).view(groups, repeat, 1) * x[:, :length].unsqueeze(3)
        y = y + skip.reshape(batch, length, heads, width)
    return y, now.reshape(batch, heads, width, size)
