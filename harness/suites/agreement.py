"""Where in a text a model leaves its teacher: divergence and likeliest tokens by depth in the document.

A mean over all tokens hides what a state of fixed size forgets: it may follow its teacher for a hundred tokens and no
further. The text is given, token by token (teacher-forced): nobody follows a choice of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..documents import Document, encode_many
from ..interfaces import Bench, Tokenizer
from .configs import AgreementConfig
from .divergence import BesideTeacher, compared, divergence, windows_of
from .windows import Window, batches


class Agreement(BesideTeacher[AgreementConfig]):
    """Emits for each document and group of depths two samples, weighted by tokens: `kl_per_token`, the sum of
    KL(teacher || model) in nat, and `top1_per_token`, how often both have the same likeliest token (the lowest id of a
    tie). A token's depth is how many tokens of the document, a leading one included, stand before it; of these it sees
    those of its window. `depth` is the least of its group. The teacher agrees with itself by definition."""

    name = "agreement"

    def _measure(
        self, group: Sequence[Document], tokenizer: Tokenizer, models: tuple[Any, Any] | None, bench: Bench
    ) -> None:
        encoded = list(encode_many(group, tokenizer))
        edges = (1, *(depth for depth in self.config.depths if depth > 1))
        # [document, group of depths, (nat, agreeing tokens)], on the host: there are few documents at a time.
        sums = torch.zeros(len(group), len(edges), 2, dtype=torch.float64)
        if models is not None:
            for chosen in batches(windows_of(encoded, self.config), self.config.batch):
                self._add(sums, chosen, models, bench.subject.device, torch.tensor(edges))
        for number, (document, (ids, context)) in enumerate(zip(group, encoded, strict=True)):
            for place, begin in enumerate(edges):
                end = edges[place + 1] if place + 1 < len(edges) else len(ids)
                tokens = min(end, len(ids)) - max(begin, context)
                if tokens <= 0:
                    continue
                nat, agreeing = sums[number, place].tolist() if models is not None else (0.0, float(tokens))
                shared = {"task": self.config.data, "item": document.item, "weight": tokens, "depth": begin}
                bench.emit("sample", metric="kl_per_token", value=nat, better="lower", **shared)
                bench.emit("sample", metric="top1_per_token", value=agreeing, **shared)

    def _add(
        self, sums: Tensor, windows: Sequence[Window], models: tuple[Any, Any], device: str, edges: Tensor
    ) -> None:
        documents = torch.tensor([window.pieces[0].document for window in windows])
        starts = torch.tensor([window.start for window in windows])
        for part in compared(windows, *models, device):
            rows = part.rows.cpu()
            depths = starts[rows] + part.places.cpu()
            groups = torch.bucketize(depths, edges, right=True) - 1
            agree = part.theirs.argmax(-1) == part.own.argmax(-1)
            values = torch.stack((divergence(part.theirs, part.own).double(), agree.double()), -1).cpu()
            sums.index_put_((documents[rows], groups), values, accumulate=True)
