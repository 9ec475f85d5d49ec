"""Turns logits into tokens, the same ones in every decoder, batch and call.

Random numbers are counter-based: each is a hash of (seed, sequence, position, purpose), so that what is drawn depends
neither on the batch nor on how many tokens a call runs. A text's stream stands for its seed and sequence. Logits are
used as they come (fp32 or fp64) and probabilities are fp64; ties always go to the lowest index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..harness.interfaces import Limits
from ..kernels.rounds import ACCEPT, TOKEN, Drawn, draw, drawn, greedy, reject, rejected, uniform
from .filters import top_k_mask, top_p_mask


def filtered(limits: Limits, vocabulary: int) -> bool:
    """Whether tokens are left out before sampling."""
    return 0 < limits.top_k < vocabulary or limits.top_p < 1


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


def pick(logits: Tensor, limits: Limits, stream: Tensor, before: Tensor) -> Tensor:
    """The tokens that plain decoding emits: the argmax at temperature 0, else a draw keyed by stream and position.

    logits [B, T, V]; stream int64 [B]; before int [B], the position before the first token's. Returns int64 [B, T].
    """
    if limits.temperature == 0:
        return greedy(logits)
    if not filtered(limits, logits.shape[-1]):
        return drawn(logits, limits.temperature, stream, before, TOKEN)
    return draw(probabilities(logits, limits), uniform(stream, _positions(before, logits.shape[1]), TOKEN))


def judge(
    logits: Tensor, limits: Limits, q: Tensor | Drawn, drafts: Tensor, real: Tensor, stream: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling (`kernels.rounds.reject`) of drafts int64 [B, J] that were drawn from q: how many of the first
    K stand, int64 [B], and tokens int64 [B, K + 1]. logits [B, K + 1, V] of the target, the rest as in `pick`."""
    if isinstance(q, Drawn):
        return rejected(logits, q, drafts, real, stream, before)
    position = _positions(before, logits.shape[1])
    accept, token = (uniform(stream, position, purpose) for purpose in (ACCEPT, TOKEN))
    return reject(probabilities(logits, limits), q, drafts, real, accept, token)


def _positions(before: Tensor, count: int) -> Tensor:
    return before.long().unsqueeze(1) + torch.arange(1, count + 1, device=before.device)
