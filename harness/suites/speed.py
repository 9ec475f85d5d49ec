"""Latency of a decoder beside plain decoding: one process, one model, the same prompts, in alternating order.

Blocks go subject - reference, reference - subject (ABBA), so that drift hits both alike. Raw bursts and rounds are
kept; harness/metrics.py makes figures of them. Stop tokens are ignored: every arm yields exactly the tokens asked for.
"""

from __future__ import annotations

import dataclasses
import gc
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from .. import metrics
from ..interfaces import Bench, Limits, Prompt, Stepper, Subject, silent
from .configs import Request, SpeedConfig
from .losslessness import decoder_of
from .texts import check_room, check_whole, take_prompts
from .traffic import bandwidths, step_bytes

MAXRSS_BYTES = 1024
"""Linux counts the peak resident memory in KiB."""
TURNS = {"cuda": 1, "cpu": 5}
"""How often the cost of a round is measured, by kind of device."""


class Speed:
    def __init__(self, config: SpeedConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        with _quiet(bench.subject.device):
            arms = load_arms(bench)
            model = arms["subject"].model
            config = self.config
            total = config.pairs * len(config.requests)
            bench.emit("progress", done=0, total=total, unit="blocks")
            longest = max(of.prompt_tokens for of in config.requests)
            check_room("speed: the longest prompt + new_tokens", model, longest + config.new_tokens)
            _emit_size(bench, "weights", model.cost(1, 1, 1).held_weight_bytes)
            block = 0
            for request in config.requests:
                what = config.name(request)
                for prompts in self._warm_up(bench, arms, request):
                    order = list(arms) if block % 2 == 0 else list(arms)[::-1]
                    for place, arm in enumerate(order):
                        self._measure(bench, arms[arm], request, prompts, {"arm": arm, "block": block, "order": place})
                    block += 1
                    bench.emit("progress", done=block, total=total, unit="blocks")
                _emit_states(bench, arms, what)
                _emit_loops(bench, arms, what)
                moved = step_bytes(model, request.batch, request.prompt_tokens + config.new_tokens // 2)
                _emit_size(bench, f"bytes of a step, {what}", moved)
                self._costs(bench, arms, request)
                self._profile(bench, arms, request, prompts)
            _emit_peaks(bench, {name: arm.peak for name, arm in arms.items()})
            for name, measured in arms.items():
                for what, (value, unit) in getattr(measured.model, "facts", dict)().items():
                    bench.emit("fact", name=what, value=value, unit=unit, arm=name)
            # Last, since what it takes is no memory of decoding.
            for what, speed in bandwidths(bench.subject.device).items():
                bench.emit("fact", name=f"{what} bandwidth", value=speed, unit="byte/s", arm="")

    def _warm_up(self, bench: Bench, arms: dict[str, Arm], request: Request) -> Iterator[list[Prompt]]:
        """Runs the warm-up blocks of a kind of request, then yields the prompts of each block to measure."""
        batch, count = request.batch, self.config.warmup + self.config.pairs
        lengths = [request.prompt_tokens]
        texts = take_prompts(bench.data[self.config.data], arms["subject"].model, count * batch, lengths)
        prompts = [Prompt(ids, number) for number, ids in enumerate(texts)]
        blocks = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        for name, arm in arms.items():
            began = time.perf_counter()
            for block in blocks[: self.config.warmup]:
                decoder_of(arm.subject).generate(arm.model, block, self._limits(bench, request), silent)
            seconds = time.perf_counter() - began
            bench.emit("fact", name=f"warm-up, {self.config.name(request)}", value=seconds, unit="s", arm=name)
        gc.collect()
        gc.freeze()
        yield from blocks[self.config.warmup :]

    def _measure(self, bench: Bench, arm: Arm, request: Request, prompts: list[Prompt], place: dict[str, Any]) -> None:
        """Answers one block with one arm; records wait in memory until the clock has stopped."""
        records: list[tuple[str, dict[str, Any]]] = []

        def collect(kind: str, /, **fields: Any) -> None:
            records.append((kind, fields))

        on_gpu = arm.model.device.startswith("cuda")
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        answers = decoder_of(arm.subject).generate(arm.model, prompts, self._limits(bench, request), collect)
        if on_gpu:
            torch.cuda.synchronize()
            arm.peak = max(arm.peak, torch.cuda.max_memory_allocated())
        for answer in answers:
            distinct, runs = metrics.distinct_ngrams(answer.ids)
            arm.distinct, arm.runs = arm.distinct + distinct, arm.runs + runs
        check_whole("speed", arm.subject.decoder_name, answers, self.config.new_tokens)
        asked_for = {**request._asdict(), "new_tokens": self.config.new_tokens, "content": self.config.data}
        for kind, fields in records:
            if kind == "fact":
                arm.told.setdefault((fields["name"], fields.get("unit", "")), []).append(fields["value"])
            else:
                bench.emit(kind, **place, **asked_for, **fields)

    def _costs(self, bench: Bench, arms: dict[str, Arm], request: Request) -> None:
        """Tells what rounds cost in the middle of an answer, and the means of what the decoders told of the blocks.
        Arms take turns, and medians count: on a CPU others run at times."""
        half, what_of = self.config.new_tokens // 2, self.config.name(request)
        limits = dataclasses.replace(self._limits(bench, request), new_tokens=self.config.new_tokens - half)
        lengths = [request.prompt_tokens + half]
        texts = take_prompts(bench.data[self.config.data], arms["subject"].model, request.batch, lengths)
        prompts = [Prompt(ids, number) for number, ids in enumerate(texts)]
        known: dict[tuple[str, str], list[float]] = {}
        for _ in range(TURNS[torch.device(bench.subject.device).type]):
            for name, arm in arms.items():
                costs = getattr(decoder_of(arm.subject), "costs", None)
                for k, seconds in costs(arm.model, prompts, limits).items() if costs else ():
                    known.setdefault((name, f"cost of a round, K = {k}"), []).append(seconds)
        facts = {(name, what): (statistics.median(turns), "s") for (name, what), turns in known.items()}
        for name, arm in arms.items():
            # A decoder that goes by costs tells of them too.
            told = {(name, what): (statistics.mean(of), unit) for (what, unit), of in arm.told.items()}
            facts = told | facts
            arm.told.clear()
            arm.opened.clear()
        for (name, what), (value, unit) in facts.items():
            bench.emit("fact", name=f"{what}, {what_of}", value=value, unit=unit, arm=name)

    def _profile(self, bench: Bench, arms: dict[str, Arm], request: Request, prompts: list[Prompt]) -> None:
        """Takes rounds of the last block apart."""
        at, limits = self.config.name(request), self._limits(bench, request)
        for name, arm in arms.items() if self.config.profile else ():
            profile = getattr(decoder_of(arm.subject), "profile", None)
            figures = profile(arm.model, prompts, limits, self.config.profile) if profile else {}
            for what, (value, unit) in figures.items():
                bench.emit("fact", name=f"round, {at}: {what}", value=value, unit=unit, arm=name)
            arm.opened.clear()

    def _limits(self, bench: Bench, request: Request) -> Limits:
        return Limits(new_tokens=self.config.new_tokens, temperature=request.temperature, seed=bench.seed)


@dataclass(slots=True)
class Arm:
    """A decoder with its model."""

    subject: Subject
    model: Stepper
    opened: set[tuple[Any, ...]]
    """Batch, context, steps and maybe rollback of every state that the decoder took."""
    peak: int = 0
    """Most device memory that a block took, in bytes."""
    distinct: int = 0
    """Different runs of four tokens within the texts of a batch size, and below all runs."""
    runs: int = 0
    told: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Facts of the blocks of a batch size, by name and unit."""


class _Watched:
    """A model that notes what its states are opened for: only the decoder knows."""

    def __init__(self, model: Stepper, opened: set[tuple[Any, ...]]) -> None:
        self._model = model
        self._opened = opened

    def open(self, batch: int, context: int, steps: int, **more: Any) -> Any:
        self._opened.add((batch, context, steps, *more.values()))
        return self._model.open(batch, context, steps, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def load_arms(bench: Bench) -> dict[str, Arm]:
    """The arms by name; a reference that is the same model shares its memory."""
    model = bench.subject.load()
    models = {"subject": (bench.subject, model)}
    if bench.reference is not None:
        same = bench.reference.artifact.path == bench.subject.artifact.path
        models["reference"] = (bench.reference, model if same else bench.reference.load())
    arms = {}
    for name, (subject, of) in models.items():
        opened: set[tuple[Any, ...]] = set()
        arms[name] = Arm(subject, cast(Stepper, _Watched(of, opened)), opened)
    return arms


def _emit_states(bench: Bench, arms: dict[str, Arm], of: str) -> None:
    """Tells the largest state that each arm opened for requests of a kind."""
    for name, arm in arms.items():
        costs = [arm.model.cost(*opened) for opened in arm.opened]
        arm.opened.clear()
        for what, of_cost in (("KV cache", "held_kv_bytes"), ("state", "held_state_bytes")):
            known = [size for cost in costs if (size := getattr(cost, of_cost)) is not None]
            _emit_size(bench, f"{what}, {of}", max(known, default=None), name)


def _emit_loops(bench: Bench, arms: dict[str, Arm], of: str) -> None:
    """Tells how much each arm's text repeats itself: n-gram drafts feed on that."""
    for name, arm in arms.items():
        if arm.runs:
            share = arm.distinct / arm.runs
            bench.emit("fact", name=f"distinct 4-grams, {of}", value=share, unit="share", arm=name)
        arm.distinct = arm.runs = 0


def _emit_size(bench: Bench, name: str, size: int | None, arm: str = "") -> None:
    if size is not None:
        bench.emit("fact", name=name, value=size, unit="byte", arm=arm)


def _emit_peaks(bench: Bench, peaks: dict[str, int]) -> None:
    if any(peaks.values()):
        for arm, peak in peaks.items():
            bench.emit("fact", name="peak device memory", value=peak, unit="byte", arm=arm)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES
        bench.emit("fact", name="peak memory of the process", value=peak, unit="byte")


@contextmanager
def _quiet(device: str) -> Iterator[None]:
    """Holds torch to one thread on CPU, where several wait for each other on a shared machine, and afterwards gives
    back to the garbage collector what was frozen before the measured blocks."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        gc.unfreeze()
