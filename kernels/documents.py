"""Documents that share the rows of a packed batch: which token belongs to which."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """The document of every token. Layers of a call share one, so that what is derived is made once."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        """int32 [B, L], counted from 0 in each row, never falling."""
        self._weights: dict[tuple[int, torch.dtype], Tensor] = {}

    @classmethod
    def of(cls, positions: Tensor, keep: Tensor | None = None) -> Documents | None:
        """From position ids int [B, L]: one that does not continue the one before starts a document.

        keep bool [B, L] marks real tokens; where padding begins or ends nothing starts. None where every row is one
        document, so that nothing need be told apart (the host waits for the device to know).
        """
        starts = positions[:, 1:] != positions[:, :-1] + 1
        if keep is not None:
            starts = starts & keep[:, 1:] & keep[:, :-1]
        if not bool(starts.any()):
            return None
        return cls(torch.nn.functional.pad(starts.cumsum(1, dtype=torch.int32), (1, 0)))

    @cached_property
    def starts(self) -> Tensor:
        """bool [B, L]: the document of the token before was another. False in the first column."""
        return torch.nn.functional.pad(self.index[:, 1:] != self.index[:, :-1], (1, 0))

    def before(self, distance: int) -> Tensor:
        """bool [B, L, 1]: the token `distance` before is of the same document; what stands before the row is taken to
        be of its first."""
        earlier = self.index[:, : max(self.index.shape[1] - distance, 0)]
        first = self.index[:, :1].expand(-1, self.index.shape[1] - earlier.shape[1])
        return (torch.cat((first, earlier), dim=1) == self.index).unsqueeze(-1)

    def weight(self, distance: int, dtype: torch.dtype) -> Tensor:
        """[B, L, 1], 1 where `before` is true, else 0."""
        key = distance, dtype
        if key not in self._weights:
            self._weights[key] = self.before(distance).to(dtype)
        return self._weights[key]
