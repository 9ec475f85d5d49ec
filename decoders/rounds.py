"""One round of decoding, the same for every decoder: drafts if there is a draft, one call of the model, a verdict.

Nothing in a round waits for the host, and its shapes depend on nothing but K, the number of drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..harness.interfaces import DeviceDraft, Draft, Limits, Prompt, Stepper
from .batch import Batch, Round
from .sampling import ACCEPT, agreeing, pick, probabilities, reject, uniform


class Drafting(Protocol):
    """A draft at work on one batch."""

    def __call__(self, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """`DeviceDraft.follow`. May give fewer than k tokens a row."""


def plain_round(batch: Batch, state: Any) -> Round:
    """One more token of every row."""
    last, start = batch.texts.last()
    logits = batch.model.advance(last, start, state)
    tokens = pick(logits, batch.limits, batch.texts.sequence, start.unsqueeze(1) + 1)
    none = torch.zeros_like(batch.texts.length)
    return Round(tokens, none, none)


def draft_round(batch: Batch, state: Any, draft: Drafting, k: int, steady: bool) -> Round:
    """Lets a draft propose k tokens a row, and the model judge them. With `steady`, a draft that samples proposes one
    more, to be judged in the bonus token's place (`sampling.reject`)."""
    texts, limits = batch.texts, batch.limits
    samples = limits.temperature > 0
    ids, real, q = draft(texts.ids, texts.length, k + 1 if samples and steady else k)
    last, start = texts.last()
    logits = batch.model.advance(torch.cat([last, ids[:, :k]], dim=1), start, state)
    position = start.unsqueeze(1) + torch.arange(1, k + 2, device=start.device)
    if q is None or not samples:
        tokens = pick(logits, limits, texts.sequence, position)
        accepted = agreeing(ids[:, :k], real, tokens)
    else:
        p = probabilities(logits, limits)
        accepted, tokens = reject(p, q, ids, real, limits.seed, texts.sequence, position)
    return Round(tokens, real.long().clamp(max=k), accepted)


def scripted_round(batch: Batch, state: Any, draft: Drafting, k: int, rate: float) -> Round:
    """A round whose verdict is thrown away: each draft stands by chance, at this rate if those before it do."""
    at = batch.texts.length.unsqueeze(1) + torch.arange(k, device=batch.texts.length.device)
    proposed: list[Tensor] = []

    def noted(ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        drafts, real, q = draft(ids, length, k)
        proposed.append(drafts)
        return drafts, real, q

    judged = draft_round(batch, state, noted, k, steady=False)
    stands = uniform(batch.limits.seed, batch.texts.sequence, at, ACCEPT) < rate
    accepted = stands.long().cumprod(1).sum(1)
    standing = torch.arange(k, device=at.device) < accepted.unsqueeze(1)
    tokens = torch.cat([torch.where(standing, proposed[0], judged.tokens[:, :k]), judged.tokens[:, k:]], dim=1)
    return Round(tokens, torch.full_like(accepted, k), accepted)


def drafting(
    draft: Draft | DeviceDraft, target: Stepper, prompts: Sequence[Prompt], limits: Limits, k: int, steady: bool
) -> Drafting:
    """Opens a draft for a batch. One that wants the texts on the host gets them, and the device waits for it."""
    if not hasattr(draft, "follow"):
        return _Asked(draft, draft.open(target, prompts, limits, k))
    memory = draft.open(target, prompts, limits, k + 1 if limits.temperature > 0 and steady else k)
    return lambda ids, length, count: draft.follow(memory, ids, length, count)


class _Asked:
    """A `Draft` in the place of a `DeviceDraft`; it always gives the k tokens that it was opened for, of which fewer
    may be wanted."""

    def __init__(self, draft: Draft, memory: Any) -> None:
        self._draft, self._memory = draft, memory

    def __call__(self, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        texts = [row[:count] for row, count in zip(ids.tolist(), length.tolist(), strict=True)]
        drafts, real, q = self._draft.propose(self._memory, texts)
        return drafts[:, :k], real.clamp(max=k), None if q is None else q[:, :k]
