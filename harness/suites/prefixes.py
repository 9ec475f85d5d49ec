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

    def prefill(
        self,
        ids: Tensor,
        lengths: Tensor,
        state: Any,
        start: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """ids int64 [B, L] right-padded, lengths int32 [B] -> logits [B, V], as `Stepper.prefill`. The lengths are told
        to a model that takes them."""
        counts = lengths.tolist() if counts is None else counts
        live = [row for row, count in enumerate(counts) if count]
        alike = start is None and len(live) > 1
        shared = common(ids[live], min(counts[row] for row in live)) if alike else 0
        if shared < LEAST:
            return self._run(ids, lengths, counts, state, start)
        first, rows = live[0], torch.arange(len(ids))
        rows[live] = first
        alone = [shared if row == first else 0 for row in range(len(ids))]
        self._run(ids[:, :shared], torch.tensor(alone, dtype=torch.int32).to(ids.device), alone, state)
        self._model.take(state, rows.to(ids.device))
        self.saved += shared * (len(live) - 1)
        left = [max(count - shared, 0) for count in counts]
        begins = torch.where(lengths > 0, shared, 0).to(torch.int32)
        return self._run(ids[:, shared:], lengths - begins, left, state, begins)

    def _run(
        self, ids: Tensor, lengths: Tensor, counts: Sequence[int], state: Any, start: Tensor | None = None
    ) -> Tensor:
        told: dict[str, Any] = {"counts": counts} if "counts" in self._model.traits else {}
        return self._model.prefill(ids, lengths, state, start, **told)


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
