"""Whether the Triton kernels of decoding attention can serve. They are imported, Triton with them, only where they
do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, installed, kernel, served
from .reference import Norms

MODULE = f"{__package__}.triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUERIES = {2: 128, 4: 32}
"""At most for each group, by the bytes of a number: its heads times the new tokens are one tile. With 64 and more rows
tensor cores make fp32 products otherwise (wgmma), and were 100 times less exact."""
TOKENS = 16
WIDEST = {2: 256, 4: 128}


def supports(
    like: Tensor, keys_dtype: torch.dtype, heads: int, groups: int, width: int, count: int, rotary: Tensor
) -> Support:
    """Whether `decode_attention` can serve `count` tokens a row, projected in the dtype and on the device of `like`."""
    support = served(like, DTYPES)
    if not support:
        return support
    if keys_dtype != like.dtype or rotary.dtype not in DTYPES:
        return Support.no("the kernel serves caches of the projection's dtype")
    queries, widest = QUERIES[like.dtype.itemsize], WIDEST[like.dtype.itemsize]
    if count > TOKENS or heads // groups * count > queries:
        return Support.no(f"the kernel serves up to {TOKENS} tokens and {queries} queries of a group at a time")
    if width % 2 or width > widest:
        return Support.no(f"the kernel serves heads of an even width up to {widest}, not {width}")
    return installed("triton")


def decode_attention(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    rotary: Tensor,
    window: int = 0,
    norms: Norms | None = None,
) -> Tensor:
    """Shapes and effects as in the room's `decode_attention`."""
    y: Tensor = kernel(MODULE, "decode_attention")(projected, keys, values, start, rotary, window, norms)
    return y
