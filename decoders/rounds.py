"""One round of decoding, the same for every decoder: drafts if there is a draft, one call of the model, a verdict.

Nothing in a round waits for the host, and its shapes depend on nothing but K, the number of drafts. What differs from
round to round, and from request to request, lies in the tensors of a `Board`: a round can be recorded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ..harness.interfaces import DeviceDraft, Draft, Limits, Stepper
from ..kernels.rounds import Drawn, finish, finish_greedy, finish_rejected
from .breakdown import DRAFT, TARGET, section
from .results import Results
from .sampling import advance, judge, kept, pick
from .texts import Texts


class Drafting(Protocol):
    """A draft at work on one batch."""

    def __call__(self, texts: Texts, k: int) -> tuple[Tensor, Tensor | Drawn | None, Tensor | None]:
        """Puts k tokens a row, or all that it has, into the next round's inputs. Returns how many are real, int32 [B],
        what they were drawn from, if they were, and logits [B, V] whose likeliest the last of them is, if it is still
        to be put there."""


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
    append(board, limits, _run(model, state, board, 0))


def draft_round(
    model: Stepper, state: Any, board: Board, limits: Limits, draft: Drafting, steady: bool, rate: float | None, k: int
) -> None:
    """Lets a draft propose k tokens a row, and the model judge them. With `steady`, a draft that samples proposes one
    more, to be judged in the bonus token's place (`sampling.judge`). With a `rate` the verdict is thrown away: each
    draft stands by chance, at this rate if those before it do."""
    samples = limits.temperature > 0
    asked = k + 1 if samples and steady else k
    with section(DRAFT):
        real, q, last = draft(board.texts, asked)
    logits = _run(model, state, board, k, last)
    if q is None or not samples:
        _pick(board, limits, logits, real, rate)
    else:
        _judge(board, limits, logits, real, q, asked, rate)


def append(board: Board, limits: Limits, logits: Tensor) -> None:
    """A round without drafts, of logits [B, 1, V] at the end of each text."""
    _pick(board, limits, logits, board.none)


def _run(model: Stepper, state: Any, board: Board, k: int, last: Tensor | None = None) -> Tensor:
    """Logits [B, k + 1, V] behind the texts' last tokens and k drafts."""
    inputs = board.texts.inputs
    with section(TARGET):
        return advance(model, inputs.ids(1, k + 1), inputs.positions[1], state, last=last)


def _pick(board: Board, limits: Limits, logits: Tensor, real: Tensor, rate: float | None = None) -> None:
    """The end of a round whose drafts are held against what plain decoding emits."""
    texts, ring = board.texts, board.results.ring
    drafts = texts.inputs.drafts(logits.shape[1] - 1)
    if limits.temperature == 0:
        finish_greedy(logits, drafts, real, texts.rows, ring, rate)
    else:
        tokens = pick(logits, limits, texts.stream, texts.inputs.positions[1])
        finish(tokens, drafts, real, texts.rows, ring, rate)


def _judge(
    board: Board, limits: Limits, logits: Tensor, real: Tensor, q: Tensor | Drawn, asked: int, rate: float | None
) -> None:
    """The end of a round whose drafts were drawn from q."""
    texts, ring = board.texts, board.results.ring
    if isinstance(q, Drawn):
        finish_rejected(kept(logits, limits), q, texts.inputs.drafts(asked), real, texts.rows, ring, rate)
        return
    drafts, before = texts.inputs.drafts(q.shape[1]), texts.inputs.positions[1]
    accepted, tokens = judge(logits, limits, q, drafts, real, texts.stream, before)
    drafts = drafts[:, : logits.shape[1] - 1]
    finish(tokens, drafts, real, texts.rows, ring, rate, accepted if rate is None else None)


def drafting(draft: Draft | DeviceDraft, memory: Any) -> Drafting:
    """A draft with what it opened. One that wants the texts on the host gets them, and the device waits for it."""
    if hasattr(draft, "follow_into"):
        return partial(draft.follow_into, memory)
    follow = partial(draft.follow, memory) if hasattr(draft, "follow") else _Asked(draft, memory)

    def put(texts: Texts, k: int) -> tuple[Tensor, Tensor | None, None]:
        drafts, real, q = follow(texts.ids, texts.length, k)
        texts.inputs.drafts(drafts.shape[1]).copy_(drafts)
        return real, q, None

    return put


class _Asked:
    """A `Draft` in the place of a `DeviceDraft`; it always gives the k tokens that it was opened for, of which fewer
    may be wanted."""

    def __init__(self, draft: Draft, memory: Any) -> None:
        self._draft, self._memory = draft, memory

    def __call__(self, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        texts = [row[:count] for row, count in zip(ids.tolist(), length.tolist(), strict=True)]
        drafts, real, q = self._draft.propose(self._memory, texts)
        return drafts[:, :k], real.clamp(max=k), None if q is None else q[:, :k]
