"""Documents that share the rows of a packed batch: which token belongs to which, and the rows they would have alone."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """The document of every token. Layers of a call share one, so that what is derived is made once."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        """int32 [B, L], counted from 0 in each row, never falling."""

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

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The M documents as rows of their own, up to K tokens long.

        take int64 [M, K]: the token of the flat B x L batch in each place (any token in places that are empty); real
        bool [M, K]: the place is not empty; back int64 [B, L]: the place of each token in the flat M x K block.
        """
        batch, length = self.index.shape
        begins = self.starts.clone()
        begins[:, 0] = True
        first = begins.flatten().nonzero().squeeze(1)
        sizes = torch.diff(first, append=first.new_tensor([batch * length]))
        places = torch.arange(int(sizes.max()), device=first.device)
        real = places < sizes.unsqueeze(1)
        take = (first.unsqueeze(1) + places).clamp(max=batch * length - 1)
        tokens = torch.arange(batch * length, device=first.device)
        document = begins.flatten().long().cumsum(0) - 1
        back = document * places.shape[0] + tokens - first[document]
        return take, real, back.view(batch, length)
