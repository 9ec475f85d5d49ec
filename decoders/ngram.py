"""Prompt look-up: drafts what followed the last time that the text ended like this. No model, no training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..harness.interfaces import Limits, Prompt, Stepper
from .plugin import NgramConfig


class NgramDraft:
    """Finds the most recent earlier occurrence of the text's last `longest` tokens, or fewer down to `shortest`, and
    copies what followed. A copy that reaches the end of the text goes on with itself, so that a loop is drafted whole;
    a text without a match gets no draft."""

    def __init__(self, config: NgramConfig | None = None) -> None:
        config = config or NgramConfig()
        self.sizes = range(config.longest, config.shortest - 1, -1)

    def open(self, target: Stepper, prompts: Sequence[Prompt], limits: Limits, k: int) -> _Memory:
        return _Memory([_Index(self.sizes) for _ in prompts], k, target.device)

    def propose(self, state: _Memory, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, None]:
        copies = [index.following(text, state.k) for index, text in zip(state.rows, texts, strict=True)]
        ids = torch.tensor([copy or [0] * state.k for copy in copies], dtype=torch.int64, device=state.device)
        real = torch.tensor([len(copy) for copy in copies], dtype=torch.int32, device=state.device)
        return ids, real, None


class _Memory:
    def __init__(self, rows: list[_Index], k: int, device: str) -> None:
        self.rows = rows
        self.k = k
        self.device = device


class _Index:
    """Where each n-gram of a growing text last ended."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def following(self, text: Sequence[int], k: int) -> list[int]:
        """The k tokens to propose after `text`, or none."""
        for end in range(self._indexed + 1, len(text)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(text[end - size : end])] = end
        self._indexed = max(self._indexed, len(text) - 1)
        for size in self._sizes:
            found = self._ends.get(tuple(text[-size:])) if size < len(text) else None
            if found is not None:
                period = len(text) - found
                return [text[found + i % period] for i in range(k)]
        return []
