"""What models that bring their own loop have in common: they make no steps, and roll nothing back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.interfaces import Cost, Limits, MambabenchError, Prompt, Scores, Unsupported
from ..kernels.rounds import streams

SCORED = 1 << 26
"""Logits that `scored` holds at a time, if one text has not more."""


class OwnLoop:
    """The calls of the stepping contract, all refused."""

    traits = frozenset({"generate"})
    refusal = "this backend decodes with its own loop"
    vocab_size: int
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

    def seed(self, prompts: Sequence[Prompt], limits: Limits) -> int:
        """For torch's generator: one of its own for each batch, or a prompt that is asked again draws the same."""
        return int(streams(limits.seed, torch.tensor(prompts[0].sequence)))

    def scored(self, logits_of: Callable[[Tensor], Tensor], ids: Tensor, kind: torch.dtype) -> Scores:
        """Scores ids [B, L] by the model's forward, a few rows at a time; padding is at the right and never read."""
        targets = ids[:, 1:]
        logprob = torch.zeros(targets.shape, dtype=kind, device=ids.device)
        gap, greedy = torch.zeros_like(logprob), torch.zeros_like(targets, dtype=torch.bool)
        count = max(1, SCORED // (self.vocab_size * max(ids.shape[1], 1)))
        for first in range(0, ids.shape[0] if targets.shape[1] else 0, count):
            part = slice(first, first + count)
            logits = logits_of(ids[part, :-1]).to(kind)
            chosen, best = logits.gather(-1, targets[part, :, None]), logits.argmax(-1, keepdim=True)
            logprob[part] = (chosen - logits.logsumexp(-1, keepdim=True)).squeeze(-1)
            gap[part] = (logits.gather(-1, best) - chosen).squeeze(-1)
            greedy[part] = best.squeeze(-1) == targets[part]
        return Scores(logprob, greedy, gap)

    def weights_cost(self, model: nn.Module, embedding: Tensor, head: Tensor | None, tokens: int) -> Cost:
        """The weights, each read once and 2 FLOPs a token, without an embedding of which a step reads a few rows; what
        the model's own cache holds is not known."""
        held = {p.data_ptr(): p for p in model.parameters()}
        tied = head is not None and head.data_ptr() == embedding.data_ptr()
        read = [p for at, p in held.items() if tied or at != embedding.data_ptr()]
        return Cost(
            weight_bytes=sum(p.nbytes for p in read),
            kv_bytes=0,
            state_bytes=0,
            flops=2 * tokens * sum(p.numel() for p in read),
            held_weight_bytes=sum(p.nbytes for p in held.values()),
        )
