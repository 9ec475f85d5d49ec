"""Documents that share the rows of a packed batch: which token belongs to which."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """The document of every token. Layers of a call share one, so that what is derived is made once."""

    def __init__(self, index: Tensor, boundaries: int | None = None) -> None:
        """`boundaries`: in the row that has most of them; counted when it is needed if not given, which makes the host
        wait for the device."""
        self.index = index
        """int32 [B, L], counted from 0 in each row, never falling."""
        self._boundaries = boundaries
        self._weights: dict[tuple[int, torch.dtype], Tensor] = {}

    @classmethod
    def of(cls, positions: Tensor, keep: Tensor | None = None) -> Documents | None:
        """From position ids int [B, L]: one that does not continue the one before starts a document.

        keep bool [B, L] marks real tokens: nothing starts at others, and a token continues the last real one, whether
        the places between them were counted or not. None where every row is one document, so that nothing need be told
        apart (the host waits for the device to know).
        """
        if keep is None:
            starts = positions[:, 1:] != positions[:, :-1] + 1
        else:
            places = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
            last = places.masked_fill(~keep, -1).cummax(1).values[:, :-1]
            ahead = positions[:, 1:] - positions.gather(1, last.clamp(min=0))
            starts = (ahead != 1) & (ahead != places[:, 1:] - last) & keep[:, 1:] & (last >= 0)
        index = torch.nn.functional.pad(starts.cumsum(1, dtype=torch.int32), (1, 0))
        boundaries = int(index[:, -1].max()) if index.numel() else 0
        return cls(index, boundaries) if boundaries else None

    @cached_property
    def sequence(self) -> Tensor:
        """`index` as kernels want it: int32, contiguous."""
        return self.index.to(torch.int32).contiguous()

    @cached_property
    def starts(self) -> Tensor:
        """bool [B, L]: the document of the token before was another. False in the first column."""
        return torch.nn.functional.pad(self.index[:, 1:] != self.index[:, :-1], (1, 0))

    @cached_property
    def spread(self) -> Spread:
        """The rows with an empty place in front of every document but the first."""
        if self._boundaries is None:
            self._boundaries = int(self.starts.sum(1).max())
        return Spread(self.starts, self._boundaries)

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


class Spread:
    """Rows of L tokens laid out in L' places, one of them empty in front of every document but the first. Rows with
    fewer documents have empty places behind."""

    def __init__(self, starts: Tensor, boundaries: int) -> None:
        """starts bool [B, L], `boundaries` at most in a row."""
        batch, length = starts.shape
        self.length = length + boundaries
        """L'."""
        within = starts.cumsum(1) + torch.arange(length, device=starts.device)
        self.breaks = torch.zeros(batch, self.length, dtype=torch.bool, device=starts.device)
        """bool [B, L']: the place in front of a document."""
        self.breaks.scatter_(1, within - starts.long(), starts)
        rows = torch.arange(batch, device=starts.device).unsqueeze(1) * self.length
        self.places = (rows + within).flatten()
        """int64 [B L], of the tokens, flat over B x L'."""
