"""The positions that all layers share, moved by one small kernel behind the last layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, chosen, installed, kernel, served
from .ring import Plan

MODULE = f"{__package__}.triton_cursors"


def supports(start: Tensor) -> Support:
    """Whether the kernel moves cursors in the place and dtype of `start`."""
    support = served(start, (torch.int32,))
    return installed("triton") if support else support


def move(start: Tensor, settled: Tensor, saved: Tensor, end: Tensor, plan: Plan) -> None:
    """What a call at `start` leaves, all int32 [B]: where rows are settled, where their checkpoints stand, where they
    end. `start` is none of the others."""
    if chosen("cursors", supports(start)):
        kernel(MODULE, "move")(start, settled, saved, end, plan)
        return
    if plan.settle:
        saved.copy_(torch.where(plan.due(start, saved), start, saved))
        settled.copy_(start)
    torch.add(start, plan.count, out=end)
