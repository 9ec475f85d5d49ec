"""Moves the cursors of all rows: nothing but a launch, so that one is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begins_early

if TYPE_CHECKING:
    from .ring import Plan

ROWS = 128
"""Of a program."""


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    start_ptr, settled_ptr, saved_ptr, end_ptr, batch, COUNT, STEPS, REPLAY,
    SETTLE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < batch
    start = tl.load(start_ptr + row, mask=there, other=0)
    if SETTLE:
        replayed = start - tl.load(saved_ptr + row, mask=there, other=0)
        tl.store(saved_ptr + row, start, mask=there & (replayed > 0) & (replayed + STEPS > REPLAY))
        tl.store(settled_ptr + row, start, mask=there)
    tl.store(end_ptr + row, start + COUNT, mask=there)


def move(start: Tensor, settled: Tensor, saved: Tensor, end: Tensor, plan: Plan) -> None:
    """As in `cursors`."""
    batch, early = start.shape[0], begins_early(start.device)
    with torch.cuda.device_of(start):
        _move[triton.cdiv(batch, ROWS),](
            start, settled, saved, end, batch, plan.count, plan.steps, plan.replay,
            SETTLE=plan.settle, BLOCK=ROWS, PDL=early, launch_pdl=early, num_warps=1,
        )  # fmt: skip
