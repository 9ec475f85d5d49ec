"""The attention of a decoding step: a few new tokens of every row read its cache and each other."""

import torch
from torch import Tensor

from ..support import Support, chosen
from . import fused, reference
from .reference import Norms

__all__ = ["Norms", "decode_attention", "serves"]


def serves(
    like: Tensor, keys_dtype: torch.dtype, heads: int, groups: int, width: int, count: int, rotary: Tensor
) -> Support:
    """Whether the Triton kernel runs such calls, for models that prepare something where it does not. Notes why not."""
    support = fused.supports(like, keys_dtype, heads, groups, width, count, rotary)
    chosen("decode_attention", support)
    return support


def decode_attention(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    rotary: Tensor,
    window: int = 0,
    norms: Norms | None = None,
) -> Tensor:
    """T tokens a row, of which token t stands at position start[b] + t and reads all positions up to its own.

    projected [B T, (H + 2 G) P]: queries, keys and values side by side, before norms and rotation; keys and values
    [B, S, G, P], into which those of the new tokens are written; start int [B] on the device; rotary [S, 2, P], cos
    and sin of every position. What the caches hold from start[b] on is neither read nor needed. With a window each
    token reads the last `window` positions up to its own. Returns [B T, H P] in projected's dtype.
    """
    (batch, _, groups, width), tokens = keys.shape, projected.shape[0]
    heads, given = projected.shape[1] // width - 2 * groups, (projected, keys, values, start, rotary, window, norms)
    if serves(projected, keys.dtype, heads, groups, width, tokens // batch, rotary):
        return fused.decode_attention(*given)
    return reference.decode_attention(*given)
