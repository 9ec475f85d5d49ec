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
    a text without a match gets no draft. Each call searches the whole text, on the device that it lies on."""

    def __init__(self, config: NgramConfig | None = None) -> None:
        config = config or NgramConfig()
        self.longest, self.shortest = config.longest, config.shortest

    def open(self, target: Stepper, prompts: Sequence[Prompt], limits: Limits, k: int) -> None:
        """Keeps nothing between calls."""

    def follow(self, state: None, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, None]:
        end = self._ends(ids, length)
        found = end > 0
        # Where nothing was found, the copy is of any tokens: none of them counts.
        period = torch.where(found, length - end, 1).unsqueeze(1)
        copied = end.unsqueeze(1) + torch.arange(k, device=ids.device) % period
        return ids.gather(1, copied), found.int() * k, None

    def _ends(self, ids: Tensor, length: Tensor) -> Tensor:
        """Where the match of each row ends, int64 [B]; 0 where there is none."""
        places = torch.arange(ids.shape[1], device=ids.device)
        matches = places < (length - 1).unsqueeze(1)
        end = torch.zeros_like(length)
        for back in range(min(self.longest, ids.shape[1])):
            last = ids.gather(1, (length - 1 - back).clamp(min=0).unsqueeze(1))
            matches[:, :back] = False
            matches[:, back:] &= ids[:, : ids.shape[1] - back] == last
            if back + 1 >= self.shortest:
                latest = torch.where(matches, places + 1, 0).amax(1)
                end = torch.where(latest > 0, latest, end)
        return end
