"""Judges: models behind an endpoint that grade or compare answers, and the one way in which suites ask them.

A suite writes its prompts as `Request`s and gets a `Verdict` for each, in their order. What a judge said is kept on
disk before anything is made of it, so that nothing is asked twice and everything can be scored again. A judge that
fails leaves a verdict without a value and with the reason: never a score. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ..documents import Message
from ..interfaces import Bench, Choice, Emit, Review, silent

FOLDER = "judgments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a judge said, raw."""

    text: str
    top_logprobs: tuple[Mapping[str, float], ...] = ()
    """Of each token of the text, where the request asked for them: the likeliest tokens with their log-probabilities
    (nat)."""
    finish: str = ""
    """Why the text ended, as the endpoint says: `stop`, `length`, …"""
    model: str = ""
    """Which model the endpoint says it was."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt for a judge, and how its reply is read."""

    id: str
    """The suite's own name for it, unique within a step, such as `"81/turn 2"`."""
    messages: tuple[Message, ...]
    read: Callable[[Reply], Any]
    """Makes the value of a verdict from a reply. Raises ValueError, with the reason, for one that is malformed: the
    judge is then asked again, as often as its options say."""
    temperature: float = 0.0
    max_tokens: int = 2048
    top_logprobs: int = 0
    """So many of the likeliest tokens at each place; 0 asks for none."""
    draw: int = 0
    """Tells apart requests that are otherwise the same and are each to be asked, with a temperature above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a request. Only one that is `ok` has a value."""

    id: str
    state: Literal["ok", "malformed", "failed"]
    """`malformed`: the judge answered, as often as it was asked, but nothing could be read from it. `failed`: no
    answer was had."""
    value: Any = None
    reply: Reply | None = None
    """The reply that was read, or the last malformed one; None where none was had."""
    reason: str = ""
    asked: int = 0
    """Replies that this run had for it; 0 where all were on disk already."""
    heard: tuple[tuple[Mapping[str, Any], Reply], ...] = ()
    """All replies to it, malformed ones too, each behind the question that it answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """The surroundings of a judge."""

    folder: Path
    """Where replies are kept; several processes may share it."""
    data: Mapping[str, Path] = field(default_factory=dict)
    """What each `FileRef` of the judge's config resolved to."""
    emit: Emit = silent


class Judge(Protocol):
    """A component of kind `judge`."""

    def judge(self, requests: Sequence[Request], desk: Desk) -> list[Verdict]:
        """Asks; one verdict for each request, in their order. Raises `Unsupported` where it cannot be asked at all."""


def ask(judge: Choice, requests: Sequence[Request], at: Bench | Review) -> list[Verdict]:
    """Has a suite's judge answer, and records each judgment and what they cost.

    Raises `MambabenchError` if more requests failed than the judge's options allow: then nothing is scored, and another
    run asks for what is missing only. Verdicts that are not `ok` must not become a score.
    """
    from .asking import ask_and_record

    return ask_and_record(judge, requests, at)
