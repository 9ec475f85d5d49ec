"""What a call of the stepping engine begins with: the embeddings of its tokens, and the positions that all layers
share. Both are next to no work, so that one launch is what counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..few_rows import Stream
from ..multistep import Plan
from ..rounds import greedy
from ..support import Support, chosen, installed, kernel, served

__all__ = ["Cursors", "enter", "supports"]

MODULE = f"{__package__}.triton"


class Cursors(NamedTuple):
    """Positions of rows, int32 [B] each."""

    settled: Tensor
    saved: Tensor
    """Where the checkpoints stand behind the last call."""
    base: Tensor
    """Where they stood before it, which is what its layers go on from."""
    end: Tensor


def supports(table: Tensor, start: Tensor) -> Support:
    """Whether the kernel reads the embeddings [V, E] and moves cursors in the place and dtype of `start`."""
    support = served(table, (torch.bfloat16, torch.float16, torch.float32, torch.float64))
    if support and not (table.is_contiguous() and start.dtype == torch.int32):
        return Support.no("the table is not contiguous, or positions are not int32")
    return installed("triton") if support else support


def enter(
    ids: Tensor, table: Tensor, start: Tensor, cursors: Cursors, plan: Plan, last: Tensor | None = None
) -> Stream:
    """The residual stream [B * T, E] of tokens ids int64 [B, T], any strides, of table [V, E], and the cursors as
    the call at `start` int32 [B] leaves them; `start` is none of them. Kernels make the sums of squares too.

    The likeliest of logits `last` [B, V], if given, are put into ids[:, -1] first, which are contiguous then."""
    if chosen("enter", supports(table, start)):
        stream: Stream = kernel(MODULE, "enter")(ids, table, start, cursors, plan, last)
        return stream
    if last is not None:
        greedy(last, ids[:, -1])
    cursors.base.copy_(cursors.saved)
    if plan.settle:
        cursors.saved.copy_(torch.where(plan.due(start, cursors.saved), start, cursors.saved))
        cursors.settled.copy_(start)
    torch.add(start, plan.count, out=cursors.end)
    return Stream(F.embedding(ids.flatten(), table))
