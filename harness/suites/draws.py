"""Is sampled text distributed as plain decoding's? Two chi-square tests of two samples for each prompt.

One is of tokens. Draws are independent of each other, tokens of one text are not: so each text gives one token, at the
positions in turn, and what came before it is summed over. The other is of how likely whole texts are to the plain
model, which a text of too likely or too unlikely tokens cannot hide from. The first token of a text is left out of
both, because no draft had a part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..interfaces import Answer, Prompt, Stepper
from .texts import pad

FEW = 10
"""Tokens that both arms together drew less often share a cell."""
BINS = 8
"""Cells of the likelihood of texts, with as many texts each."""
Ask = Callable[[Sequence[Prompt]], Sequence[Answer]]


def requests(ids: tuple[int, ...], prompt: int, draws: int) -> list[Prompt]:
    """One prompt, asked `draws` times with random numbers of its own each."""
    return [Prompt(ids, prompt * draws + draw) for draw in range(draws)]


def in_batches(ask: Ask, prompts: Sequence[Prompt], sizes: Sequence[int]) -> list[Answer]:
    """Answers in order, an equal part of them at each batch size."""
    answers: list[Answer] = []
    for place, size in enumerate(sizes):
        begin, end = (len(prompts) * each // len(sizes) for each in (place, place + 1))
        for first in range(begin, end, size):
            answers += ask(prompts[first : min(first + size, end)])
    return answers


def of_tokens(one: Sequence[Answer], other: Sequence[Answer], positions: int) -> tuple[float, int]:
    """The statistic of as many draws of either arm, and its degrees of freedom; texts have `positions` tokens."""
    total, freedom = 0.0, 0
    for place in range(1, positions):
        drawn = [
            Counter(of[draw].ids[place] for draw in range(place - 1, len(of), positions - 1)) for of in (one, other)
        ]
        value, cells = chi_square(*drawn)
        total, freedom = total + value, freedom + cells - 1
    return total, freedom


def likelihoods(model: Stepper, ids: tuple[int, ...], answers: Sequence[Answer], batch: int) -> list[float]:
    """Of each text behind a prompt, without its first token: the logarithm of its probability."""
    found: list[float] = []
    for first in range(0, len(answers), batch):
        texts = [ids + answer.ids for answer in answers[first : first + batch]]
        found += model.score(*pad(texts, model.device)).logprob[:, len(ids) :].sum(1).tolist()
    return found


def of_likelihoods(one: Sequence[float], other: Sequence[float]) -> tuple[float, int]:
    """The same of how likely texts are, which are as many of either arm."""
    pooled = sorted([*one, *other])
    bins = min(BINS, len(pooled) // (2 * FEW))
    edges = [pooled[len(pooled) * place // bins] for place in range(1, bins)]
    counts = [Counter(sum(value >= edge for edge in edges) for value in of) for of in (one, other)]
    value, cells = chi_square(*counts)
    return value, cells - 1


def chi_square(one: Counter[int], other: Counter[int]) -> tuple[float, int]:
    """Of two samples of one size: the sum of (a - b)² / (a + b) over cells, and their number.

    >>> chi_square(Counter({1: 30, 2: 10, 3: 8}), Counter({1: 20, 2: 20, 4: 8}))
    (5.333333333333334, 3)
    """
    often, rest = [], [0, 0]
    for token in one.keys() | other.keys():
        pair = [one[token], other[token]]
        if sum(pair) < FEW:
            rest = [a + b for a, b in zip(rest, pair, strict=True)]
        else:
            often.append(pair)
    if sum(rest) >= FEW or not often:
        often.append(rest)
    else:
        least = min(often, key=sum)
        least[:] = [a + b for a, b in zip(least, rest, strict=True)]
    return sum((a - b) ** 2 / (a + b) for a, b in sorted(often) if a + b), len(often)
