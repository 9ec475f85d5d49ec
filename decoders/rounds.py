"""One round of decoding, the same for every decoder: drafts if there is a draft, one call of the model, a verdict.

Nothing in a round waits for the host, and its shapes depend on nothing but K, the number of drafts. What differs from
round to round, and from request to request, lies in the tensors of a `Board`: a round can be recorded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..harness.interfaces import DeviceDraft, Draft, Limits, Stepper
from ..kernels.rounds import ACCEPT, Drawn, finish, uniform
from .breakdown import DRAFT, TARGET, section
from .results import Results
from .sampling import judge, pick
from .texts import Texts


class Drafting(Protocol):
    """A draft at work on one batch."""

    def __call__(self, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | Drawn | None]:
        """`DeviceDraft.follow`, or `SteppingDraft.follow_drawn`. May give fewer than k tokens a row."""


@dataclass(slots=True, eq=False)
class Board:
    """All that rounds read and write beside models: their addresses are part of every recorded round."""

    texts: Texts
    results: Results
    none: Tensor
    """int32 [B], zeros: no row has drafts."""
    draft: Draft | DeviceDraft | None = None
    memory: tuple[Any] | None = None
    """What the draft opened; None before it has."""
    recorded: dict[int, Callable[[], None] | None] = field(default_factory=dict)
    """By K: what starts a round, None where one has been played but none recorded."""


def plain_round(model: Stepper, state: Any, board: Board, limits: Limits, k: int = 0) -> None:
    """One more token of every row, without drafts."""
    last, start = board.texts.last()
    with section(TARGET):
        logits = model.advance(last, start, state)
    append(board, pick(logits, limits, board.texts.stream, start))


def draft_round(
    model: Stepper, state: Any, board: Board, limits: Limits, draft: Drafting, steady: bool, k: int
) -> None:
    """Lets a draft propose k tokens a row, and the model judge them. With `steady`, a draft that samples proposes one
    more, to be judged in the bonus token's place (`sampling.judge`)."""
    texts = board.texts
    samples = limits.temperature > 0
    with section(DRAFT):
        ids, real, q = draft(texts.ids, texts.length, k + 1 if samples and steady else k)
    last, start = texts.last()
    fed = torch.cat([last, ids[:, :k]], dim=1)
    with section(TARGET):
        logits = model.advance(fed, start, state)
    accepted = None
    if q is None or not samples:
        tokens = pick(logits, limits, texts.stream, start)
    else:
        accepted, tokens = judge(logits, limits, q, ids, real, texts.stream, start)
    finish(tokens, ids[:, :k], real, texts.rows, board.results.ring, accepted=accepted)
    board.results.send()


def scripted_round(
    model: Stepper, state: Any, board: Board, limits: Limits, draft: Drafting, rate: float, k: int
) -> None:
    """A round whose verdict is thrown away: each draft stands by chance, at this rate if those before it do."""
    texts = board.texts
    with section(DRAFT):
        ids, real, _ = draft(texts.ids, texts.length, k)
    last, start = texts.last()
    fed = torch.cat([last, ids], dim=1)
    with section(TARGET):
        logits = model.advance(fed, start, state)
    tokens = pick(logits, limits, texts.stream, start)
    at = texts.length.unsqueeze(1) + torch.arange(k, device=start.device)
    stands = uniform(texts.stream, at, ACCEPT) < rate
    finish(tokens, ids, torch.full_like(real, k), texts.rows, board.results.ring, stands)
    board.results.send()


def append(board: Board, tokens: Tensor) -> None:
    """A round without drafts, of tokens int64 [B, 1]."""
    finish(tokens, tokens[:, :0], board.none, board.texts.rows, board.results.ring)
    board.results.send()


def drafting(draft: Draft | DeviceDraft, memory: Any) -> Drafting:
    """A draft with what it opened. One that wants the texts on the host gets them, and the device waits for it."""
    if not hasattr(draft, "follow"):
        return _Asked(draft, memory)
    follow = getattr(draft, "follow_drawn", draft.follow)
    return lambda ids, length, count: follow(memory, ids, length, count)


class _Asked:
    """A `Draft` in the place of a `DeviceDraft`; it always gives the k tokens that it was opened for, of which fewer
    may be wanted."""

    def __init__(self, draft: Draft, memory: Any) -> None:
        self._draft, self._memory = draft, memory

    def __call__(self, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        texts = [row[:count] for row, count in zip(ids.tolist(), length.tolist(), strict=True)]
        drafts, real, q = self._draft.propose(self._memory, texts)
        return drafts[:, :k], real.clamp(max=k), None if q is None else q[:, :k]
