"""In which order a training sees its data: pass after pass, without a smaller batch where one ends."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Passes(Sampler[int]):
    """`number` of the rows 0 … rows - 1: each pass has all of them in a new order that depends on `seed` alone.

    Every step then has as many rows as any other, however many parts and processes share it; a smaller one at the end
    of a pass could not be shared evenly.

    >>> [sorted(list(Passes(3, 7, 0))[at : at + 3]) for at in (0, 3)]
    [[0, 1, 2], [0, 1, 2]]
    """

    def __init__(self, rows: int, number: int, seed: int) -> None:
        self.rows, self.number, self.seed = rows, number, seed

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for begun in range(0, self.number, self.rows):
            order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
            yield from order[: self.number - begun]
