"""How far a text's tokens are from the model's choices, and how far two right runs of one model are from each other.

Below float64 the order of additions decides between tokens that are about as likely, and it differs from shape to
shape: two plain runs choose differently now and then, and so may a decoder that does nothing wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..interfaces import Stepper, Unsupported
from .texts import pad

ROWS = 256
"""Texts that are stepped through side by side for the noise."""


def gaps(model: Stepper, texts: Sequence[Sequence[int]], begins: Sequence[int]) -> list[list[float]]:
    """By how much each token's logit is below the largest one, in one parallel run over every text: of the tokens from
    `begins` on (at least 1). Raises Unsupported where the backend's `score` does not say."""
    gap = model.score(*pad(texts, model.device)).gap
    if gap is None:
        raise Unsupported("losslessness: below float64 the backend's score must say the gap to the largest logit")
    rows = gap.tolist()
    return [row[begin - 1 : len(text) - 1] for row, text, begin in zip(rows, texts, begins, strict=True)]


def stepped_gaps(model: Stepper, texts: Sequence[Sequence[int]], begins: Sequence[int]) -> list[list[float]]:
    """The same by plain decoding's steps, one token of every row a call, the text being given. All rows have as many
    tokens behind their beginnings."""
    if "generate" in model.traits:
        raise Unsupported("losslessness: below float64 noise is measured by steps, and this backend makes none")
    ids, lengths = pad(texts, model.device)
    start = pad([[begin] for begin in begins], model.device)[0].squeeze(1)
    count = int((lengths - start).max())
    state = model.open(len(texts), max(map(len, texts)), 1)
    logits = model.prefill(ids[:, : max(begins)].contiguous(), start.int(), state)
    found: list[Tensor] = []
    for place in range(count):
        token = ids.gather(1, (start + place).unsqueeze(1))
        found.append(logits.amax(-1) - logits.gather(-1, token).squeeze(-1))
        if place + 1 < count:
            logits = model.advance(token, (start + place).int(), state)[:, 0]
    columns = [column.tolist() for column in found]
    return [list(row) for row in zip(*columns, strict=True)]


def noise(model: Stepper, texts: Sequence[Sequence[int]], begins: Sequence[int]) -> float:
    """The largest difference of a gap between the two runs: what rounding can make of a gap of 0."""
    largest = 0.0
    for first in range(0, len(texts), ROWS):
        rows = slice(first, first + ROWS)
        both = zip(gaps(model, texts[rows], begins[rows]), stepped_gaps(model, texts[rows], begins[rows]), strict=True)
        largest = max(largest, *(abs(one - other) for pair in both for one, other in zip(*pair, strict=True)))
    return largest
