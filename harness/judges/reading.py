"""From replies to verdicts, the same for replies that an endpoint gives and for those of a recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from . import Reply, Request, Verdict
from .kept import question


class Failure(Exception):
    """Why a request has no reply."""


def on_scale(value: Any, least: float, most: float) -> float | None:
    """A figure that a judge gave, or None for one that is not on the scale, or is no number.

    >>> on_scale(7, 1, 10), on_scale(11, 1, 10), on_scale("7", 1, 10), on_scale(float("nan"), 1, 10)
    (7.0, None, None, None)
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return float(value) if is_number and least <= value <= most else None


Answer = Callable[[Mapping[str, Any]], tuple[Reply, bool]]
"""Gives the reply to a question, and whether it was asked for now. Raises `Failure`."""


def resolve(request: Request, model: str, options: Mapping[str, Any], asks_again: int, answer: Answer) -> Verdict:
    """The verdict on a request: of the first reply that can be read, of up to `asks_again` + 1."""
    heard: list[tuple[Mapping[str, Any], Reply]] = []
    asked, reason = 0, ""
    for again in range(asks_again + 1):
        asking = question(request, model, options, again)
        try:
            reply, new = answer(asking)
        except Failure as failure:
            return Verdict(id=request.id, state="failed", reason=str(failure), asked=asked, heard=tuple(heard))
        heard.append((asking, reply))
        asked += new
        try:
            value = request.read(reply)
        except ValueError as error:
            reason = str(error)
            continue
        return Verdict(id=request.id, state="ok", value=value, reply=reply, asked=asked, heard=tuple(heard))
    times = f" ({len(heard)} replies)" if len(heard) > 1 else ""
    return Verdict(
        id=request.id, state="malformed", reply=reply, reason=f"{reason}{times}", asked=asked, heard=tuple(heard)
    )
