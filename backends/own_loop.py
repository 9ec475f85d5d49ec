"""What models that bring their own loop have in common: they make no steps, and roll nothing back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..harness.interfaces import Limits, MambabenchError, Prompt, Unsupported


class OwnLoop:
    """The calls of the stepping contract, all refused."""

    traits = frozenset({"generate"})
    refusal = "this backend decodes with its own loop"
    max_context: int

    def open(self, batch: int, context: int, steps: int) -> Any:
        """Raises Unsupported, as every call of the stepping contract."""
        raise Unsupported(self.refusal)

    def prefill(self, ids: Tensor, lengths: Tensor, state: Any, start: Tensor | None = None) -> Tensor:
        """Raises Unsupported."""
        raise Unsupported(self.refusal)

    def advance(self, ids: Tensor, start: Tensor, state: Any, settle: bool = True) -> Tensor:
        """Raises Unsupported."""
        raise Unsupported(self.refusal)

    def take(self, state: Any, rows: Tensor) -> None:
        """Raises Unsupported."""
        raise Unsupported(self.refusal)

    def check_request(self, prompts: Sequence[Prompt], limits: Limits) -> None:
        """Raises MambabenchError for prompts without tokens, and for more tokens than fit."""
        lengths = [len(prompt.ids) for prompt in prompts]
        if not min(lengths) or limits.new_tokens < 1:
            raise MambabenchError("a prompt must have at least one token, and new_tokens must be at least 1")
        if max(lengths) + limits.new_tokens > self.max_context:
            asked = f"{max(lengths)} + {limits.new_tokens}"
            raise MambabenchError(f"generate: {asked} tokens do not fit in the context of {self.max_context}")
