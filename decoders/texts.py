"""The texts of a batch on the model's device: what a round reads and grows without the host.

Everything lies in tensors of fixed shape that are changed in place, and can serve one request after the other. A row
whose text has ended stays as it is: it repeats its last call, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..harness.interfaces import Limits, Prompt
from ..kernels.rounds import Inputs, Rows, streams


class Texts:
    """Row b's text is the first length[b] of ids[b]; nothing is said of those behind."""

    def __init__(self, batch: int, room: int, stops: Sequence[int], device: str, drafts: int = 0) -> None:
        """`room`: most tokens of a text, with those that a round puts behind its end; `drafts`: most of a round."""
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        self.ids = torch.zeros(batch, room, dtype=torch.int64, device=device)
        self.length, self.full, self.stream = zeros, zeros.clone(), zeros.clone()
        """int64 [B]: of the text, of the text at its end, and the key of its random numbers."""
        self.running = zeros.bool()
        self.inputs = Inputs.empty(drafts, batch, device)
        """Of the next round: each round leaves them, and the draft adds what it proposes."""
        self._stops = torch.tensor(tuple(stops), dtype=torch.int64, device=device)

    def begin(self, prompts: Sequence[Prompt], limits: Limits) -> None:
        """Takes the texts of a request, as many as rows."""
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        sequence = torch.tensor([prompt.sequence for prompt in prompts])
        numbers = torch.stack([lengths, lengths + limits.new_tokens, streams(limits.seed, sequence)])
        for ours, given in zip((self.length, self.full, self.stream), numbers.to(self.length.device), strict=True):
            ours.copy_(given)
        self.ids[:, : int(lengths.max())].copy_(padded([prompt.ids for prompt in prompts]))
        self.running.fill_(True)
        self.inputs.begin(self.ids, self.length)

    @property
    def rows(self) -> Rows:
        return Rows(self.ids, self.length, self.full, self.running, self._stops, self.stream, self.inputs)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Rounds that are played meanwhile change no text."""
        running = self.running.clone()
        self.running.fill_(False)
        try:
            yield
        finally:
            self.running.copy_(running)


def padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, L], with zeros behind the shorter ones."""
    ids = torch.zeros(len(texts), max(*map(len, texts), 1), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int64)
    return ids
