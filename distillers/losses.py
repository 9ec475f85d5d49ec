"""Losses of distillation as pure functions, in nat: of each token, or summed over tokens.

Sums, because a mean over a part of a batch gives other gradients than the mean over the batch: the caller divides by
the number of tokens of the whole batch (`num_items_in_batch`), however that is cut into parts or spread over ranks.
`targets` are already shifted: entry t is the token that the logits at t predict; `IGNORED` entries count for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
SMALLEST = 1e-12
"""Of what is divided by."""

DivergenceKind = Literal["forward", "reverse", "js"]


def shifted(labels: Tensor) -> Tensor:
    """Targets [B, L] of labels int64 [B, L]: what each position predicts; the last one predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a student's next-token distribution q is from its teacher's p, both softened by a temperature τ.

    `forward` KL(p ‖ q); `reverse` KL(q ‖ p); `js` β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q, the
    generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv 2306.13649, eq. 1), for 0 < β < 1. Times τ²,
    which keeps the gradient's size at any temperature (Hinton, Vinyals, Dean 2015, section 2).
    """

    kind: DivergenceKind = "forward"
    beta: float = 0.5
    temperature: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """nat [N] of logits [N, V] of any float dtype; fp32 (fp64 for fp64)."""
        log_q = F.log_softmax(_exact(student) / self.temperature, dim=-1)
        log_p = F.log_softmax(_exact(teacher) / self.temperature, dim=-1)
        if self.kind == "forward":
            nat = _kl(log_p, log_q)
        elif self.kind == "reverse":
            nat = _kl(log_q, log_p)
        else:
            log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
            nat = self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)
        return self.temperature**2 * nat


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), nat [N], 0 where the target is `IGNORED`. logits [N, V], targets int64 [N]; fp32 or better."""
    return F.cross_entropy(_exact(logits), targets, ignore_index=IGNORED, reduction="none")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ -log p(target), nat. logits [B, L, V] of any float dtype, targets int64 [B, L]; fp32 scalar (fp64 for fp64)."""
    return token_cross_entropy(logits.flatten(0, 1), targets.flatten()).sum()


def sequence_logprob(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ log p(target) of each row, nat [B]. logits [B, L, V], targets int64 [B, L]; fp32 or better."""
    return -token_cross_entropy(logits.flatten(0, 1), targets.flatten()).view(targets.shape).sum(1)


class Preference(NamedTuple):
    """What a step of DPO says about each pair."""

    loss: Tensor
    """nat [B]"""
    chosen_reward: Tensor
    """Implicit reward β (log π - log π_ref) of the preferred answer, nat [B], without gradient."""
    rejected_reward: Tensor
    """The same of the other answer."""


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Preference:
    """-log σ(β ((log π - log π_ref)(chosen) - (log π - log π_ref)(rejected))), of each pair.

    All four are summed log-probabilities of answers given their prompts, nat [B] (Rafailov et al. 2023,
    arXiv 2305.18290, eq. 7; the loss that TRL calls `sigmoid`).
    """
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return Preference(-F.logsigmoid(good - bad), good.detach(), bad.detach())


def alignment(mixer: Tensor, attention: Tensor) -> Tensor:
    """‖mixer - attention‖² / ‖attention‖² of each token, no unit, [N]. Both [N, E], outputs for the same input."""
    mixer, attention = _exact(mixer), _exact(attention)
    return (mixer - attention).square().sum(-1) / attention.square().sum(-1).clamp(min=SMALLEST)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), nat [N], of log-probabilities [N, V]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _exact(logits: Tensor) -> Tensor:
    """At least fp32: sums over a large vocabulary lose digits in less."""
    return logits if logits.dtype.itemsize >= 4 else logits.float()
