"""Prompts that begin alike are run once up to where they part: few-shot examples, system prompts, instructions.

A model is wrapped, so that every decoder gains by it and knows nothing of it. What follows a shared beginning is run
from there by the contract's own `start`, so that results are those of whole prompts up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..interfaces import Stepper

LEAST = 32
"""Tokens that must be shared before a second call and a copy of the state are cheaper than running them again."""


class SharedPrefix:
    """A `Stepper` whose `prefill` runs what all its prompts begin with in one row alone."""

    def __init__(self, model: Stepper) -> None:
        self._model = model
        self.saved = 0
        """Tokens that were not run again so far."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prefill(self, ids: Tensor, lengths: Tensor, state: Any, start: Tensor | None = None) -> Tensor:
        """ids int64 [B, L] right-padded, lengths int32 [B] -> logits [B, V], as `Stepper.prefill`."""
        live = lengths.nonzero().squeeze(1)
        shared = common(ids[live], int(lengths[live].min())) if start is None and len(live) > 1 else 0
        if shared < LEAST:
            return self._model.prefill(ids, lengths, state, start)
        first, rows = live[0], torch.arange(len(ids), device=ids.device)
        alone = torch.zeros_like(lengths)
        alone[first] = shared
        self._model.prefill(ids[:, :shared], alone, state)
        rows[live] = first
        self._model.take(state, rows)
        self.saved += shared * (len(live) - 1)
        begins = torch.where(lengths > 0, shared, 0).to(torch.int32)
        return self._model.prefill(ids[:, shared:], lengths - begins, state, begins)


def common(ids: Tensor, shortest: int) -> int:
    """Tokens that all rows of ids [B, L] begin with; at most `shortest - 1`, so that each row has one left.

    >>> common(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]), 4), common(torch.tensor([[1, 2, 3, 0], [1, 2, 3, 0]]), 3)
    (3, 2)
    """
    same = (ids[:, : shortest - 1] == ids[:1, : shortest - 1]).all(0)
    return int(same.long().cumprod(0).sum())


def suffixes(contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], width: int) -> Tensor:
    """What is run behind contexts to score continuations: the last token of the context and all of the continuation but
    its last. int64 [B, width], padded with 0."""
    ids = torch.zeros(len(contexts), width, dtype=torch.int64)
    for row, context, continuation in zip(ids, contexts, continuations, strict=True):
        run = [context[-1], *continuation[:-1]]
        row[: len(run)] = torch.tensor(run)
    return ids
