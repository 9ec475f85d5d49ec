"""Decoding that never writes an n-gram twice: small models loop, and this is the simplest cure."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch
from mambabench import Answer, Limits, Prompt, Unsupported
from mambabench.harness.answers import ends, make_answer
from mambabench.harness.interfaces import Emit, Stepper
from torch import Tensor

from .plugin import NoRepeatConfig


class NoRepeat:
    """The decoder `no-repeat`. Its text differs from plain decoding's, so it has no trait `lossless`."""

    def __init__(self, config: NoRepeatConfig) -> None:
        if config.n < 1:
            raise Unsupported(f"no-repeat: n must be at least 1, is {config.n}")
        self.n = config.n

    def generate(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> list[Answer]:
        if limits.top_k or limits.top_p < 1:
            raise Unsupported("no-repeat has no top_k and no top_p: leave them at 0 and 1")
        began = time.perf_counter()
        texts = [list(prompt.ids) for prompt in prompts]
        lengths = [len(text) for text in texts]
        longest = max(lengths)
        state = model.open(len(texts), longest + limits.new_tokens, 1)
        padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=model.device)
        logits = model.prefill(padded, torch.tensor(lengths, dtype=torch.int32, device=model.device), state)
        finished = [False] * len(texts)
        for burst in range(limits.new_tokens):
            for row, text in enumerate(texts):
                if finished[row]:
                    continue
                text.append(self._next(logits[row], text, prompts[row].sequence, limits))
                new = text[lengths[row] :]
                finished[row] = len(new) == limits.new_tokens or ends(new, limits, model.tokenizer)
                emit("burst", row=row, burst=burst, at_s=time.perf_counter() - began, tokens=1)
            if all(finished):
                break
            # A finished row repeats its last call, which changes nothing.
            last = torch.tensor([[text[-1]] for text in texts], device=model.device)
            start = torch.tensor([len(text) - 1 for text in texts], dtype=torch.int32, device=model.device)
            logits = model.advance(last, start, state)[:, 0]
        return [
            make_answer(text[length:], limits, model.tokenizer) for text, length in zip(texts, lengths, strict=True)
        ]

    def _next(self, logits: Tensor, text: list[int], sequence: int, limits: Limits) -> int:
        """Chooses from logits [V] of the model, which are only kept as they are where every token would repeat."""
        allowed = logits.double().clone()
        allowed[self._repeats(text)] = float("-inf")
        if bool(allowed.isinf().all()):
            allowed = logits.double()
        if limits.temperature == 0:
            return int(allowed.argmax())
        # Keyed by sequence and position, so that a text does not depend on the batch that it is written in.
        key = hashlib.sha256(f"{limits.seed} {sequence} {len(text)}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
        return int(torch.multinomial((allowed / limits.temperature).softmax(-1).cpu(), 1, generator=random))

    def _repeats(self, text: list[int]) -> list[int]:
        """The tokens that would complete an n-gram that the text already has."""
        head = self.n - 1
        tail = text[len(text) - head :]
        return [text[i + head] for i in range(len(text) - head) if text[i : i + head] == tail]
