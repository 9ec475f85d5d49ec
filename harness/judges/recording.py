"""The judge `recorded`: what an endpoint once said, read again without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..interfaces import MambabenchError
from ..keys import digest
from . import Desk, Reply, Request, Verdict
from .configs import RecordedConfig
from .kept import recorded
from .reading import Failure, resolve


class RecordedJudge:
    def __init__(self, config: RecordedConfig) -> None:
        self.config = config

    def judge(self, requests: Sequence[Request], desk: Desk) -> list[Verdict]:
        """Reads the replies that were recorded for just these requests; one without any fails."""
        path = desk.data[self.config.path]
        replies: dict[str, Reply] = {}
        models: dict[str, None] = {}
        most = 0
        for asked, reply in recorded(path):
            models[asked["body"]["model"]] = None
            replies[digest(asked)] = reply
            most = max(most, asked["again"])
        model = self.config.model or next(iter(models), "")
        if not models:
            raise MambabenchError(f"{path}: holds no judgments")
        if model not in models:
            raise MambabenchError(f"{path}: holds judgments of {', '.join(models)}, none of {model!r}")
        if len(models) > 1 and not self.config.model:
            raise MambabenchError(f"{path}: holds judgments of {', '.join(models)}; `model` must name one")

        def answer(asked: Mapping[str, Any]) -> tuple[Reply, bool]:
            try:
                return replies[digest(asked)], False
            except KeyError:
                raise Failure("not in the recording") from None

        verdicts = [resolve(request, model, self.config.parameters(), most, answer) for request in requests]
        return [_as_recorded(verdict) for verdict in verdicts]


def _as_recorded(verdict: Verdict) -> Verdict:
    """A request whose replies are all malformed stays so, although others were asked more often."""
    if verdict.state != "failed" or not verdict.heard:
        return verdict
    return Verdict(
        id=verdict.id,
        state="malformed",
        reply=verdict.heard[-1][1],
        reason=f"none of {len(verdict.heard)} recorded replies can be read",
        heard=verdict.heard,
    )
