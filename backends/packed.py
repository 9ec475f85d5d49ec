"""Documents of a packed batch as attention over ragged sequences wants them: by where they begin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.documents import Documents


class Packed(Documents):
    """The document of every token, and where each begins."""

    _offsets: Tensor | None = None
    _longest: int | None = None

    @classmethod
    def of(cls, positions: Tensor, keep: Tensor | None = None) -> Packed | None:
        found = super().of(positions, keep)
        assert found is None or isinstance(found, Packed)
        return found

    @classmethod
    def known(cls, positions: Tensor, offsets: Tensor, longest: int, most: int | None = None) -> Packed:
        """From position ids int [B, L] of which the host knows the documents, so that nothing waits for the device:
        `offsets` and `longest` as below, and `most`, the documents of the row that has most of them."""
        starts = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))
        # In one row there are at most as many as that, if all others have one.
        boundaries = len(offsets) - 1 - len(positions) if most is None else most - 1
        made = cls(starts.cumsum(1, dtype=torch.int32), boundaries)
        made._offsets, made._longest = offsets, longest
        return made

    @property
    def offsets(self) -> Tensor:
        """int32 [N + 1]: where each document begins among the tokens of all rows, one row after the other, and their
        number. (The host waits for the device if it was not given.)"""
        if self._offsets is None:
            begins = self.starts.clone()
            begins[:, 0] = True
            firsts = begins.flatten().nonzero().squeeze(1)
            self._offsets = F.pad(firsts, (0, 1), value=begins.numel()).int()
        return self._offsets

    @property
    def longest(self) -> int:
        """No document has more tokens."""
        return self._longest or self.index.shape[1]
