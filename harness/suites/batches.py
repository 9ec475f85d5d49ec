"""How many texts are run side by side: as many as a plan says, or as many as keep the device busy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from ..interfaces import Stepper

T = TypeVar("T")
TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Of a batch whose size nobody said, padding included: enough that what a call costs beside them does not count."""
MOST = 1024
"""Rows of such a batch."""


class Batches:
    """Puts texts of similar length side by side, the longest first. `batch` is the number of rows, 0: as many as
    `TOKENS` allows, half as many once memory ran out."""

    def __init__(self, model: Stepper, batch: int) -> None:
        self._batch = batch
        self._tokens = TOKENS[torch.device(model.device).type]

    def rows(self, tokens: int) -> int:
        """For texts of up to so many tokens. A power of two if nobody said, so that texts of similar length share
        memory and what was recorded on it."""
        rows = max(1, min(MOST, self._tokens // max(tokens, 1)))
        return self._batch or 1 << (rows.bit_length() - 1)

    def run(self, members: Iterable[T], tokens: Callable[[T], int], work: Callable[[Sequence[T]], None]) -> None:
        """Hands all members to `work`, batch by batch; those of equal length stay in their order."""
        left = sorted(members, key=tokens, reverse=True)
        while left:
            chosen = left[: self.rows(tokens(left[0]))]
            if self._fits(chosen, work):
                left = left[len(chosen) :]
            else:
                self._tokens //= 2

    def _fits(self, chosen: Sequence[T], work: Callable[[Sequence[T]], None]) -> bool:
        """Whether `work` had memory enough; the error is raised where a smaller batch is not allowed or possible."""
        try:
            work(chosen)
        except torch.OutOfMemoryError:
            if self._batch or len(chosen) == 1:
                raise
            return False
        return True
