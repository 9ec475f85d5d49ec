"""Speculative decoding: a draft proposes K tokens, one call of the model judges them all.

At temperature 0, and above it with a deterministic draft, the text is that of plain decoding, token for token: the
model's choice at each position is made as plain decoding makes it, and a drafted token stands if it is that choice.
With a draft that samples, rejection sampling keeps the distribution (`sampling.reject`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..harness.interfaces import Answer, Draft, Emit, Limits, Prompt, Stepper, Unsupported
from .batch import Batch
from .plugin import SpeculativeConfig
from .sampling import agreeing, pick, probabilities, reject


def speculative(config: SpeculativeConfig) -> SpeculativeDecoder:
    """Makes the decoder that a plan describes, with its draft found among the plug-ins."""
    from ..harness.plugins import build

    return SpeculativeDecoder(build(config.draft), config.k)


class SpeculativeDecoder:
    """Drafts `k` tokens a round, always as many: a row with fewer is padded, and its padding never counts."""

    def __init__(self, draft: Draft, k: int) -> None:
        self.draft = draft
        self.k = k

    def generate(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> list[Answer]:
        if not prompts:
            return []
        if "rollback" not in model.traits:
            raise Unsupported("speculative decoding needs a backend that can roll back (trait `rollback`)")
        batch = Batch(model, prompts, limits, emit)
        state = batch.prefill(steps=self.k + 1)
        memory = self.draft.open(model, prompts, limits, self.k)
        sequence = batch.sequence.unsqueeze(1)
        offsets = torch.arange(1, self.k + 2, device=model.device)
        played = 0
        while batch.running:
            drafts, real, q = self.draft.propose(memory, [row.ids for row in batch.rows])
            last, start = batch.last()
            logits = model.advance(torch.cat([last, drafts], dim=1), start, state)
            position = start.unsqueeze(1) + offsets
            if limits.temperature == 0 or q is None:
                tokens = pick(logits, limits, sequence, position)
                accepted = agreeing(drafts, real, tokens)
            else:
                p = probabilities(logits, limits)
                accepted, after = reject(p, q, drafts, real, limits.seed, sequence, position)
                tokens = torch.cat([drafts, drafts[:, :1]], dim=1).scatter(1, accepted.unsqueeze(1), after.unsqueeze(1))
            _close_round(batch, played, real.tolist(), accepted.tolist(), tokens.tolist(), emit)
            played += 1
        return batch.answers()


def _close_round(
    batch: Batch, number: int, drafted: list[int], accepted: list[int], tokens: list[list[int]], emit: Emit
) -> None:
    running = batch.running
    batch.append([of[: count + 1] for of, count in zip(tokens, accepted, strict=True)])
    for row in running:
        emit("round", row=row, round=number, drafted=drafted[row], accepted=accepted[row])
