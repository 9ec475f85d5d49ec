"""Speculative decoding: a draft proposes K tokens, one call of the model judges them all.

At temperature 0, and above it with a deterministic draft, the text is that of plain decoding, token for token: the
model's choice at each position is made as plain decoding makes it, and a drafted token stands if it is that choice.
With a draft that samples, rejection sampling keeps the distribution (`sampling.reject`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    Stepper,
    Unsupported,
)
from .adaptive import Chooser, CostTable
from .batch import Batch, Round
from .plugin import SpeculativeConfig
from .rounds import draft_round, drafting, scripted_round


def speculative(config: SpeculativeConfig) -> SpeculativeDecoder:
    """Makes the decoder that a plan describes, with its draft found among the plug-ins."""
    from ..harness.plugins import build

    window = config.window if config.adapt else 0
    return SpeculativeDecoder(build(config.draft), config.k, look=config.look, steady=config.steady, window=window)


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
    ) -> None:
        self.draft = draft
        self.k = k
        self.look, self.steady, self.window, self.script = look, steady, window, script
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
        batch = Batch(model, prompts, limits, emit, on_text, steps=self.k + 1)
        state = batch.prefill()
        if not batch.running:
            return batch.answers()
        draft = drafting(self.draft, model, prompts, limits, self.k, self.steady)

        def play(k: int) -> Round:
            if self.script is not None:
                return scripted_round(batch, state, draft, k, self.script)
            return draft_round(batch, state, draft, k, self.steady)

        chooser = None
        if self.window:
            chooser = Chooser(self._costs.of(model, len(prompts), limits, self.k, play), self.window)
        k = self.k
        while batch.running:
            rounds: list[Round] = []
            for _ in range(min(self.look, batch.missing)):
                rounds.append(play(k))
                batch.texts.append(rounds[-1].tokens, rounds[-1].accepted + 1)
            accepted = batch.look(rounds, drafts=True)
            if chooser is not None:
                k = chooser.next(accepted)
        if chooser is not None:
            chooser.report(emit)
        return batch.answers()
