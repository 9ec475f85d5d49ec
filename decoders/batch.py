"""The bookkeeping that all decoders share: the texts of a batch, when each row ends, and what is emitted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..harness.answers import Pieces, ends, make_answer
from ..harness.interfaces import Answer, Emit, Limits, MambabenchError, OnText, Prompt, Stepper, Tokenizer
from .sampling import pick
from .texts import Texts


class Round(NamedTuple):
    """What one call of the model made of a batch, on its device."""

    tokens: Tensor
    """int64 [B, K + 1]."""
    drafted: Tensor
    """int64 [B]: real drafts, at most K."""
    accepted: Tensor
    """int64 [B]: so many of the tokens are drafts that stand; one more is emitted."""


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
    """The rows of one request, their texts on the device, and its clock."""

    def __init__(
        self,
        model: Stepper,
        prompts: Sequence[Prompt],
        limits: Limits,
        emit: Emit,
        on_text: OnText | None = None,
        steps: int = 1,
    ) -> None:
        """`steps`: most tokens of a call."""
        if limits.new_tokens < 1:
            raise MambabenchError(f"new_tokens must be at least 1, is {limits.new_tokens}")
        self.began = time.perf_counter()
        self.rows = [Row(prompt, limits, model.tokenizer) for prompt in prompts]
        self.texts = Texts(prompts, limits, steps, model.device)
        self.model = model
        self.limits = limits
        self._emit, self._on_text = emit, on_text
        self._pieces = [Pieces(prompt.ids, limits, model.tokenizer) for prompt in prompts] if on_text else []
        self._bursts = [0] * len(prompts)
        self._rounds = [0] * len(prompts)
        self._steps = steps

    def prefill(self) -> Any:
        """Opens the model, runs the prompts and takes each row's first token. Returns the model's state."""
        texts = self.texts
        state = self.model.open(len(self.rows), texts.longest + self.limits.new_tokens, self._steps)
        ids, lengths = texts.ids[:, : texts.longest].contiguous(), texts.length.int()
        logits = self.model.prefill(ids, lengths, state)
        first = pick(logits, self.limits, texts.sequence.squeeze(1), texts.length)
        texts.append(first.unsqueeze(1), torch.ones_like(texts.length))
        tokens = first.tolist()
        at_s = time.perf_counter() - self.began
        for number, token in enumerate(tokens):
            self._burst(number, self.rows[number].extend([token]), at_s)
        self._stop(range(len(self.rows)))
        return state

    @property
    def running(self) -> list[int]:
        return [number for number, row in enumerate(self.rows) if not row.finished]

    @property
    def missing(self) -> int:
        """Most tokens that a row still lacks."""
        return max(self.limits.new_tokens - len(self.rows[number].new) for number in self.running)

    def look(self, rounds: Sequence[Round], drafts: bool) -> list[list[int]]:
        """Waits for rounds that the device has played, and gives their tokens to the rows that run: one burst a row.
        With `drafts` each round of a row is emitted. Returns what each round accepted of the rows that it found
        running.
        """
        played = [[part.tolist() for part in each] for each in _fetch(rounds)]
        at_s = time.perf_counter() - self.began
        running = self.running
        counted: list[list[int]] = [[] for _ in played]
        for number in running:
            row, before, records = self.rows[number], len(self.rows[number].new), list[dict[str, int]]()
            for (tokens, drafted, accepted), counts in zip(played, counted, strict=True):
                if row.finished:
                    break
                row.extend(tokens[number][: accepted[number] + 1])
                records.append({"drafted": drafted[number], "accepted": accepted[number]})
                counts.append(accepted[number])
            self._burst(number, len(row.new) - before, at_s)
            for record in records if drafts else ():
                self._emit("round", row=number, round=self._rounds[number], **record)
                self._rounds[number] += 1
        self._stop(running)
        return counted

    def answers(self) -> list[Answer]:
        return [row.answer() for row in self.rows]

    def _burst(self, number: int, tokens: int, at_s: float) -> None:
        self._emit("burst", row=number, burst=self._bursts[number], at_s=at_s, tokens=tokens)
        self._bursts[number] += 1
        if self._on_text is not None:
            row = self.rows[number]
            if piece := self._pieces[number].more(row.new, row.finished):
                self._on_text(number, piece)

    def _stop(self, ran: Sequence[int]) -> None:
        """Stop strings are known on the host alone, so the device is told where they ended a text."""
        finished = [number for number in ran if self.rows[number].finished]
        if finished and self.limits.stop_strings:
            self.texts.running[torch.tensor(finished, device=self.model.device)] = False


def _fetch(rounds: Sequence[Round]) -> list[Round]:
    """The rounds on the host, by one copy."""
    flat = torch.cat([torch.cat([r.tokens, r.drafted.unsqueeze(1), r.accepted.unsqueeze(1)], 1) for r in rounds], 1)
    parts = flat.cpu().split([r.tokens.shape[1] + 2 for r in rounds], dim=1)
    return [Round(part[:, :-2], part[:, -2], part[:, -1]) for part in parts]
