"""Speculative decoding: a draft proposes K tokens, one call of the model judges them all.

At temperature 0, and above it with a deterministic draft, the text is that of plain decoding, token for token: the
model's choice at each position is made as plain decoding makes it, and a drafted token stands if it is that choice.
With a draft that samples, rejection sampling keeps the distribution (`sampling.reject`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..harness.interfaces import (
    Answer,
    Artifact,
    Binds,
    DeviceDraft,
    Draft,
    Emit,
    Limits,
    OnText,
    Prompt,
    Rollback,
    Stepper,
    Unsupported,
)
from .adaptive import Chooser, CostTable, cost
from .batch import Batch
from .breakdown import breakdown
from .play import Rounds, run
from .plugin import SpeculativeConfig


def speculative(config: SpeculativeConfig) -> SpeculativeDecoder:
    """Makes the decoder that a plan describes, with its draft found among the plug-ins."""
    from ..harness.plugins import build

    window = config.window if config.adapt else 0
    return SpeculativeDecoder(
        build(config.draft),
        config.k,
        look=config.look,
        steady=config.steady,
        window=window,
        rollback=config.rollback,
    )


class SpeculativeDecoder:
    """Drafts `k` tokens a round, always as many: a row with fewer is padded, and its padding never counts.

    With a `window` above 0, K is chosen anew from 1 … k after as many rounds (`adaptive`). With a `script` that share
    of drafts stands by chance, whatever the model says (`scripted`).
    """

    def __init__(
        self,
        draft: Draft | DeviceDraft,
        k: int,
        *,
        look: int = 1,
        steady: bool = True,
        window: int = 0,
        script: float | None = None,
        rollback: Rollback = "replay",
    ) -> None:
        self.draft = draft
        self.k = k
        self.look, self.steady, self.window, self.script = look, steady, window, script
        self.rollback = rollback
        self._costs = CostTable()

    def bind(self, models: Mapping[str, Artifact]) -> None:
        if isinstance(self.draft, Binds):
            self.draft.bind(models)

    def generate(
        self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit, on_text: OnText | None = None
    ) -> list[Answer]:
        if not prompts:
            return []
        if "rollback" not in model.traits:
            raise Unsupported("speculative decoding needs a backend that can roll back (trait `rollback`)")
        told = emit if self.script is None else _scripted(emit, self.script)
        batch = Batch(model, prompts, limits, told, on_text)
        rounds = self.rounds(model, prompts, limits)
        rounds.prefill()
        if limits.new_tokens > 1:
            # Before the host waits for the first tokens, so that the device goes on to the draft's prompts at once.
            rounds.open_draft()
        batch.begin(rounds.first())
        chooser = None
        if self.window and batch.running:
            costs = self._costs.of(model, len(prompts), rounds.longest, limits, self.k, rounds.seconds)
            chooser = Chooser(costs, self.window)
        run(batch, rounds, self.look, chooser)
        if chooser is not None:
            chooser.report(emit)
        return batch.answers()

    def rounds(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits) -> Rounds:
        """The rounds of a request, nothing of which has been run yet."""
        given = self.look, self.draft, self.steady, self.script, self.rollback
        return Rounds(model, prompts, limits, self.k + 1, *given)

    def costs(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits) -> dict[int, float]:
        """`harness.interfaces.Decoder`: seconds of a round, of every K that may be chosen."""
        rounds = self.rounds(model, prompts, limits)
        rounds.prefill()
        rounds.open_draft()
        rounds.first()
        return {k: cost(model, k, rounds.seconds) for k in range(1 if self.window else self.k, self.k + 1)}

    def profile(
        self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, count: int
    ) -> dict[str, tuple[float, str]]:
        """`harness.interfaces.Decoder`: one round, of the most drafts, taken apart."""
        return breakdown(self, model, prompts, limits, count)


def _scripted(emit: Emit, rate: float) -> Emit:
    """Says of each round that its verdict was chance."""

    def marked(kind: str, /, **fields: Any) -> None:
        emit(kind, **fields, **({"scripted": rate} if kind == "round" else {}))

    return marked
