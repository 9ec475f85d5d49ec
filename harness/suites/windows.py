"""How documents become windows that a model reads: what of each window is scored, and for which document.

Whatever the kind, every token behind a document's own context is scored exactly once, and a leading token (beginning or
end of text) never is: it only stands before a text. Kinds differ in how much a token sees of what stands before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Encoded = tuple[Sequence[int], int]
"""Token ids of a document, and how many of the first are context."""


class Piece(NamedTuple):
    """Places `begin` to `end` - 1 of a window, which are scored for a document."""

    document: int
    begin: int
    end: int


class Window(NamedTuple):
    ids: Sequence[int]
    pieces: tuple[Piece, ...]
    start: int = 0
    """Place of its first token in its document, if it has one."""


def disjoint(document: int, ids: Sequence[int], context: int, longest: int) -> Iterator[Window]:
    """Windows of at most `longest` tokens that share one token: each after the first has only the token before it as
    context.

    >>> [(w.ids, w.pieces[0][1:]) for w in disjoint(0, [0, 1, 2, 3, 4, 5], 1, 4)]
    [([0, 1, 2, 3], (1, 4)), ([3, 4, 5], (1, 3))]
    >>> [(w.ids, w.pieces[0][1:]) for w in disjoint(0, [0, 1, 2, 3, 4, 5], 5, 4)]
    [([3, 4, 5], (2, 3))]
    """
    return sliding(document, ids, context, longest, longest - 1)


def sliding(document: int, ids: Sequence[int], context: int, longest: int, stride: int) -> Iterator[Window]:
    """Windows that move on by `stride` tokens: each after the first scores its last `stride` tokens, which see at least
    `longest` - `stride` tokens.

    >>> [(w.ids, w.pieces[0][1:]) for w in sliding(0, [0, 1, 2, 3, 4, 5], 1, 4, 1)]
    [([0, 1, 2, 3], (1, 4)), ([1, 2, 3, 4], (3, 4)), ([2, 3, 4, 5], (3, 4))]
    """
    scored = 1
    while scored < len(ids):
        end = min(longest if scored == 1 else scored + stride, len(ids))
        start = max(0, end - longest) if scored == 1 else scored + stride - longest
        if end > context:
            yield Window(ids[start:end], (Piece(document, max(scored, context) - start, end - start),), start)
        scored = end


def packed(encoded: Sequence[Encoded], longest: int) -> Iterator[Window]:
    """Documents one behind the other, each behind its context, cut into windows that share one token.

    A document sees those before it in its window, as in a training that packs without boundaries.

    >>> [(w.ids, [tuple(p) for p in w.pieces]) for w in packed([([0, 1, 2], 1), ([0, 3], 1)], 4)]
    [([0, 1, 2, 0], [(0, 1, 3)]), ([0, 3], [(1, 1, 2)])]
    """
    ids = list(itertools.chain.from_iterable(of for of, _ in encoded))
    owners = [
        number if place >= context else -1 for number, (of, context) in enumerate(encoded) for place in range(len(of))
    ]
    for start in range(0, len(ids) - 1, longest - 1):
        end = min(start + longest, len(ids))
        pieces, place = [], 1
        for owner, run in itertools.groupby(owners[start + 1 : end]):
            length = len(list(run))
            if owner >= 0:
                pieces.append(Piece(owner, place, place + length))
            place += length
        if pieces:
            yield Window(ids[start:end], tuple(pieces))


def batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Windows of similar length side by side."""
    ordered = sorted(windows, key=lambda window: len(window.ids))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
