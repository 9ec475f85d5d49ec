"""How likely a model finds continuations of contexts, running what they share once.

Likelihoods are made in one of three ways, whichever runs the fewest tokens: whole texts by `score`; contexts once, for
all their continuations of one token; contexts once, copied, and each continuation behind its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..interfaces import Recording, Stepper
from .batches import Batches
from .prefixes import suffixes
from .texts import pad

WIDTH = 16
"""Tokens of continuations that are run in one call."""
WORTH = 1.5
"""By how much sharing contexts must cut the tokens to run before it is done."""

Found = dict[int, tuple[float, bool]]
"""By text: the log-probability of its continuation in nat, and whether each of its tokens is the likeliest."""


class Text(NamedTuple):
    """A context and its continuation, cut to the model's positions."""

    number: int
    ids: tuple[int, ...]
    begin: int
    """Where the continuation begins."""

    @property
    def context(self) -> tuple[int, ...]:
        return self.ids[: self.begin]

    @property
    def continuation(self) -> tuple[int, ...]:
        return self.ids[self.begin :]


class Likelihoods:
    """Of a model. `batch` as in `Batches`; `done` is told how many of all continuations have been scored."""

    def __init__(self, model: Stepper, batch: int, done: Callable[[int, int], None] | None = None) -> None:
        self.model = model
        # A model with a loop of its own scores texts and is not stepped.
        self._steps = "rollback" in model.traits
        self._batches = Batches(model, batch)
        self._done = done

    def of(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Of each pair of a context and a continuation: the continuation's log-probability in nat, and whether it is
        what greedy decoding would write. Contexts that are too long lose their beginning."""
        longest = self.model.max_context + 1
        groups: dict[tuple[int, ...], list[Text]] = {}
        for number, (context, continuation) in enumerate(pairs):
            ids = (*context, *continuation)[-longest:]
            # A continuation that fills all positions is not scored at its first token, which nothing is left to
            # predict.
            text = Text(number, ids, max(len(ids) - len(continuation), 1))
            groups.setdefault(text.context, []).append(text)
        whole: list[Text] = []
        shared: list[Text] = []
        ends: list[list[Text]] = []
        for context, members in groups.items():
            lengths = [len(text.ids) - text.begin for text in members]
            several = self._steps and len(members) > 1
            if several and max(lengths) == 1:
                ends.append(members)
            elif several and self._shares(len(context), lengths):
                shared += members
            else:
                whole += members
        found: Found = {}

        def keep(more: Found) -> None:
            found.update(more)
            if self._done is not None:
                self._done(len(found), len(pairs))

        self._batches.run(whole, lambda text: len(text.ids), lambda texts: keep(self._score(texts)))
        self._batches.run(ends, lambda members: members[0].begin, lambda batch: keep(self._next_tokens(batch)))
        # Those of one context stay side by side.
        self._batches.run(shared, lambda text: text.begin + WIDTH, lambda texts: keep(self._behind(texts)))
        return [found[number] for number in range(len(pairs))]

    def _score(self, texts: Sequence[Text]) -> Found:
        """Whole texts."""
        ids, lengths = pad([text.ids for text in texts], self.model.device)
        begins = torch.tensor([text.begin for text in texts], dtype=torch.int32).to(ids.device)
        more = (begins,) if "ends" in self.model.traits else ()
        scores = self.model.score(ids, lengths, *more)
        places = torch.arange(1, ids.shape[1], device=ids.device)
        counted = (places >= begins[:, None]) & (places < lengths[:, None])
        return _sums(texts, scores.logprob, scores.greedy, counted)

    def _next_tokens(self, groups: Sequence[Sequence[Text]]) -> Found:
        """Continuations of one token: each context is run once, and only its last position's logits are made."""
        ids, lengths = pad([members[0].context for members in groups], self.model.device)
        logits = self.model.prefill(ids, lengths, self.model.open(len(groups), ids.shape[1], 1))
        texts = [text for members in groups for text in members]
        rows = torch.tensor([row for row, members in enumerate(groups) for _ in members]).to(ids.device)
        tokens = torch.tensor([text.ids[-1] for text in texts]).to(ids.device)
        logprob = logits[rows, tokens] - logits.logsumexp(-1)[rows]
        greedy = logits.argmax(-1)[rows] == tokens
        return _sums(texts, logprob[:, None], greedy[:, None], torch.ones_like(greedy)[:, None])

    def _behind(self, texts: Sequence[Text]) -> Found:
        """Longer continuations: each context but its last token is run once and copied to all its rows."""
        model, batch = self.model, len(texts)
        contexts = list(dict.fromkeys(text.context for text in texts))
        width = _padded(max(len(text.ids) - text.begin for text in texts))
        if max(map(len, contexts)) + width > model.max_context:
            # The padding does not lie within the model's positions.
            return self._score(texts)
        ids, lengths = pad([context[:-1] for context in contexts] + [()] * (batch - len(contexts)), model.device)
        state = model.open(batch, ids.shape[1] + width, WIDTH)
        model.prefill(ids, lengths, state)
        place = {context: at for at, context in enumerate(contexts)}
        rows = torch.tensor([place[text.context] for text in texts]).to(ids.device)
        model.take(state, rows)
        start = lengths[rows]
        run = suffixes([text.context for text in texts], [text.continuation for text in texts], width).to(ids.device)
        targets, sizes = pad([text.continuation for text in texts], model.device)
        logprobs, greedy = [], []
        recording: Recording | None = getattr(model, "recording", lambda _: None)(state)
        # So many tokens keep the device busy longer than the host needs to launch them, and few batches are alike.
        with nullcontext() if recording is None else recording.unrecorded():
            for first in range(0, width, WIDTH):
                part = slice(first, min(first + WIDTH, width))
                logits = model.advance(run[:, part].contiguous(), start + first, state)
                wanted = targets[:, part]
                logits = logits[:, : wanted.shape[1]]
                chosen = logits.gather(-1, wanted[..., None]).squeeze(-1)
                logprobs.append(chosen - logits.logsumexp(-1))
                greedy.append(logits.argmax(-1) == wanted)
        counted = torch.arange(targets.shape[1], device=ids.device) < sizes[:, None]
        return _sums(texts, torch.cat(logprobs, 1), torch.cat(greedy, 1), counted)

    def _shares(self, context: int, lengths: Sequence[int]) -> bool:
        """Whether running a context once is worth it; its longest continuation must fit with its padding."""
        width = _padded(max(lengths))
        worth = WORTH * (context + len(lengths) * width) < len(lengths) * context + sum(lengths)
        return worth and context + width <= self.model.max_context


def _sums(texts: Sequence[Text], logprob: Tensor, greedy: Tensor, counted: Tensor) -> Found:
    """By row of [B, T]: the sum of `logprob` where `counted`, and whether `greedy` holds at all of these places."""
    totals = logprob.double().masked_fill(~counted, 0.0).sum(1).tolist()
    exact = (greedy | ~counted).all(1).tolist()
    return {text.number: (total, of) for text, total, of in zip(texts, totals, exact, strict=True)}


def _padded(tokens: int) -> int:
    """Tokens of continuations as they are run: half a call or whole ones."""
    return WIDTH // 2 if tokens <= WIDTH // 2 else -(-tokens // WIDTH) * WIDTH
