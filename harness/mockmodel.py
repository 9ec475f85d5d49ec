"""A toy language model with known truth, for tests of decoders and suites on any machine in milliseconds.

Its logits are a hash of the whole prefix, in float64, recomputed at every call: a decoder that feeds a token twice, in
the wrong place or after a wrong text gets other logits. It keeps the stepping contract strictly and says which part of
it a caller broke. Needs torch, so only tests and conformance checks import it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .interfaces import Cost, Scores, Tokenizer

_MASK = 2**64 - 1


class MockTokenizer:
    """One token a character. Two are special: the end of text, token 0, `$`, and the beginning of text, `^`."""

    def __init__(self, letters: str, bos: bool = False) -> None:
        self.letters = letters
        self.eos_token_id: int | None = 0
        self.bos_token_id: int | None = len(letters) + 1 if bos else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        lead = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return lead + [self.letters.index(letter) + 1 for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        special = {0: "$", len(self.letters) + 1: "^"}
        shown = [special.get(i) or self.letters[i - 1] for i in ids if not (skip_special_tokens and i in special)]
        return "".join(shown)


class MockState:
    """Per row: the tokens that stand, and how many of them are settled."""

    def __init__(self, batch: int, context: int, steps: int) -> None:
        self.texts: list[list[int]] = [[] for _ in range(batch)]
        self.settled = [0] * batch
        self.steps = steps
        self.room = context + steps


class MockStepper:
    """logits = (1 - habit) x noise(prefix) + habit x noise(last token), scaled by `sharpness`.

    With much `habit` greedy text runs into loops, as that of real models does. `levels` rounds the noise so coarsely
    that the largest logits often tie.
    """

    traits = frozenset({"rollback"})
    device = "cpu"
    dtype = "float64"
    max_context = 4096

    def __init__(
        self,
        seed: int = 0,
        letters: str = "abcdefg",
        habit: float = 0.7,
        sharpness: float = 4.0,
        levels: int = 0,
        bos: bool = False,
    ) -> None:
        self.tokenizer: Tokenizer = MockTokenizer(letters, bos)
        self.vocab_size = len(letters) + 1 + bos
        self.calls = 0
        self._seed, self._habit, self._sharpness, self._levels = seed, habit, sharpness, levels
        self._cached = functools.lru_cache(maxsize=50_000)(self._logits)

    def logits(self, text: Sequence[int]) -> np.ndarray:
        """What follows a text: fp64 [V]."""
        return self._cached(tuple(text)).copy()

    def open(self, batch: int, context: int, steps: int) -> MockState:
        return MockState(batch, context, steps)

    def prefill(self, ids: Tensor, lengths: Tensor, state: MockState, start: Tensor | None = None) -> Tensor:
        self.calls += 1
        out = torch.full((len(ids), self.vocab_size), torch.nan, dtype=torch.float64)
        for row, length in enumerate(lengths.tolist()):
            if length == 0:
                continue
            keep = 0 if start is None else int(start[row])
            _hold(state.settled[row] <= keep <= len(state.texts[row]) or start is None, "settled <= start <= end", row)
            text = state.texts[row][:keep] + ids[row, :length].tolist()
            _hold(len(text) <= state.room, "the text fits into context + steps", row)
            state.texts[row], state.settled[row] = text, len(text)
            out[row] = torch.from_numpy(self.logits(text))
        return out

    def advance(self, ids: Tensor, start: Tensor, state: MockState, settle: bool = True) -> Tensor:
        self.calls += 1
        _hold(ids.dtype == torch.int64 and start.dtype == torch.int32, "ids are int64, start is int32", 0)
        batch, new = ids.shape
        out = torch.empty(batch, new, self.vocab_size, dtype=torch.float64)
        for row, (at, tokens) in enumerate(zip(start.tolist(), ids.tolist(), strict=True)):
            _hold(state.settled[row] <= at <= len(state.texts[row]), "settled <= start <= end", row)
            if settle:
                state.settled[row] = at
            _hold(at + new - state.settled[row] <= state.steps, "start + T - settled <= steps", row)
            _hold(at + new <= state.room, "the text fits into context + steps", row)
            text = state.texts[row][:at]
            for place, token in enumerate(tokens):
                _hold(0 <= token < self.vocab_size, "token ids lie in the vocabulary", row)
                text.append(token)
                out[row, place] = torch.from_numpy(self.logits(text))
            state.texts[row] = text
        return out

    def take(self, state: MockState, rows: Tensor) -> None:
        order = rows.tolist()
        state.texts = [list(state.texts[row]) for row in order]
        state.settled = [state.settled[row] for row in order]

    def score(self, ids: Tensor, lengths: Tensor) -> Scores:
        self.calls += 1
        logprob = torch.full((len(ids), ids.shape[1] - 1), torch.nan, dtype=torch.float64)
        greedy, gap = torch.zeros_like(logprob, dtype=torch.bool), torch.zeros_like(logprob)
        for row, length in enumerate(lengths.tolist()):
            _hold(length <= self.max_context + 1, "a text to score has at most max_context + 1 tokens", row)
            text = ids[row, :length].tolist()
            for place in range(length - 1):
                logits = torch.from_numpy(self.logits(text[: place + 1]))
                logprob[row, place] = logits.log_softmax(-1)[text[place + 1]]
                greedy[row, place] = bool(logits.argmax() == text[place + 1])
                gap[row, place] = logits.max() - logits[text[place + 1]]
        return Scores(logprob, greedy, gap)

    def cost(self, batch: int, context: int, steps: int) -> Cost:
        return Cost(
            weight_bytes=8 * self.vocab_size,
            kv_bytes=8 * batch * context,
            state_bytes=8 * batch,
            flops=steps,
            held_weight_bytes=16 * self.vocab_size,
            held_kv_bytes=8 * batch * (context + steps),
            held_state_bytes=8 * batch * steps,
        )

    def _logits(self, text: tuple[int, ...]) -> np.ndarray:
        whole, last = self._noise(_hash(self._seed, *text)), self._noise(_hash(~self._seed, *text[-1:]))
        mixed = (1 - self._habit) * whole + self._habit * last
        if self._levels:
            mixed = np.round(mixed * self._levels) / self._levels
        return np.asarray(self._sharpness * mixed)

    def _noise(self, key: int) -> np.ndarray:
        return np.random.default_rng(key).random(self.vocab_size)


def _hold(holds: bool, rule: str, row: int) -> None:
    if not holds:
        raise AssertionError(f"the caller broke the stepping contract in row {row}: {rule}")


def _hash(*parts: int) -> int:
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state
