"""Embeddings of a few tokens with their sums of squares, and the cursors of their rows, by one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..few_rows import Stream
from ..support import begun_early

if TYPE_CHECKING:
    from ..multistep import Plan
    from . import Cursors


@triton.jit
def _enter(  # type: ignore[no-untyped-def]
    ids, table, start_ptr, settled_ptr, saved_ptr, base_ptr, end_ptr, h, squares, vocabulary, across, along,
    COUNT: tl.constexpr, STEPS: tl.constexpr, REPLAY: tl.constexpr, SETTLE: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has a token; a row's first one moves the row's cursors, which no other program reads or writes."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    row, place = token // COUNT, token % COUNT
    number = tl.load(ids + row * across + place * along)
    column = tl.arange(0, COLUMNS)
    known = (number >= 0) & (number < vocabulary)
    # What is no token has no embedding: its numbers are none, rather than somebody's memory.
    v = tl.load(table + number * WIDTH + column, mask=(column < WIDTH) & known, other=float("nan"))
    tl.store(h + token * WIDTH + column, v, mask=column < WIDTH)
    if SUM:
        exact = tl.where(column < WIDTH, v.to(tl.float32), 0.0)
        tl.store(squares + token, tl.sum(exact * exact, axis=0))
    if place == 0:
        start, saved = tl.load(start_ptr + row), tl.load(saved_ptr + row)
        # Some warps may still be reading what others are about to write.
        tl.debug_barrier()
        tl.store(base_ptr + row, saved)
        if SETTLE:
            replayed = start - saved
            due = (replayed > 0) & (replayed + STEPS > REPLAY)
            tl.store(saved_ptr + row, tl.where(due, start, saved))
            tl.store(settled_ptr + row, start)
        tl.store(end_ptr + row, start + COUNT)


def enter(ids: Tensor, table: Tensor, start: Tensor, cursors: Cursors, plan: Plan) -> Stream:
    """As in the room's `enter`."""
    vocabulary, width = table.shape
    h = torch.empty(ids.numel(), width, dtype=table.dtype, device=table.device)
    sums = table.dtype in (torch.bfloat16, torch.float16)
    squares = torch.empty(len(h), 1, dtype=torch.float32, device=table.device) if sums else None
    columns = triton.next_power_of_2(width)
    _enter[(len(h),)](
        ids, table, start, cursors.settled, cursors.saved, cursors.base, cursors.end, h,
        h if squares is None else squares, vocabulary, *ids.stride(), COUNT=plan.count, STEPS=plan.steps,
        REPLAY=plan.replay, SETTLE=plan.settle, WIDTH=width, COLUMNS=columns, SUM=sums,
        num_warps=8 if columns > 1024 else 4, **begun_early(table),
    )  # fmt: skip
    return Stream(h, None, squares)
