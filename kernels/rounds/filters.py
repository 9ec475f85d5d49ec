"""Top-k and top-p without sorting a large vocabulary: each searches the logit of the last token that it keeps.

Logits are compared as whole numbers of the same order, whose bits are found from the highest down: a few passes over
the vocabulary whatever it holds, and exact, where a search by halving values is not. Of equal logits the lowest
indices are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

SORTED = 1 << 14
"""Tokens up to which sorting is quicker than searching."""
BITS = 4
"""Bits of the threshold that a pass finds where the vocabulary is small enough to be compared with 15 at once."""
AT_ONCE = 1 << 24
"""Numbers that such a pass may hold."""


def top_k_mask(logits: Tensor, k: int) -> Tensor:
    """The k largest of logits [..., V], 1 <= k <= V: bool [..., V] with exactly k true."""
    least = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = logits > least, logits == least
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def top_p_mask(logits: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """The fewest of the largest logits whose weights reach the share `top_p` of all of them: bool [..., V].

    logits fp32 or fp64 [..., V]; weights fp64 [..., V], non-negative, growing with the logits where they are not 0, and
    equal where these are. At least one is kept.
    """
    need = (top_p * weights.sum(-1, keepdim=True)).clamp(min=torch.finfo(weights.dtype).tiny)
    if logits.shape[-1] <= SORTED:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        ranked = weights.gather(-1, order)
        kept = (ranked.cumsum(-1) - ranked < need) & (ranked > 0)
        return torch.zeros_like(kept).scatter(-1, order, kept)
    keys = ordered(logits)
    least = _last_reaching(keys, weights, need)
    above, equal = keys > least, (keys == least) & (weights > 0)
    before = weights.where(above, 0.0).sum(-1, keepdim=True) + (equal.cumsum(-1) - 1) * weights
    return (above & (weights > 0)) | (equal & (before < need))


def ordered(x: Tensor) -> Tensor:
    """Whole numbers in the order of x (fp32 to int32, fp64 to int64); equal where x is equal, as zeros are."""
    bits, width = (x + 0.0).view(torch.int32 if x.dtype == torch.float32 else torch.int64), 8 * x.element_size()
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _last_reaching(keys: Tensor, weights: Tensor, need: Tensor) -> Tensor:
    """The largest key [..., 1] from which on the weights [..., V] sum up to `need` [..., 1]."""
    width = 8 * keys.element_size()
    bits = BITS if keys.numel() << BITS <= AT_ONCE else 1
    steps = torch.arange(1, 1 << bits, dtype=torch.int64, device=keys.device)
    found = torch.full_like(need, -(1 << (width - 1)), dtype=torch.int64)
    keys, weights = keys.unsqueeze(-2), weights.unsqueeze(-2)
    for shift in range(width - bits, -1, -bits):
        tried = (found + (steps << shift)).to(keys.dtype)
        mass = weights.where(keys >= tried.unsqueeze(-1), 0.0).sum(-1)
        found = found + ((mass >= need).sum(-1, keepdim=True) << shift)
    return found.to(keys.dtype)
