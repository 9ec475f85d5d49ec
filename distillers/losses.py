"""Losses of distillation as pure functions, in nat: of each token, or summed over tokens.

Sums, because a mean over a part of a batch gives other gradients than the mean over the batch: the caller divides by
the number of tokens of the whole batch (`num_items_in_batch`), however that is cut into parts or spread over ranks.
`targets` are already shifted: entry t is the token that the logits at t predict; `IGNORED` entries count for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
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


@dataclass(frozen=True, slots=True)
class Distillation:
    """What a distillation sums over tokens: `ce` times the cross entropy, and `kl` times a divergence from a teacher;
    a part of weight 0 is left out."""

    ce: float = 1.0
    kl: float = 0.0
    divergence: Divergence = Divergence()

    @property
    def weights(self) -> dict[str, float]:
        """Of each part, by its name."""
        return {name: weight for name, weight in (("ce", self.ce), ("kl", self.kl)) if weight}

    def __call__(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """The parts of each token, nat [parts, N], not weighed, from logits [N, V] and targets int64 [N]."""
        parts = []
        if self.ce:
            parts.append(token_cross_entropy(student, targets))
        if self.kl:
            assert teacher is not None
            parts.append(self.divergence(student, teacher))
        return torch.stack(parts)

    def with_gradient(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the gradient of their weighted sum to the student's logits [N, V], in the logits' dtype.

        With the teacher's p and the student's q, both softened by τ where marked, and e the target: the cross entropy
        has q - e (0 where the target is `IGNORED`), τ² KL(p_τ ‖ q_τ) has τ (q_τ - p_τ). Other divergences are left to
        autograd.
        """
        if self.kl and self.divergence.kind != "forward":
            with torch.enable_grad():
                leaf = student.detach().requires_grad_()
                values = self(leaf, teacher, targets)
                weights = torch.tensor(list(self.weights.values()), dtype=values.dtype, device=values.device)
                (to_logits,) = torch.autograd.grad(values, leaf, weights[:, None].expand_as(values))
            return values.detach(), to_logits
        if self._in_one_pass(student):
            from . import triton_losses

            return triton_losses.losses(student, teacher if self.kl else None, targets, self.ce, self.kl)
        parts = []
        log_q = F.log_softmax(_exact(student), dim=-1)
        if self.ce:
            real = targets != IGNORED
            places = targets.clamp(min=0).unsqueeze(-1)
            parts.append(-log_q.gather(-1, places).squeeze(-1) * real)
        heat = self.divergence.temperature
        gradient: Tensor | None = None
        if self.kl:
            assert teacher is not None
            softened = log_q if heat == 1 else F.log_softmax(_exact(student) / heat, dim=-1)
            log_p = F.log_softmax(_exact(teacher) / heat, dim=-1)
            p = log_p.exp()
            parts.append(heat**2 * (log_p.sub_(softened).mul_(p)).sum(-1))
            gradient = p.neg_().add_(softened.exp()).mul_(heat * self.kl)
        if self.ce:
            q = log_q.exp_().mul_((self.ce * real).unsqueeze(-1).to(log_q.dtype))
            q.scatter_add_(-1, places, (-self.ce * real).unsqueeze(-1).to(log_q.dtype))
            gradient = q if gradient is None else gradient.add_(q)
        assert gradient is not None
        return torch.stack(parts), gradient.to(student.dtype)

    def _in_one_pass(self, logits: Tensor) -> bool:
        """Whether the kernel of `triton_losses` serves: at τ = 1, on a GPU, up to fp32."""
        warm = not self.kl or self.divergence.temperature == 1
        return logits.is_cuda and warm and logits.dtype != torch.float64 and find_spec("triton") is not None


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
