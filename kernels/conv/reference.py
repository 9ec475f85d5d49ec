"""The causal depthwise convolution of a Mamba mixer, over a sequence and with its window carried on.

    y_t = bias + sum_k weight[:, k] u_{t - W + 1 + k}        W taps

`conv_loop` is the formula, the truth; `conv` does the same as W shifted multiply-adds, without a transposition, and
`conv_few` with fewer operations for a handful of tokens. Sums are in fp32 (fp64 for fp64 inputs) and rounded to the
inputs' dtype once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..documents import Documents
from ..scan.reference import compute_dtype


def _with_window(u: Tensor, weight: Tensor, window: Tensor | None) -> Tensor:
    if window is None:
        window = u.new_zeros(u.shape[0], weight.shape[1] - 1, u.shape[2])
    return torch.cat((window.to(u.dtype), u), dim=1)


def _window_at(padded: Tensor, taps: int, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return padded[:, padded.shape[1] - taps + 1 :]
    index = lengths.long()[:, None] + torch.arange(taps - 1, device=padded.device)
    return padded.gather(1, index.unsqueeze(-1).expand(-1, -1, padded.shape[2]))


def window_at(u: Tensor, taps: int, window: Tensor | None, lengths: Tensor) -> Tensor:
    """The W - 1 inputs before position `lengths` [B] of u [B, L, E] behind its window [B, W - 1, E], taps = W. Reads
    no more of u than those."""
    index = (lengths.long()[:, None] + torch.arange(1 - taps, 0, device=u.device)).unsqueeze(-1)
    wide = index.expand(-1, -1, u.shape[2])
    found = u.gather(1, wide.clamp(min=0))
    if window is None:
        return found.masked_fill_(index < 0, 0)
    return torch.where(index < 0, window.to(u.dtype).gather(1, (wide + taps - 1).clamp(max=taps - 2)), found)


def conv_loop(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time. Shapes as in `conv`."""
    taps, kind = weight.shape[1], compute_dtype(u)
    padded = _with_window(u, weight, window)
    exact, weight, bias = padded.to(kind), weight.to(kind), bias.to(kind)
    outputs = []
    for t in range(u.shape[1]):
        seen = exact[:, t : t + taps]
        if documents is not None:
            same = [documents.before(taps - 1 - tap)[:, t] for tap in range(taps)]
            seen = seen * torch.stack(same, dim=1)
        outputs.append((seen * weight.T).sum(1) + bias)
    return torch.stack(outputs, dim=1).to(u.dtype), _window_at(padded, taps, lengths)


class _Masked(torch.autograd.Function):
    """The sum over taps where `same` [B, L, 1] of each tap but the last says which inputs count. Keeps nothing but its
    inputs for backward, which with a product for every mask would be most of what a layer keeps."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor, same: list[Tensor]) -> Tensor:
        length = padded.shape[1] - weight.shape[1] + 1
        y = torch.addcmul(bias, padded[:, padded.shape[1] - length :], weight[:, -1])
        for tap, mask in enumerate(same):
            y.addcmul_(padded[:, tap : tap + length] * mask, weight[:, tap])
        ctx.save_for_backward(padded, weight, *same)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        padded, weight, *same = ctx.saved_tensors
        (gradient,) = gradients
        length, to_inputs, to_weight = gradient.shape[1], torch.zeros_like(padded), torch.empty_like(weight)
        for tap in range(weight.shape[1]):
            part = gradient * same[tap] if tap < len(same) else gradient
            to_inputs[:, tap : tap + length].addcmul_(part, weight[:, tap])
            to_weight[:, tap] = (part * padded[:, tap : tap + length]).sum((0, 1))
        return to_inputs, to_weight, gradient.sum((0, 1)), None


def conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution and the window that continues it.

    u [B, L, E], weight [E, W], bias [E], window [B, W - 1, E]: the inputs just before u (zeros if not given), lengths
    int [B]: the window returned ends there instead of at L; documents: inputs of other documents count as zero, the
    window belongs to the first. Returns y [B, L, E] and the next window [B, W - 1, E].
    """
    taps, length, kind = weight.shape[1], u.shape[1], compute_dtype(u)
    padded = _with_window(u, weight, window)
    exact, weight, bias = padded.to(kind), weight.to(kind), bias.to(kind)
    if documents is not None:
        same = [documents.weight(taps - 1 - tap, kind) for tap in range(taps - 1)]
        y = _Masked.apply(exact, weight, bias, same)
        return y.to(u.dtype), _window_at(padded, taps, lengths)
    y = bias
    for tap in range(taps):
        y = torch.addcmul(y, exact[:, tap : tap + length], weight[:, tap])
    return y.to(u.dtype), _window_at(padded, taps, lengths)


def conv_few(joined: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A few tokens that lie behind their window already: joined [B, W - 1 + L, E] -> y [B, L, E].

    weight [E, W] and bias [E] are in the dtype of the sums, so that nothing but the result is cast.
    """
    products = joined.unfold(1, weight.shape[1], 1).transpose(2, 3) * weight.T  # [B, L, W, E]
    return (products.sum(2) + bias).to(joined.dtype)
