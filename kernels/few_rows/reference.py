"""The same by kernels for each step: cuBLAS's products, norms and gates of other rooms; on a CPU plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pointwise import swiglu_packed
from ..rms_norm import add_rms_norm

SMALLEST = 16
"""Rows of the weights that a program has, at least."""


@dataclass(eq=False)
class Projection:
    """The weights of a product with the residual stream at one of its ends."""

    weight: Tensor
    """[N, K]."""
    bias: Tensor | None = None
    """[N]."""
    norm: Tensor | None = None
    """[K], of the norm before it."""
    eps: float = 0.0
    gated: bool = False
    """The weight's lines are those of a gate and of what it lets through, N / 2 each."""

    @property
    def lines(self) -> int:
        """Numbers that a row gives."""
        return self.weight.shape[0] // (2 if self.gated else 1)

    @cached_property
    def exact_norm(self) -> Tensor | None:
        """In fp32, which kernels fetch in larger pieces."""
        return None if self.norm is None else self.norm.float()

    @cached_property
    def counters(self) -> Tensor:
        """int32, for each block of lines: zero but while a kernel runs."""
        return torch.zeros(-(-self.weight.shape[0] // SMALLEST), dtype=torch.int32, device=self.weight.device)


class Stream(NamedTuple):
    """The residual stream between two products."""

    h: Tensor
    """[M, E]."""
    added: Tensor | None = None
    """[M, E], which is still to be added: the sum is made with the norm that follows it."""
    squares: Tensor | None = None
    """fp32 [M, parts] that add up to the sum of squares of each row of h, where a kernel has left them."""


class Unscaled(NamedTuple):
    """Rows [M, K] of a norm but for the division by their root mean square, which is left to the product: it may as
    well divide what comes out. They are rounded as often, before the division instead of behind it."""

    x: Tensor
    squares: Tensor
    """fp32 [M, parts] that add up to the sum of squares of each row, ahead of the norm's weight."""
    eps: float

    def divided(self) -> Tensor:
        """The rows of the norm."""
        squares = self.squares.sum(1, keepdim=True) / self.x.shape[1]
        return (self.x * torch.rsqrt(squares + self.eps)).to(self.x.dtype)


def project(given: Projection, stream: Stream, kind: torch.dtype) -> tuple[Tensor, Stream]:
    """Shapes as in the room's `project`."""
    h, normed = normed_sum(given, stream)
    if kind != normed.dtype:
        y = _wider(normed, given.weight, kind)
        return (y if given.bias is None else y + given.bias), Stream(h)
    y = F.linear(normed, given.weight, given.bias)
    return (swiglu_packed(y) if given.gated else y), Stream(h)


def normed_sum(given: Projection, stream: Stream) -> tuple[Tensor, Tensor]:
    """The whole stream and its norm."""
    assert given.norm is not None
    if stream.added is None:
        return stream.h, F.rms_norm(stream.h, given.norm.shape, given.norm, given.eps)
    return add_rms_norm(stream.h, stream.added, given.norm, given.eps)


def _wider(x: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
    """x times weight in `kind`, of inputs in a narrower one."""
    if weight.is_cuda:
        return torch.mm(x, weight.T, out_dtype=kind)
    return F.linear(x.to(kind), weight.to(kind))


def add_projected(given: Projection, x: Tensor | Unscaled, stream: Stream) -> Stream:
    """Shapes as in the room's `add_projected`. The sum is left to the norm that follows."""
    assert stream.added is None
    x = x.divided() if isinstance(x, Unscaled) else x
    return Stream(stream.h, F.linear(x, given.weight, given.bias))
