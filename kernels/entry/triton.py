"""Embeddings of a few tokens with their sums of squares, the pick of the last of them and the cursors of their rows, by
one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..few_rows import Stream
from ..rounds import WHOLE
from ..rounds.triton import greedy, largest_of
from ..support import begun_early

if TYPE_CHECKING:
    from ..multistep import Plan
    from . import Cursors


@triton.jit
def _enter(  # type: ignore[no-untyped-def]
    ids, table, start_ptr, settled_ptr, saved_ptr, base_ptr, end_ptr, h, squares, vocabulary, across, along,
    last, stride, logits,
    COUNT: tl.constexpr, STEPS: tl.constexpr, REPLAY: tl.constexpr, SETTLE: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr, PART: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program has a token. A row's first one moves the row's cursors, and its last one picks its token of as many
    `logits`, with a PART: nobody else reads or writes these."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    row, place = token // COUNT, token % COUNT
    number = tl.load(ids + row * across + place * along)
    if PART:  # noqa: SIM102 - one of the two is known when the kernel is compiled
        if place == COUNT - 1:
            number = largest_of(last + row * stride, tl.arange(0, PART), logits)[1]
            tl.store(ids + row * across + place * along, number)
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


def enter(
    ids: Tensor, table: Tensor, start: Tensor, cursors: Cursors, plan: Plan, last: Tensor | None = None
) -> Stream:
    """As in the room's `enter`."""
    if last is not None and last.shape[1] > WHOLE:
        greedy(last, ids[:, -1])
        last = None
    vocabulary, width = table.shape
    h = torch.empty(ids.numel(), width, dtype=table.dtype, device=table.device)
    sums = table.dtype in (torch.bfloat16, torch.float16)
    squares = torch.empty(len(h), 1, dtype=torch.float32, device=table.device) if sums else None
    columns, part = triton.next_power_of_2(width), 0 if last is None else triton.next_power_of_2(last.shape[1])
    logits = (h, 0, 0) if last is None else (last, last.stride(0), last.shape[1])
    _enter[(len(h),)](
        ids, table, start, cursors.settled, cursors.saved, cursors.base, cursors.end, h,
        h if squares is None else squares, vocabulary, *ids.stride(), *logits, COUNT=plan.count, STEPS=plan.steps,
        REPLAY=plan.replay, SETTLE=plan.settle, WIDTH=width, COLUMNS=columns, SUM=sums, PART=part,
        num_warps=8, **begun_early(table),
    )  # fmt: skip
    return Stream(h, None, squares)
