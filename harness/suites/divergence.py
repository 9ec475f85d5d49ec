"""How far a model's next-token distributions are from its teacher's: what a ratio of perplexities does not tell.

Both models run in fp32 on any device, and so does the divergence, in log-probabilities of whole rows: its own rounding
is some 1e-6 nat a token, of either sign, and sums over tokens are taken in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Document, encode_many
from ..interfaces import Artifact, Bench, Tokenizer, Unsupported
from .configs import DivergenceConfig
from .perplexity import groups
from .texts import pad
from .windows import Window, batches, disjoint

LOGITS_AT_A_TIME = 1 << 26
"""Of each model, that are in use at once beside those of a batch."""


class Divergence:
    """Documents are cut into windows as by the suite `perplexity`. Emits a sample for each document: the sum over its
    tokens of KL(teacher || model) in nat, weighted by their number. The teacher's own is 0 by definition."""

    def __init__(self, config: DivergenceConfig) -> None:
        self.config = config

    @torch.inference_mode()
    def run(self, bench: Bench) -> None:
        subject, told = bench.subject.artifact, bench.models[self.config.teacher]
        for artifact in (subject, told):
            _check_room(artifact, self.config.context - 1)
        tokenizer = subject.backend.tokenizer(subject.path)
        models = None
        if subject.path != told.path:
            models = _load(told, bench.subject.device), _load(subject, bench.subject.device)
        for group in groups(bench, self.config):
            self._measure(group, tokenizer, models, bench)

    def _measure(
        self, group: Sequence[Document], tokenizer: Tokenizer, models: tuple[Any, Any] | None, bench: Bench
    ) -> None:
        encoded = list(encode_many(group, tokenizer))
        nat = [0.0] * len(group)
        if models is not None:
            windows = (
                window
                for number, (ids, context) in enumerate(encoded)
                for window in disjoint(number, ids, context, self.config.context)
            )
            for chosen in batches(windows, self.config.batch):
                values = _of_windows(chosen, *models, bench.subject.device)
                for window, value in zip(chosen, values, strict=True):
                    nat[window.pieces[0].document] += value
        for document, (ids, context), value in zip(group, encoded, nat, strict=True):
            if len(ids) > context:
                bench.emit(
                    "sample",
                    task=self.config.data,
                    item=document.item,
                    metric="kl_per_token",
                    value=value,
                    weight=len(ids) - context,
                    better="lower",
                )


def _of_windows(windows: Sequence[Window], teacher: Any, student: Any, device: str) -> list[float]:
    """nat of each window, summed over the tokens that it scores."""
    ids, lengths = pad([window.ids for window in windows], device)
    begins = torch.tensor([window.pieces[0].begin for window in windows], device=device)
    places = torch.arange(1, ids.shape[1], device=device)
    counted = (places >= begins[:, None]) & (places < lengths[:, None])
    theirs, own = (model(input_ids=ids[:, :-1], use_cache=False).logits for model in (teacher, student))
    if theirs.shape != own.shape:
        raise Unsupported(f"divergence: the teacher has {theirs.shape[-1]} tokens, the model {own.shape[-1]}")
    rows, columns = counted.nonzero(as_tuple=True)
    sums = torch.zeros(len(windows), dtype=torch.float64, device=device)
    size = max(1, LOGITS_AT_A_TIME // own.shape[-1])
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        where = rows[part], columns[part]
        sums.index_add_(0, rows[part], divergence(theirs[where], own[where]).double())
    return [float(value) for value in sums.tolist()]


def divergence(theirs: Tensor, own: Tensor) -> Tensor:
    """KL(p || q) of each row, nat [N], of logits [N, V] of p and q in fp32 or better."""
    return F.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _load(artifact: Artifact, device: str) -> Any:
    model: Any = artifact.backend.module(artifact.path).eval().requires_grad_(False)
    return model.to(device)


def _check_room(artifact: Artifact, tokens: int) -> None:
    room = artifact.backend.describe(artifact.path)["max_context"]
    if tokens > room:
        raise Unsupported(f"divergence: needs {tokens} positions, {artifact.name} has {room}")
