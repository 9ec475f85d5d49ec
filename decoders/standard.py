"""Plain decoding, one token of every row a call: the reference that all other decoders are held against."""

from __future__ import annotations

from collections.abc import Sequence

from ..harness.interfaces import Answer, Emit, Limits, Prompt, Stepper
from .batch import Batch
from .plugin import StandardConfig
from .sampling import pick


class StandardDecoder:
    """Greedy or sampled decoding. A model that brings its own loop (trait `generate`) runs that."""

    def __init__(self, config: StandardConfig | None = None) -> None:
        self.config = config or StandardConfig()

    def generate(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> list[Answer]:
        if not prompts:
            return []
        if "generate" in model.traits:
            return model.generate(prompts, limits, emit)  # type: ignore[attr-defined]
        batch = Batch(model, prompts, limits, emit)
        state = batch.prefill(steps=1)
        while batch.running:
            ids, start = batch.last()
            logits = model.advance(ids, start, state)
            batch.append(pick(logits, limits, batch.sequence.unsqueeze(1), start.unsqueeze(1) + 1).tolist())
        return batch.answers()
