"""The causal depthwise convolution of a Mamba mixer, over a sequence and with its window carried on.

    y_t = bias + sum_k weight[:, k] u_{t - W + 1 + k}        W taps

`conv_loop` is the formula, the truth; `conv` does the same as W shifted multiply-adds, without a transposition, and
`conv_few` with fewer operations for a handful of tokens. Sums are in fp32 (fp64 for fp64 inputs) and rounded to the
inputs' dtype once.
"""

from __future__ import annotations

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
    """The W - 1 inputs before position `lengths` [B] of u [B, L, E] behind its window [B, W - 1, E], taps = W."""
    if window is None:
        window = u.new_zeros(u.shape[0], taps - 1, u.shape[2])
    return _window_at(torch.cat((window.to(u.dtype), u), dim=1), taps, lengths)


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
    exact, weight = padded.to(kind), weight.to(kind)
    y = bias.to(kind)
    for tap in range(taps):
        seen = exact[:, tap : tap + length]
        if documents is not None and tap < taps - 1:
            seen = seen * documents.before(taps - 1 - tap)
        y = torch.addcmul(y, seen, weight[:, tap])
    return y.to(u.dtype), _window_at(padded, taps, lengths)


def conv_few(joined: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A few tokens that lie behind their window already: joined [B, W - 1 + L, E] -> y [B, L, E].

    weight [E, W] and bias [E] are in the dtype of the sums, so that nothing but the result is cast.
    """
    products = joined.unfold(1, weight.shape[1], 1).transpose(2, 3) * weight.T  # [B, L, W, E]
    return (products.sum(2) + bias).to(joined.dtype)
