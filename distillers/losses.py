"""Losses of distillation as pure functions: sums over tokens, in nat.

Sums, because a mean over a part of a batch gives other gradients than the mean over the batch: the caller divides by
the number of tokens of the whole batch (`num_items_in_batch`), however that is cut into parts or spread over ranks.
`targets` are already shifted: entry t is the token that the logits at t predict; `IGNORED` entries count for nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def shifted(labels: Tensor) -> Tensor:
    """Targets [B, L] of labels int64 [B, L]: what each position predicts; the last one predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ -log p(target), nat. logits [B, L, V] of any float dtype, targets int64 [B, L]; fp32 scalar (fp64 for fp64)."""
    return F.cross_entropy(_exact(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def forward_kl(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² Σ KL(teacher_τ ‖ student_τ), nat, over the positions that have a target.

    student and teacher are logits [B, L, V]; p_τ = softmax(logits / τ). The factor τ² keeps the gradient's size at any
    temperature (Hinton, Vinyals, Dean 2015, section 2). Returns an fp32 scalar (fp64 for fp64).
    """
    counted = targets != IGNORED
    log_q = F.log_softmax(_exact(student[counted]) / temperature, dim=-1)
    log_p = F.log_softmax(_exact(teacher[counted]) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _exact(logits: Tensor) -> Tensor:
    """At least fp32: sums over a large vocabulary lose digits in less."""
    return logits if logits.dtype.itemsize >= 4 else logits.float()
