"""How suites ask a judge: verdicts become records, and failures end the step rather than its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from ..interfaces import Bench, Choice, MambabenchError, Review
from ..plugins import build
from . import FOLDER, Desk, Judge, Request, Verdict


def ask_and_record(choice: Choice, requests: Sequence[Request], at: Bench | Review) -> list[Verdict]:
    """Has the chosen judge answer; leaves a `judgment` record for each request and facts about all."""
    twice = [name for name, count in Counter(request.id for request in requests).items() if count > 1]
    if twice:
        raise MambabenchError(f"two requests to the judge are called {twice[0]!r}")
    judge: Judge = build(choice)
    verdicts = list(judge.judge(requests, _desk(at)) or ())
    _check(choice.name, requests, verdicts)
    for verdict in verdicts:
        at.emit("judgment", **_record(verdict))
    states = Counter(verdict.state for verdict in verdicts)
    for state in ("ok", "malformed", "failed"):
        at.emit("fact", name=f"judgments, {state}", value=states[state], unit="requests")
    failed = [verdict for verdict in verdicts if verdict.state == "failed"]
    allowed = float(getattr(choice.config, "allow_failed", 0.0))
    if len(failed) > allowed * len(requests):
        raise MambabenchError(
            f"{len(failed)} of {len(requests)} requests to the judge failed ({failed[0].id}: {failed[0].reason}); "
            "the others are on disk, and are not asked for again"
        )
    return verdicts


def _check(judge: str, requests: Sequence[Request], verdicts: Sequence[Verdict]) -> None:
    """Raises `MambabenchError` unless a judge gave a verdict on each request, in their order, and no other."""
    given = [getattr(verdict, "id", None) for verdict in verdicts]
    for request, name in zip_longest((request.id for request in requests), given):
        if request != name:
            raise MambabenchError(
                f"the judge {judge!r} must give one verdict on each request, in their order; of {len(given)} on "
                f"{len(requests)} requests the first that differs is on {name!r} in place of {request!r}"
            )


def _desk(at: Bench | Review) -> Desk:
    return Desk(folder=(at.cache or at.scratch) / FOLDER, data=at.data, emit=at.emit)


def _record(verdict: Verdict) -> dict[str, Any]:
    return {
        "id": verdict.id,
        "state": verdict.state,
        "reason": verdict.reason,
        "asked": verdict.asked,
        "replies": [{"question": question, "reply": asdict(reply)} for question, reply in verdict.heard],
    }
