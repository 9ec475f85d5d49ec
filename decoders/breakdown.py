"""Where the time of one round goes: the kernels of the draft and of the target, the rest of the round's, and nobody's.

Parts of a round say when they begin and end (`section`). While somebody asks, that is a kernel of its own on a GPU, so
that the profiler's list of kernels shows which part each is of, also in a recorded round.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..harness.interfaces import Answer, Emit, Limits, Prompt, Stepper
from ..kernels.rounds import MARK, mark

if TYPE_CHECKING:
    from .play import Rounds

DRAFT, TARGET, REST = "draft", "target", "rest"
WARM = 3
"""Rounds that get kernels tuned and the round recorded."""


class Profiled(Protocol):
    """A decoder whose rounds can be taken apart."""

    def generate(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> list[Answer]: ...

    def rounds(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits) -> Rounds: ...


class _Watch:
    """Told of every change of section."""

    def __init__(self, device: str) -> None:
        self.now = REST
        self.seconds = dict.fromkeys((DRAFT, TARGET, REST), 0.0)
        self._tensor = torch.zeros(1, dtype=torch.int32, device=device) if device.startswith("cuda") else None
        self._since = time.perf_counter()

    def change(self, name: str) -> str:
        """Ends the section that was, and names it."""
        before, self.now = self.now, name
        if self._tensor is not None:
            mark(self._tensor, name)
        at = time.perf_counter()
        self.seconds[before] += at - self._since
        self._since = at
        return before


_watches: list[_Watch] = []


@contextmanager
def section(name: str) -> Iterator[None]:
    """A part of a round; the innermost counts."""
    if not _watches:
        yield
        return
    before = _watches[-1].change(name)
    yield
    _watches[-1].change(before)


@contextmanager
def _watched(device: str) -> Iterator[_Watch]:
    _watches.append(_Watch(device))
    try:
        yield _watches[-1]
    finally:
        _watches.pop()


def breakdown(
    decoder: Profiled, model: Stepper, prompts: Sequence[Prompt], limits: Limits, count: int
) -> dict[str, tuple[float, str]]:
    """Figures of one round with their units, means of `count` rounds, by name.

    `between kernels` is what a round takes where the next one is always waiting, beyond its kernels; `waiting for the
    host` what it takes more in an answer, where the host reads and starts rounds.
    """
    answered = _answered(decoder, model, prompts, limits)
    rounds = decoder.rounds(model, prompts, limits)
    rounds.prefill()
    if rounds.draft is not None:
        rounds.open_draft()
    rounds.first()
    with rounds.board.texts.held():
        for _ in range(WARM):
            rounds.play(rounds.k)
        kernels, seconds = _sections(model.device, rounds, count)
    alone = rounds.seconds(rounds.k, count) if model.device.startswith("cuda") else sum(seconds.values())
    rounds.board.results.drop()
    # The profiler may slow kernels down, so that they took longer than rounds without it.
    alone = max(alone, sum(seconds.values()))
    whole = max(answered, alone)
    found = {
        "whole": (whole, "s"),
        "draft kernels": (seconds[DRAFT], "s"),
        "target kernels": (seconds[TARGET], "s"),
        "picks and bookkeeping": (seconds[REST], "s"),
        "between kernels": (alone - sum(seconds.values()), "s"),
        "waiting for the host": (whole - alone, "s"),
        "not in draft or target, share": (1 - (seconds[DRAFT] + seconds[TARGET]) / whole, ""),
    }
    if kernels:
        found["kernels"], found["kernels beside the models"] = (sum(kernels.values()), ""), (kernels[REST], "")
    return found


def _answered(decoder: Profiled, model: Stepper, prompts: Sequence[Prompt], limits: Limits) -> float:
    """Seconds of a round of an answer, from look to look of the host. The last one does not count if there are others:
    texts may have ended amidst its rounds."""
    rows = range(len(prompts))
    tokens, drafted, looks = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0), dict[float, tuple[int, int]]()

    def emit(kind: str, /, **fields: Any) -> None:
        if kind == "burst":
            tokens[fields["row"]] += fields["tokens"]
            looks[fields["at_s"]] = 0, 0
        elif kind == "round":
            drafted[fields["row"]] += 1
        if looks:
            looks[next(reversed(looks))] = max(tokens.values()), max(drafted.values())

    for _ in range(2):
        looks.clear()
        tokens.update(dict.fromkeys(rows, 0))
        drafted.update(dict.fromkeys(rows, 0))
        decoder.generate(model, prompts, limits, emit)
    kind = int(any(drafted.values()))
    reached = [(at_s, rounds[kind]) for at_s, rounds in looks.items()][1:]
    if len(reached) > 2:
        reached.pop()
    if len(reached) < 2:
        return 0.0
    (begun, before), (ended, after) = reached[0], reached[-1]
    return (ended - begun) / (after - before)


def _sections(device: str, rounds: Rounds, count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Kernels of a round, none on a CPU, and seconds, of each section."""
    with _watched(device) as watch:
        start = rounds.recorded_anew(rounds.k)
        if not device.startswith("cuda"):
            watch.change(REST)
            watch.seconds = dict.fromkeys(watch.seconds, 0.0)
            for _ in range(count):
                start()
            watch.change(REST)
            return {}, {name: seconds / count for name, seconds in watch.seconds.items()}
        start()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(count):
                start()
            torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels, spent = apart((event.time_range.start, event.time_range.end, event.name) for event in events)
    each = {name: number / count for name, number in kernels.items()}
    return each, {name: us / 1e6 / count for name, us in spent.items()}


def apart(ran: Iterable[tuple[float, float, str]]) -> tuple[dict[str, int], dict[str, float]]:
    """Of kernels, given by begin, end and name, the number and the time in each section, the one that was marked last.
    Where a kernel begins before the one before it ends, that time is of the earlier one alone."""
    now, reached = REST, float("-inf")
    kernels, spent = dict.fromkeys((DRAFT, TARGET, REST), 0), dict.fromkeys((DRAFT, TARGET, REST), 0.0)
    for begin, end, name in sorted(ran):
        if name.startswith(MARK):
            now = name.removeprefix(MARK)
        else:
            kernels[now] += 1
            spent[now] += max(end - max(begin, reached), 0.0)
            reached = max(reached, end)
    return kernels, spent
