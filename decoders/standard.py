"""Plain decoding, one token of every row a call: the reference that all other decoders are held against."""

from __future__ import annotations

from collections.abc import Sequence

from ..harness.answers import gap
from ..harness.interfaces import Answer, Emit, Limits, OnText, Prompt, Stepper
from .adaptive import cost
from .batch import Batch
from .breakdown import breakdown
from .play import Rounds, run
from .plugin import StandardConfig


class StandardDecoder:
    """Greedy or sampled decoding. A model that brings its own loop (trait `generate`) runs that."""

    def __init__(self, config: StandardConfig | None = None) -> None:
        self.config = config or StandardConfig()

    def generate(
        self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit, on_text: OnText | None = None
    ) -> list[Answer]:
        if not prompts:
            return []
        if "generate" in model.traits:
            answers: list[Answer] = model.generate(prompts, limits, emit)  # type: ignore[attr-defined]
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                if on_text is not None and answer.text:
                    on_text(row, gap(prompt.ids, answer.ids, model.tokenizer) + answer.text)
            return answers
        batch = Batch(model, prompts, limits, emit, on_text)
        rounds = self.rounds(model, prompts, limits)
        rounds.prefill()
        batch.begin(rounds.first())
        run(batch, rounds, self.config.look)
        return batch.answers()

    def rounds(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits) -> Rounds:
        """The rounds of a request, nothing of which has been run yet."""
        return Rounds(model, prompts, limits, look=self.config.look)

    def costs(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits) -> dict[int, float]:
        """`harness.interfaces.Decoder`: seconds of a step. Of a model's own loop nothing is known."""
        if "generate" in model.traits:
            return {}
        rounds = self.rounds(model, prompts, limits)
        rounds.prefill()
        rounds.first()
        return {0: cost(model, 0, rounds.seconds)}

    def profile(
        self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, count: int
    ) -> dict[str, tuple[float, str]]:
        """`harness.interfaces.Decoder`: one round taken apart. Of a model's own loop nothing is known."""
        return {} if "generate" in model.traits else breakdown(self, model, prompts, limits, count)
