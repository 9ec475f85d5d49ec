"""The texts of a batch on the model's device: what a round reads and grows without the host.

Everything lies in tensors of fixed shape that are changed in place. A row whose text has ended stays as it is: it
repeats its last call, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..harness.interfaces import Limits, Prompt


class Texts:
    """Row b's text is the first length[b] of ids[b]; nothing is said of those behind."""

    def __init__(self, prompts: Sequence[Prompt], limits: Limits, steps: int, device: str) -> None:
        lengths = [len(prompt.ids) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths) + limits.new_tokens + steps, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = torch.tensor(prompt.ids)
        self.ids = ids.to(device)
        """int64 [B, S], with room for `steps` tokens behind the longest text."""
        self.length = torch.tensor(lengths, dtype=torch.int64, device=device)
        self.full = self.length + limits.new_tokens
        """int64 [B]: the length at which a text ends."""
        self.running = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.sequence = torch.tensor([[prompt.sequence] for prompt in prompts], dtype=torch.int64, device=device)
        """int64 [B, 1], the key of random numbers."""
        self.longest = max(lengths)
        """Tokens of the longest prompt."""
        self._stops = torch.tensor(limits.stop_tokens, dtype=torch.int64, device=device)

    def last(self) -> tuple[Tensor, Tensor]:
        """The last token of each row, int64 [B, 1], which no model has run yet, and its position, int32 [B]."""
        at = self.length - 1
        return self.ids.gather(1, at.unsqueeze(1)), at.int()

    def append(self, tokens: Tensor, count: Tensor) -> None:
        """Puts the first count[b] >= 1 (int64 [B]) of tokens int64 [B, T] behind each text that still runs, up to its
        end: its last token, or a stop token among them."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        self.ids.scatter_(1, self.length.unsqueeze(1) + places, tokens)
        grown = torch.minimum(self.length + count, self.full)
        if self._stops.numel():
            # places.shape[0] stands for "none of them".
            stops = torch.where((tokens.unsqueeze(-1) == self._stops).any(-1), places, places.shape[0]).amin(1)
            ended = self.length + stops + 1
            stopped = ended <= grown
            grown = torch.minimum(grown, ended)
        else:
            stopped = torch.zeros_like(self.running)
        self.length.copy_(torch.where(self.running, grown, self.length))
        self.running.logical_and_(~stopped & (self.length < self.full))
