"""What the host keeps of a batch, the same in all decoders: its texts, when each ends, and what is emitted."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..harness.answers import Pieces, ends, make_answer
from ..harness.interfaces import Answer, Emit, Limits, MambabenchError, OnText, Prompt, Stepper, Tokenizer
from .results import Round


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
    """The rows of one request as the host knows them, and its clock."""

    def __init__(
        self,
        model: Stepper,
        prompts: Sequence[Prompt],
        limits: Limits,
        emit: Emit,
        on_text: OnText | None = None,
    ) -> None:
        if limits.new_tokens < 1:
            raise MambabenchError(f"new_tokens must be at least 1, is {limits.new_tokens}")
        self.began = time.perf_counter()
        self.rows = [Row(prompt, limits, model.tokenizer) for prompt in prompts]
        self.limits = limits
        self._emit, self._on_text = emit, on_text
        self._pieces = [Pieces(prompt.ids, limits, model.tokenizer) for prompt in prompts] if on_text else []
        self._bursts = [0] * len(prompts)
        self._rounds = [0] * len(prompts)

    def begin(self, first: Round) -> None:
        """Takes the first token of each row, which no round has made."""
        at_s = time.perf_counter() - self.began
        for number, tokens in enumerate(first.tokens):
            self._burst(number, self.rows[number].extend(tokens[:1]), at_s)

    @property
    def running(self) -> list[int]:
        return [number for number, row in enumerate(self.rows) if not row.finished]

    @property
    def missing(self) -> int:
        """Most tokens that a row still lacks."""
        return max(self.limits.new_tokens - len(self.rows[number].new) for number in self.running)

    def look(self, rounds: Sequence[Round], drafts: bool) -> list[list[int]]:
        """Gives the tokens of rounds to the rows that run: one burst a row. With `drafts` each round of a row is
        emitted. Returns what each round accepted of the rows that it found running."""
        at_s = time.perf_counter() - self.began
        counted: list[list[int]] = [[] for _ in rounds]
        for number in self.running:
            row, before, played = self.rows[number], len(self.rows[number].new), 0
            for each, counts in zip(rounds, counted, strict=True):
                if row.finished:
                    break
                accepted = each.accepted[number]
                row.extend(each.tokens[number][: accepted + 1])
                counts.append(accepted)
                played += 1
            self._burst(number, len(row.new) - before, at_s)
            for each in rounds[:played] if drafts else ():
                given = {"drafted": each.drafted[number], "accepted": each.accepted[number]}
                self._emit("round", row=number, round=self._rounds[number], **given)
                self._rounds[number] += 1
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
