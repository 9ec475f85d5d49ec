"""The judge `match`: a rule in place of a model. It holds an answer against the reference that stands before it."""

from __future__ import annotations

from collections.abc import Sequence

from ..interfaces import MambabenchError
from . import Desk, Reply, Request, Verdict
from .configs import MatchConfig
from .reading import resolve

NAME = "match"
LEAST, MOST = 1, 10


class MatchJudge:
    def __init__(self, config: MatchConfig) -> None:
        self.config = config

    def judge(self, requests: Sequence[Request], desk: Desk) -> list[Verdict]:
        """Rates by how much of the reference an answer begins with. Raises `MambabenchError` for a prompt without
        both."""
        return [
            resolve(request, NAME, {}, 0, lambda asked, at=request: (self.reply(at), True))  # type: ignore[misc]
            for request in requests
        ]

    def reply(self, request: Request) -> Reply:
        _, found, rest = request.messages[-1].content.partition(self.config.reference)
        reference, answered, answer = rest.partition(self.config.answer)
        if not found or not answered or not reference.split():
            raise MambabenchError(
                f"the judge {NAME!r} finds no text behind {self.config.reference!r} and {self.config.answer!r} in the "
                f"request {request.id!r}"
            )
        rating = LEAST + (MOST - LEAST) * begun(answer.split(), reference.split())
        return Reply(text=f"Rating: [[{rating:.2f}]]", finish="stop", model=NAME)


def begun(said: Sequence[str], right: Sequence[str]) -> float:
    """The share of the right words that were said from the beginning on, in order, up to the first wrong one.

    >>> begun("fox owl cat".split(), "fox owl elk bee".split()), begun([], ["tea"]), begun("tea .".split(), ["tea"])
    (0.5, 0.0, 1.0)
    """
    same = [one == other for one, other in zip(said, right, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(right)
