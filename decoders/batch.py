"""The bookkeeping that all decoders share: the texts of a batch, when each row ends, and what is emitted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..harness.answers import ends, make_answer
from ..harness.interfaces import Answer, Emit, Limits, MambabenchError, Prompt, Stepper, Tokenizer
from .sampling import pick


class Row:
    """One text as it grows. Tokens after its end are dropped."""

    def __init__(self, prompt: Prompt, limits: Limits, tokenizer: Tokenizer) -> None:
        if not prompt.ids:
            raise MambabenchError("a prompt must have at least one token")
        self.ids = list(prompt.ids)
        self.new: list[int] = []
        self.prompt_tokens = len(prompt.ids)
        self.finished = False
        self._limits = limits
        self._tokenizer = tokenizer

    def extend(self, tokens: Sequence[int]) -> int:
        """Appends tokens up to the end of the text; returns how many were taken."""
        taken = 0
        for token in tokens:
            if self.finished:
                break
            self.ids.append(token)
            self.new.append(token)
            taken += 1
            whole = len(self.new) == self._limits.new_tokens
            self.finished = whole or ends(self.new, self._limits, self._tokenizer)
        return taken

    def answer(self) -> Answer:
        return make_answer(self.new, self._limits, self._tokenizer)


class Batch:
    """The rows of one request, their places on the device, and its clock."""

    def __init__(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> None:
        if limits.new_tokens < 1:
            raise MambabenchError(f"new_tokens must be at least 1, is {limits.new_tokens}")
        self.began = time.perf_counter()
        self.rows = [Row(prompt, limits, model.tokenizer) for prompt in prompts]
        self.sequence = torch.tensor([p.sequence for p in prompts], dtype=torch.int64, device=model.device)
        self._model = model
        self._limits = limits
        self._emit = emit
        self._bursts = [0] * len(prompts)

    def prefill(self, steps: int) -> Any:
        """Opens the model for calls of `steps` tokens, runs the prompts and takes each row's first token."""
        lengths = [row.prompt_tokens for row in self.rows]
        state = self._model.open(len(self.rows), max(lengths) + self._limits.new_tokens, steps)
        ids = torch.zeros(len(self.rows), max(lengths), dtype=torch.int64)
        for row, padded in zip(self.rows, ids, strict=True):
            padded[: row.prompt_tokens] = torch.tensor(row.ids)
        device = self._model.device
        logits = self._model.prefill(ids.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), state)
        first = pick(logits, self._limits, self.sequence, torch.tensor(lengths, device=device))
        self.append([[token] for token in first.tolist()])
        return state

    @property
    def running(self) -> list[int]:
        return [number for number, row in enumerate(self.rows) if not row.finished]

    def last(self) -> tuple[Tensor, Tensor]:
        """The last token of each row, int64 [B, 1], which no model has run yet, and its position, int32 [B]."""
        last = torch.tensor([[row.ids[-1]] for row in self.rows], device=self._model.device)
        start = torch.tensor([len(row.ids) - 1 for row in self.rows], dtype=torch.int32, device=self._model.device)
        return last, start

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Gives new tokens to the rows that still run, and emits them as bursts."""
        at_s = time.perf_counter() - self.began
        for number in self.running:
            taken = self.rows[number].extend(tokens[number])
            self._emit("burst", row=number, burst=self._bursts[number], at_s=at_s, tokens=taken)
            self._bursts[number] += 1

    def answers(self) -> list[Answer]:
        return [row.answer() for row in self.rows]
