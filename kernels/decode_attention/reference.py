"""The attention of a decoding step in plain PyTorch, row by row: the truth. It reads `start` on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Norms(NamedTuple):
    """Of each query and key head, before the rotation (Qwen3)."""

    query: Tensor
    """[P]."""
    key: Tensor
    """[P]."""
    eps: float


def decode_attention(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    rotary: Tensor,
    window: int = 0,
    norms: Norms | None = None,
) -> Tensor:
    """Shapes and effects as in the room's `decode_attention`. Computes in fp32 or better; new keys and values are
    rounded to the caches' dtype before they are used."""
    (batch, _, groups, width), kind = keys.shape, torch.promote_types(projected.dtype, torch.float32)
    heads = projected.shape[1] // width - 2 * groups
    q, k, v = projected.view(batch, -1, heads + 2 * groups, width).split((heads, groups, groups), dim=2)
    count, outputs = q.shape[1], []
    for row, first in enumerate(start.tolist()):
        turn = rotary[first : first + count].to(kind)
        query, key = (_turned(t[row].to(kind), turn, norm, norms) for t, norm in ((q, "query"), (k, "key")))
        keys[row, first : first + count], values[row, first : first + count] = key.to(keys.dtype), v[row]
        query = query.to(projected.dtype).to(kind).unflatten(1, (groups, -1))  # [T, G, R, P]
        low = max(0, first - window + 1) if window else 0
        live, held = (t[row, low : first + count].to(kind) for t in (keys, values))  # [N, G, P]
        scores = torch.einsum("tgrp,ngp->grtn", query, live) * width**-0.5
        at = torch.arange(first, first + count, device=keys.device).unsqueeze(1)
        slots = torch.arange(low, first + count, device=keys.device)
        unseen = slots > at
        if window:
            unseen = unseen | (slots <= at - window)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("grtn,ngp->tgrp", weights, held).flatten(1))
    return torch.cat(outputs).to(projected.dtype)


def _turned(x: Tensor, turn: Tensor, norm: str, norms: Norms | None) -> Tensor:
    """x [T, H, P] after its norm, if it has one, and rotation by turn [T, 2, P]."""
    if norms is not None:
        x = x * (x.square().mean(-1, keepdim=True) + norms.eps).rsqrt() * getattr(norms, norm).to(x.dtype)
    half = x.shape[-1] // 2
    cos, sin = turn.unsqueeze(1).unbind(2)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
