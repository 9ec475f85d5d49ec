"""What rounds made of a batch, on its way from the device to the host, which may read one round while others run."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels.rounds import Ring


class Round(NamedTuple):
    """What one call of the model made of a batch; by row."""

    tokens: list[list[int]]
    """K + 1 of each row, and maybe more that stand for nothing."""
    drafted: list[int]
    """Real drafts, at most K."""
    accepted: list[int]
    """So many of the tokens are drafts that stand; one more is emitted."""


class Results:
    """A ring of the last rounds. On a GPU it lies in memory of the host, where a slot keeps what it has until `slots`
    more rounds have been started."""

    def __init__(self, batch: int, k: int, slots: int, device: str) -> None:
        own = torch.zeros(slots, batch, k + 3, dtype=torch.int64, device=device)
        mirror = torch.zeros(own.shape, dtype=torch.int64, pin_memory=True) if own.is_cuda else None
        self.ring = Ring(own, torch.zeros(batch, dtype=torch.int64, device=device), mirror)
        self._events = [torch.cuda.Event() for _ in range(slots)] if own.is_cuda else []
        weakref.finalize(self, _written, self._events).atexit = False
        self._sent = self._read = 0

    @property
    def apart(self) -> bool:
        """Whether the host can read while the device goes on."""
        return self.ring.mirror is not None

    def begin(self) -> None:
        """Before a request's first round."""
        self.ring.turn.fill_(self._sent % len(self.ring.slots))
        self.drop()

    def sent(self) -> None:
        """Told once a round is on its way."""
        if self._events:
            self._events[self._sent % len(self._events)].record(torch.cuda.current_stream(self.ring.slots.device))
        self._sent += 1

    def drop(self) -> None:
        """Nobody wants to read the rounds so far."""
        self._read = self._sent

    def read(self, count: int) -> list[Round]:
        """The next rounds, for the last of which the host waits."""
        slots = self.ring.slots if self.ring.mirror is None else self.ring.mirror
        assert self._read + count <= self._sent <= self._read + len(slots)
        if self._events:
            self._events[(self._read + count - 1) % len(slots)].synchronize()
        found = [slots[number % len(slots)] for number in range(self._read, self._read + count)]
        self._read += count
        return [Round(each[:, :-2].tolist(), each[:, -2].tolist(), each[:, -1].tolist()) for each in found]


def _written(events: Sequence[torch.cuda.Event]) -> None:
    """Waits for rounds that nobody reads: others may get the memory that they write into."""
    if events and torch.cuda.is_current_stream_capturing():
        return
    for event in events:
        event.synchronize()
