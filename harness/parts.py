"""How the processes that train a stage together share its batch, and how little of it each computes at a time."""

from __future__ import annotations


def rows_at_a_time(batch: int, accumulation: int, ranks: int) -> int:
    """Rows of a batch that each of `ranks` computes at a time: its share, of which `ranks` must divide the batch, is
    split evenly into `accumulation` parts, or as few more as that takes; into single rows where it has fewer.

    >>> rows_at_a_time(64, 4, 1), rows_at_a_time(64, 4, 8), rows_at_a_time(64, 64, 8), rows_at_a_time(12, 4, 2)
    (16, 2, 1, 1)
    """
    share = batch // ranks
    return next(size for size in range(max(1, share // accumulation), 0, -1) if share % size == 0)
