"""The bookkeeping that all decoders share: the texts of a batch, when each row ends, and what is emitted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..harness.interfaces import Answer, Emit, Limits, MambabenchError, Prompt, Stepper, Tokenizer
from .sampling import pick


class Row:
    """One text as it grows. Tokens after its end are dropped."""

    def __init__(self, prompt: Prompt, limits: Limits, tokenizer: Tokenizer) -> None:
        if not prompt.ids:
            raise MambabenchError("a prompt must have at least one token")
        self.ids = list(prompt.ids)
        self.prompt_tokens = len(prompt.ids)
        self.finish: Literal["length", "stop", ""] = ""
        self._limits = limits
        self._tokenizer = tokenizer
        # A character is at most four byte tokens, so this many tokens hold the longest stop string and more.
        self._window = 16 + 4 * max(map(len, limits.stop_strings), default=0)

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    def extend(self, tokens: Sequence[int]) -> int:
        """Appends tokens up to the end of the text; returns how many were taken."""
        taken = 0
        for token in tokens:
            if self.finish:
                break
            self.ids.append(token)
            taken += 1
            if token in self._limits.stop_tokens or self._has_stop_string():
                self.finish = "stop"
            elif len(self.ids) - self.prompt_tokens == self._limits.new_tokens:
                self.finish = "length"
        return taken

    def answer(self) -> Answer:
        new = self.new
        shown = new[:-1] if new[-1] in self._limits.stop_tokens else new
        text = self._tokenizer.decode(shown, skip_special_tokens=True)
        ends = [self._end(shown, text, string) for string in self._limits.stop_strings]
        return Answer(tuple(new), text[: min(ends, default=len(text))], self.finish or "length")

    def _has_stop_string(self) -> bool:
        if not self._limits.stop_strings:
            return False
        tail = self.ids[max(self.prompt_tokens, len(self.ids) - self._window) :]
        forms = [self._tokenizer.decode(tail, skip_special_tokens=skip) for skip in (False, True)]
        return any(string in form for string in self._limits.stop_strings for form in forms)

    def _end(self, shown: list[int], text: str, stop: str) -> int:
        """Where `text` ends by one stop string. A stop string with special tokens in it is not in the text, which has
        none; it ended the text, and what else it holds is counted from there."""
        at = text.find(stop)
        if at >= 0 or stop not in self._tokenizer.decode(shown):
            return len(text) if at < 0 else at
        tails = (shown[first:] for first in range(len(shown) - 1, -1, -1))
        tail, at = next((tail, at) for tail in tails if (at := self._tokenizer.decode(tail).find(stop)) >= 0)
        return len(text) - len(self._tokenizer.decode(tail, skip_special_tokens=True)[at:])


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
        return [number for number, row in enumerate(self.rows) if not row.finish]

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
