"""Turns logits into tokens, the same ones in every decoder, batch and call.

Random numbers are counter-based: each is a hash of (seed, sequence, position, purpose), so that what is drawn depends
neither on the batch nor on how many tokens a call runs. A text's stream stands for its seed and sequence. Logits are
used as they come (fp32 or fp64) and probabilities are fp64; ties always go to the lowest index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..harness.interfaces import Limits
from ..kernels.rounds import greedy, uniform
from .filters import top_k_mask, top_p_mask

TOKEN, DRAFT, ACCEPT = range(3)
"""Purposes of a random number: the emitted token, a draft's own draw, the acceptance of a drafted token."""


def probabilities(logits: Tensor, limits: Limits) -> Tensor:
    """What is sampled from: softmax(logits / temperature) after top-k, then after top-p of what top-k left.

    Top-k keeps exactly k tokens; top-p keeps the fewest most probable tokens whose probabilities reach top_p.
    logits fp32 or fp64 [..., V]; returns fp64 [..., V]. The temperature must be above 0.
    """
    weights = ((logits.double() - logits.amax(-1, keepdim=True)) / limits.temperature).exp()
    if 0 < limits.top_k < logits.shape[-1]:
        weights = weights.where(top_k_mask(logits, limits.top_k), 0.0)
    if limits.top_p < 1:
        weights = weights.where(top_p_mask(logits, weights, limits.top_p), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def draw(weights: Tensor, at: Tensor) -> Tensor:
    """Inverse of the distribution function. weights fp64 [..., V], non-negative, need not sum to 1; at fp64 [...] in
    [0, 1). Returns int64 [...]; never an index of weight 0 unless all are."""
    cumulative = weights.cumsum(-1)
    reached = (cumulative > at.unsqueeze(-1) * cumulative[..., -1:]) & (weights > 0)
    first = reached.to(torch.uint8).argmax(-1)
    return first.where(reached.any(-1), weights.argmax(-1))


def pick(logits: Tensor, limits: Limits, stream: Tensor, before: Tensor) -> Tensor:
    """The tokens that plain decoding emits: the argmax at temperature 0, else a draw keyed by stream and position.

    logits [B, T, V]; stream int64 [B]; before int [B], the position before the first token's. Returns int64
    [B, T].
    """
    if limits.temperature == 0:
        return greedy(logits)
    position = before.long().unsqueeze(1) + torch.arange(1, logits.shape[1] + 1, device=before.device)
    return draw(probabilities(logits, limits), uniform(stream, position, TOKEN))


def reject(
    target: Tensor, draft: Tensor, drafts: Tensor, real: Tensor, stream: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling (Leviathan et al. 2023, Algorithm 1): draft d stands with probability min(1, p(d) / q(d)); the
    token after the last standing one is drawn from max(p - q, 0), or from p where no draft was left to judge.

    target p [B, K + 1, V] and draft q [B, K, V] are filtered probabilities, drafts int64 [B, K], real int [B], stream
    [B], position [B, K + 1] of the emitted tokens. Returns how many of the first K drafts stand, int64 [B], and the
    tokens [B, K + 1], of which one more than that are emitted.

    With K + 1 drafts (q [B, K + 1, V]) the last one is judged in the bonus token's place. Then each token depends on
    the text before it and on its own random numbers alone, not on where rounds begin: sampled text is the same for
    every K.
    """
    count, judged = target.shape[1], drafts.shape[1]
    counts = torch.arange(judged, device=drafts.device) < real.unsqueeze(1)
    p = target[:, :judged].gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    q = draft.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    stands = (uniform(stream, position[:, :judged], ACCEPT) * q < p) & counts
    standing = stands.long().cumprod(1).sum(1)

    at = standing.clamp(max=count - 1)
    row = torch.arange(len(drafts), device=drafts.device)
    plain = target[row, at]
    tried = at.clamp(max=judged - 1)
    residual = (plain - draft[row, tried].double() * (counts[row, tried] & (at < judged)).unsqueeze(-1)).clamp(min=0)
    residual = residual.where(residual.sum(-1, keepdim=True) > 0, plain)
    after = draw(residual, uniform(stream, position, TOKEN)[row, at])
    tokens = torch.cat([drafts, drafts[:, :1]], dim=1)[:, :count]
    # Where all of K + 1 stand, the last of them is what the bonus token's place holds already.
    after = after.where(standing < count, tokens[:, -1])
    return at, tokens.scatter(1, at.unsqueeze(1), after.unsqueeze(1))
