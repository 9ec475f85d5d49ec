"""Head and loss together, over slices of positions, for vocabularies whose logits would not fit.

1,024 positions of a vocabulary of 128k are 0.5 GB in fp32, and a plain distillation step holds several such tensors at
once. Here only hidden states are kept: each slice's logits are made, used and forgotten, and made again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.interfaces import MambabenchError

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
            if to_weight is not None and to_weight.dtype == to_logits.dtype:
                to_weight.addmm_(to_logits.T, taken)
            elif to_weight is not None:
                to_weight += to_logits.T @ taken
        return to_hidden, to_weight, None, None, None, None, None, None


def _teacher_logits(hidden: Tensor | None, head: Tensor | None, rows: slice, kind: torch.dtype | None) -> Tensor | None:
    if hidden is None or head is None:
        return None
    with torch.no_grad():
        return F.linear(_cast(hidden[rows], kind).to(head.dtype), head)


def _cast(tensor: Any, kind: torch.dtype | None) -> Any:
    return tensor if tensor is None or kind is None else tensor.to(kind)


@contextmanager
def without_head(model: nn.Module) -> Iterator[Tensor]:
    """Makes the model return its last hidden states as logits meanwhile; yields the head's weight [V, E].

    The model is still called as a whole, so that what wraps it (DDP, FSDP, autocast) sees its forward. Raises
    MambabenchError for a head that is no plain linear layer.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise MambabenchError(
            f"{type(model).__name__}: `slice` needs a head that is a linear layer without bias; say slice = 0"
        )
    head.forward = _unchanged
    try:
        yield head.weight
    finally:
        del head.forward


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
