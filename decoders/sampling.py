"""Turns logits into tokens, the same ones in every decoder, batch and call.

Random numbers are counter-based: each is a hash of (seed, sequence, position, purpose), so that what is drawn depends
neither on the batch nor on how many tokens a call runs. A text's stream stands for its seed and sequence. Logits are
used as they come (fp32 or fp64) and probabilities are fp64; ties always go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..harness.interfaces import Limits, Stepper
from ..kernels.rounds import ACCEPT, TOKEN, WHOLE, drawn, greedy, keep, reject, softmax, uniform
from .breakdown import REST, section


def kept(logits: Tensor, limits: Limits) -> Tensor:
    """logits [..., V] with -inf in place of those that the filters of the limits leave out."""
    return keep(logits, limits.temperature, limits.top_k, limits.top_p)


def probabilities(logits: Tensor, limits: Limits) -> Tensor:
    """What is sampled from: softmax(logits / temperature) after top-k, then after top-p of what top-k left.

    Top-k keeps exactly k tokens; top-p keeps the fewest most probable tokens whose probabilities reach top_p.
    logits fp32 or fp64 [..., V]; returns fp64 [..., V]. The temperature must be above 0.
    """
    return softmax(kept(logits, limits), limits.temperature)


def pick(logits: Tensor, limits: Limits, stream: Tensor, before: Tensor) -> Tensor:
    """The tokens that plain decoding emits: the argmax at temperature 0, else a draw keyed by stream and position.

    logits [B, T, V]; stream int64 [B]; before int [B], the position before the first token's. Returns int64 [B, T].
    """
    if limits.temperature == 0:
        return greedy(logits)
    return drawn(kept(logits, limits), limits.temperature, stream, before, TOKEN)


def advance(
    model: Stepper, ids: Tensor, start: Tensor, state: Any, settle: bool = True, last: Tensor | None = None
) -> Tensor:
    """`model.advance` behind the pick of ids[:, -1], contiguous: the likeliest of logits `last` [B, V], if given. The
    model picks where it can, and where that spares a kernel."""
    if last is None:
        return model.advance(ids, start, state, settle)
    if "picks" in model.traits and last.shape[1] <= WHOLE:
        logits: Tensor = model.advance(ids, start, state, settle, last=last)  # type: ignore[call-arg]
        return logits
    with section(REST):
        greedy(last, ids[:, -1])
    return model.advance(ids, start, state, settle)


def prefill(model: Stepper, ids: Tensor, lengths: Tensor, state: Any, counts: Sequence[int]) -> Tensor:
    """`model.prefill`, which is told the lengths as the host knows them, where it takes them."""
    if "counts" not in model.traits:
        return model.prefill(ids, lengths, state)
    logits: Tensor = model.prefill(ids, lengths, state, counts=counts)  # type: ignore[call-arg]
    return logits


def judge(
    logits: Tensor, limits: Limits, q: Tensor, drafts: Tensor, real: Tensor, stream: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling (`kernels.rounds.reject`) of drafts int64 [B, J] that were drawn from q: how many of the first
    K stand, int64 [B], and tokens int64 [B, K + 1]. logits [B, K + 1, V] of the target, the rest as in `pick`."""
    position = before.long().unsqueeze(1) + torch.arange(1, logits.shape[1] + 1, device=before.device)
    accept, token = (uniform(stream, position, purpose) for purpose in (ACCEPT, TOKEN))
    return reject(probabilities(logits, limits), q, drafts, real, accept, token)
