"""Head and loss together, over slices of positions, for vocabularies whose logits would not fit.

1,024 positions of a vocabulary of 128k are 0.5 GB in fp32, and a plain distillation step holds several such tensors at
once. Here only hidden states, or what backward needs of them, are kept: a slice's logits are made, used and forgotten.
`token_losses` gives the losses of every token, which may be weighed in any way afterwards, so that backward makes the
logits again; `summed_losses` gives their sum alone and makes them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..harness.interfaces import MambabenchError

BEHIND_HEAD = (
    *("final_logit_softcapping", "output_logit_soft_cap", "logits_scaling", "logit_scale"),
    *("lm_head_multiplier", "output_multiplier"),
)
"""Fields of transformers' configs by which logits are not what the head gives, unless they are 1 or None."""

TokenLosses = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(student's logits [S, V], teacher's logits [S, V] or None, targets int64 [S]) -> losses of each token [parts, S]."""


def token_losses(
    losses: TokenLosses,
    targets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    size: int = 1024,
) -> Tensor:
    """Losses of N tokens [parts, N] from hidden states, with no tensor larger than [size, V] or the head.

    hidden [N, E] and the head's weight [V, E] get gradients; teacher_hidden [N, E'] and teacher_weight [V, E'] get
    none. targets int64 [N]. Under autocast the products run in its dtype, as `nn.Linear` would. `losses` must treat
    each position alone. Equal to `losses(hidden @ weight.T, teacher_hidden @ teacher_weight.T, targets)`.
    """
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        result: Tensor = _Sliced.apply(hidden, weight, targets, teacher_hidden, teacher_weight, losses, size, kind)
    return result


class Parts(Protocol):
    """A loss with a gradient of its own, such as `losses.Distillation`."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of each part."""

    def __call__(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """The parts of each token [parts, S]; as `TokenLosses`."""

    def with_gradient(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the gradient of their weighted sum to the student's logits [S, V]."""


def summed_losses(
    loss: Parts,
    targets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over N tokens of a loss's parts, a scalar, and the sums of the parts [parts], without gradient.

    Arguments as in `token_losses`. As all tokens weigh alike, the gradient of each slice is made while its logits are
    there, and backward only scales what is kept of it: [N, E], and [V, E] if the head is trained. Logits are made once.
    """
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        total, sums = _Summed.apply(hidden, weight, targets, teacher_hidden, teacher_weight, loss, size, kind)
    return total, sums


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        loss: Parts,
        size: int,
        kind: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        head, teacher_head = _cast(weight, kind), _cast(teacher_weight, kind)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        parts = []
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            taken = _cast(hidden[rows], kind)
            logits = F.linear(taken, head)
            told = _teacher_logits(teacher_hidden, teacher_head, rows, kind)
            if to_hidden is None and to_weight is None:
                parts.append(loss(logits, told, targets[rows]).sum(1))
                continue
            values, to_logits = loss.with_gradient(logits, told, targets[rows])
            parts.append(values.sum(1))
            if to_hidden is not None:
                to_hidden[rows] = (to_logits @ head).to(hidden.dtype)
            if to_weight is not None:
                _add_product(to_weight, to_logits, taken)
        sums = torch.stack(parts).sum(0) if parts else hidden.new_zeros(len(loss.weights))
        total = sum(weight * value for weight, value in zip(loss.weights.values(), sums, strict=True))
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.mark_non_differentiable(sums)
        return cast(Tensor, total), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        kept = (None if gradient is None else gradient * upstream[0] for gradient in ctx.saved_tensors)
        return *kept, None, None, None, None, None, None


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        losses: TokenLosses,
        size: int,
        kind: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets, teacher_hidden, teacher_weight)
        ctx.losses, ctx.size, ctx.kind = losses, size, kind
        head, teacher_head = _cast(weight, kind), _cast(teacher_weight, kind)
        parts = []
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            logits = F.linear(_cast(hidden[rows], kind), head)
            parts.append(losses(logits, _teacher_logits(teacher_hidden, teacher_head, rows, kind), targets[rows]))
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, weight, targets, teacher_hidden, teacher_weight = ctx.saved_tensors
        size, kind = ctx.size, ctx.kind
        head, teacher_head = _cast(weight, kind), _cast(teacher_weight, kind)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            taken = _cast(hidden[rows], kind)
            with torch.enable_grad():
                logits = F.linear(taken, head).detach().requires_grad_()
                told = _teacher_logits(teacher_hidden, teacher_head, rows, kind)
                value = ctx.losses(logits, told, targets[rows])
            (to_logits,) = torch.autograd.grad(value, logits, gradient[:, rows])
            if to_hidden is not None:
                to_hidden[rows] = (to_logits @ head).to(hidden.dtype)
            if to_weight is not None:
                _add_product(to_weight, to_logits, taken)
        return to_hidden, to_weight, None, None, None, None, None, None


def _add_product(to_weight: Tensor, to_logits: Tensor, taken: Tensor) -> None:
    """Adds what a slice says of the head's weight [V, E], from [S, V] and [S, E]."""
    if to_weight.dtype == to_logits.dtype:
        to_weight.addmm_(to_logits.T, taken)
    else:
        to_weight += to_logits.T @ taken


def _teacher_logits(hidden: Tensor | None, head: Tensor | None, rows: slice, kind: torch.dtype | None) -> Tensor | None:
    if hidden is None or head is None:
        return None
    with torch.no_grad():
        return F.linear(_cast(hidden[rows], kind).to(head.dtype), head)


def _cast(tensor: Any, kind: torch.dtype | None) -> Any:
    return tensor if tensor is None or kind is None else tensor.to(kind)


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The model's head if it is a linear layer without bias whose products are the logits themselves."""
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find else None
    plain = isinstance(head, nn.Linear) and head.bias is None and not _changes_logits(getattr(model, "config", None))
    return head if plain else None


def _changes_logits(config: Any) -> bool:
    """Whether a model of transformers scales or caps what its head gives (Gemma, Granite, Cohere, Falcon-H1, …)."""
    parts = (config, getattr(config, "text_config", None))
    return any(getattr(part, name, None) not in (None, 1) for part in parts for name in BEHIND_HEAD)


def head_weight(model: nn.Module) -> Tensor:
    """The weight [V, E] of a plain head; after the model has run, since one that is sharded puts it together then."""
    head = plain_head(model)
    assert head is not None
    return head.weight


@contextmanager
def without_head(model: nn.Module) -> Iterator[Tensor]:
    """Makes the model return its last hidden states as logits meanwhile; yields the head's weight [V, E].

    The model is still called as a whole, so that what wraps it (DDP, FSDP, autocast) sees its forward. Raises
    MambabenchError for a head that is no plain linear layer.
    """
    head: Any = plain_head(model)
    if head is None:
        raise MambabenchError(
            f"{type(model).__name__}: `slice` needs a head that is a linear layer without bias, and nothing behind it; "
            "say slice = 0"
        )
    head.forward = _unchanged
    try:
        yield head.weight
    finally:
        del head.forward


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
