"""Which form of a kernel of this room is the fastest for given sizes: all are timed on scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .. import tuning
from ..tuning import side_by_side
from .ring import Plan

F = TypeVar("F")
Run = Callable[[F, Tensor, Tensor, Tensor, bool], object]
"""A call in a form on a checkpoint, with start and saved; the last says that the kernel is only compiled."""

MEASURED = 1 << 20
"""Bytes of a checkpoint from which on forms are timed."""
COLD = 128 << 20
"""Bytes of checkpoints that do not fit in a cache."""


def compiled(forms: Sequence[F], state: Tensor, run: Run[F]) -> None:
    """Compiles what may run, side by side."""
    cursor = torch.zeros(state.shape[0], dtype=torch.int32, device=state.device)
    with side_by_side(ignore_errors=False):
        for form in forms:
            run(form, state, cursor, cursor, True)


def fastest(forms: Sequence[F], state: Tensor, plan: Plan, run: Run[F], repeats: int = 16) -> F:
    """The form in which `run` takes the least time on checkpoints like `state`.

    They are at every stage between two writes of the checkpoint, row by row and call by call, and they take turns, so
    that they are not found in the cache.
    """
    checkpoints = [torch.zeros_like(state) for _ in range(min(repeats, 1 + COLD // state.nbytes))]
    saved = torch.zeros(state.shape[0], dtype=torch.int32, device=state.device)
    stages = torch.arange(state.shape[0], device=state.device)
    starts = [1 + ((stages + i * plan.replay // repeats) % plan.replay).int() for i in range(repeats)]
    compiled(forms, state, run)
    turns = [(checkpoints[i % len(checkpoints)], start, saved, False) for i, start in enumerate(starts)]
    return tuning.fastest({form: [partial(run, form, *turn) for turn in turns] for form in forms})
