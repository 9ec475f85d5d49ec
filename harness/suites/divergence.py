"""How far a model's next-token distributions are from its teacher's: what a ratio of perplexities does not tell.

Both models run in fp32 on any device, and so does the divergence, in log-probabilities of whole rows: its own rounding
is some 1e-6 nat a token, of either sign, and sums over tokens are taken in fp64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Document, encode_many
from ..interfaces import Artifact, Bench, Tokenizer, Unsupported
from .configs import AgreementConfig, DivergenceConfig
from .perplexity import groups
from .texts import pad
from .windows import Encoded, Window, batches, disjoint

LOGITS_AT_A_TIME = 1 << 26
"""Of each model, that are in use at once beside those of a batch."""


Config = TypeVar("Config", DivergenceConfig, AgreementConfig)


class BesideTeacher(ABC, Generic[Config]):
    """A suite that holds what a model says of documents against what its teacher says."""

    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self.config: Config = config

    @torch.inference_mode()
    def run(self, bench: Bench) -> None:
        tokenizer = bench.subject.artifact.backend.tokenizer(bench.subject.artifact.path)
        models = both(self.name, bench, self.config)
        for group in groups(bench, self.config):
            self._measure(group, tokenizer, models, bench)

    @abstractmethod
    def _measure(
        self, group: Sequence[Document], tokenizer: Tokenizer, models: tuple[Any, Any] | None, bench: Bench
    ) -> None:
        """Emits the samples of documents; without `models` the model is its own teacher."""


class Divergence(BesideTeacher[DivergenceConfig]):
    """Documents are cut into windows as by the suite `perplexity`. Emits a sample for each document: the sum over its
    tokens of KL(teacher || model) in nat, weighted by their number. The teacher's own is 0 by definition."""

    name = "divergence"

    def _measure(
        self, group: Sequence[Document], tokenizer: Tokenizer, models: tuple[Any, Any] | None, bench: Bench
    ) -> None:
        encoded = list(encode_many(group, tokenizer))
        nat = [0.0] * len(group)
        if models is not None:
            for chosen in batches(windows_of(encoded, self.config), self.config.batch):
                sums = torch.zeros(len(chosen), dtype=torch.float64, device=bench.subject.device)
                for where in compared(chosen, *models, bench.subject.device):
                    sums.index_add_(0, where.rows, divergence(where.theirs, where.own).double())
                for window, value in zip(chosen, sums.tolist(), strict=True):
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


class Compared(NamedTuple):
    """Tokens that are scored, N of a batch of windows, with what both models say of each."""

    rows: Tensor
    """int64 [N]: the window of each."""
    places: Tensor
    """int64 [N]: its place in the window."""
    theirs: Tensor
    """The teacher's logits for it, [N, V]."""
    own: Tensor
    """The model's, [N, V]."""


def both(suite: str, bench: Bench, config: DivergenceConfig | AgreementConfig) -> tuple[Any, Any] | None:
    """The teacher and the model, in fp32 on the bench's device; None where they are one.

    Raises `Unsupported` where one has too few positions."""
    subject, told = bench.subject.artifact, bench.models[config.teacher]
    for artifact in (subject, told):
        _check_room(f"{suite}: context = {config.context}", artifact, config.context - 1)
    if subject.path == told.path:
        return None
    return _load(told, bench.subject.device), _load(subject, bench.subject.device)


def windows_of(encoded: Sequence[Encoded], config: DivergenceConfig | AgreementConfig) -> Iterator[Window]:
    """The windows of documents, each with one piece."""
    for number, (ids, context) in enumerate(encoded):
        yield from disjoint(number, ids, context, config.context)


def compared(windows: Sequence[Window], teacher: Any, student: Any, device: str) -> Iterator[Compared]:
    """What two models say of the tokens that windows score, some of them at a time."""
    ids, lengths = pad([window.ids for window in windows], device)
    begins = torch.tensor([window.pieces[0].begin for window in windows], device=device)
    places = torch.arange(1, ids.shape[1], device=device)
    counted = (places >= begins[:, None]) & (places < lengths[:, None])
    theirs, own = (model(input_ids=ids[:, :-1], use_cache=False).logits for model in (teacher, student))
    if theirs.shape != own.shape:
        raise Unsupported(f"the teacher has {theirs.shape[-1]} tokens, the model {own.shape[-1]}")
    rows, columns = counted.nonzero(as_tuple=True)
    size = max(1, LOGITS_AT_A_TIME // own.shape[-1])
    for first in range(0, len(rows), size):
        where = rows[first : first + size], columns[first : first + size]
        yield Compared(where[0], where[1] + 1, theirs[where], own[where])


def divergence(theirs: Tensor, own: Tensor) -> Tensor:
    """KL(p || q) of each row, nat [N], of logits [N, V] of p and q in fp32 or better."""
    return F.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _load(artifact: Artifact, device: str) -> Any:
    model: Any = artifact.backend.module(artifact.path).eval().requires_grad_(False)
    return model.to(device)


def _check_room(what: str, artifact: Artifact, tokens: int) -> None:
    room = artifact.backend.describe(artifact.path)["max_context"]
    if tokens > room:
        raise Unsupported(f"{what} needs {tokens} positions, {artifact.name} has {room}")
