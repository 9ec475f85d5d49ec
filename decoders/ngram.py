"""Prompt look-up: drafts what followed the last time that the text ended like this. No model, no training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..harness.interfaces import Limits, Prompt, Stepper
from ..kernels.rounds import match
from .plugin import NgramConfig
from .texts import Texts


class NgramDraft:
    """Finds the most recent earlier occurrence of the text's last `longest` tokens, or fewer down to `shortest`, and
    copies what followed. A copy that reaches the end of the text goes on with itself, so that a loop is drafted whole;
    a text without a match gets no draft. Each call searches the whole text, on the device that it lies on."""

    def __init__(self, config: NgramConfig | None = None) -> None:
        config = config or NgramConfig()
        self.longest, self.shortest = config.longest, config.shortest

    def open(self, target: Stepper, prompts: Sequence[Prompt], limits: Limits, k: int) -> None:
        """Keeps nothing between calls."""

    def follow(self, state: None, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, None]:
        return *match(ids, length, k, self.longest, self.shortest), None

    def follow_into(self, state: None, texts: Texts, k: int) -> tuple[Tensor, None, None]:
        """`follow`, with the drafts in the place of the next round's."""
        drafts = texts.inputs.drafts(k)
        return match(texts.ids, texts.length, k, self.longest, self.shortest, drafts)[1], None, None

    def again(self, state: None, prompts: Sequence[Prompt], limits: Limits) -> bool:
        return True

    def records(self, state: None) -> bool:
        return True
