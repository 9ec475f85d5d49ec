"""Latency of a decoder beside plain decoding: one process, one model, the same prompts, in alternating order.

Blocks go subject - reference, reference - subject (ABBA), so that drift hits both alike. Raw bursts and rounds are
kept; harness/metrics.py makes figures of them. Stop tokens are ignored: every arm yields exactly the tokens asked for.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..interfaces import Bench, Limits, MambabenchError, Prompt, Stepper, Subject, silent
from .configs import SpeedConfig
from .losslessness import decoder_of
from .texts import check_room, take_prompts

MAXRSS_BYTES = 1024
"""Linux counts the peak resident memory in KiB."""


class Speed:
    def __init__(self, config: SpeedConfig) -> None:
        if min(config.batch, default=0) < 1 or config.prompt_tokens < 1 or config.pairs < 1:
            raise MambabenchError("speed: every batch, prompt_tokens and pairs must be at least 1")
        if config.new_tokens < 2:
            raise MambabenchError("speed: new_tokens must be at least 2, or there is no time per token")
        self.config = config

    def run(self, bench: Bench) -> None:
        with _quiet(bench.subject.device):
            arms = load_arms(bench)
            model = arms["subject"][1]
            check_room("speed", model, self.config.prompt_tokens + self.config.new_tokens)
            self._emit_sizes(bench, model)
            peaks = dict.fromkeys(arms, 0)
            block = 0
            for batch in self.config.batch:
                for requests in self._warm_up(bench, arms, batch):
                    order = list(arms) if block % 2 == 0 else list(arms)[::-1]
                    for place, arm in enumerate(order):
                        self._measure(bench, arms[arm], requests, {"arm": arm, "block": block, "order": place}, peaks)
                    block += 1
                    bench.emit("progress", done=block, total=self.config.pairs * len(self.config.batch), unit="blocks")
            _emit_peaks(bench, peaks)

    def _warm_up(self, bench: Bench, arms: dict[str, tuple[Subject, Stepper]], batch: int) -> Iterator[list[Prompt]]:
        """Runs the warm-up blocks of a batch size, then yields the prompts of each block to measure."""
        count = self.config.warmup + self.config.pairs
        lengths = [self.config.prompt_tokens]
        texts = take_prompts(bench.data[self.config.data], arms["subject"][1], count * batch, lengths)
        prompts = [Prompt(ids, number) for number, ids in enumerate(texts)]
        blocks = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        for arm, (subject, model) in arms.items():
            began = time.perf_counter()
            for requests in blocks[: self.config.warmup]:
                decoder_of(subject).generate(model, requests, self._limits(bench), silent)
            seconds = time.perf_counter() - began
            bench.emit("fact", name=f"warm-up, batch {batch}", value=seconds, unit="s", arm=arm)
        gc.collect()
        gc.freeze()
        yield from blocks[self.config.warmup :]

    def _measure(
        self,
        bench: Bench,
        arm: tuple[Subject, Stepper],
        requests: list[Prompt],
        place: dict[str, Any],
        peaks: dict[str, int],
    ) -> None:
        """Answers one block with one arm; records wait in memory until the clock has stopped."""
        subject, model = arm
        records: list[tuple[str, dict[str, Any]]] = []

        def collect(kind: str, /, **fields: Any) -> None:
            records.append((kind, fields))

        on_gpu = model.device.startswith("cuda")
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        answers = decoder_of(subject).generate(model, requests, self._limits(bench), collect)
        if on_gpu:
            torch.cuda.synchronize()
            peaks[place["arm"]] = max(peaks[place["arm"]], torch.cuda.max_memory_allocated())
        short = [len(answer.ids) for answer in answers if len(answer.ids) != self.config.new_tokens]
        if short:
            asked = f"{short[0]} tokens, not the {self.config.new_tokens} asked for"
            raise MambabenchError(f"speed: decoder {subject.decoder_name!r} yielded {asked}")
        request = {
            "batch": len(requests),
            "prompt_tokens": self.config.prompt_tokens,
            "new_tokens": self.config.new_tokens,
            "temperature": self.config.temperature,
            "content": self.config.data,
        }
        for kind, fields in records:
            bench.emit(kind, **place, **request, **fields)

    def _limits(self, bench: Bench) -> Limits:
        return Limits(new_tokens=self.config.new_tokens, temperature=self.config.temperature, seed=bench.seed)

    def _emit_sizes(self, bench: Bench, model: Stepper) -> None:
        context = self.config.prompt_tokens + self.config.new_tokens
        for number, batch in enumerate(self.config.batch):
            cost = model.cost(batch, context, 1)
            if number == 0:
                bench.emit("fact", name="weights", value=cost.weight_bytes, unit="byte")
            bench.emit("fact", name=f"KV cache, batch {batch}", value=cost.kv_bytes, unit="byte")
            bench.emit("fact", name=f"state, batch {batch}", value=cost.state_bytes, unit="byte")


def load_arms(bench: Bench) -> dict[str, tuple[Subject, Stepper]]:
    """The arms by name; a reference that is the same model shares its memory."""
    model = bench.subject.load()
    arms = {"subject": (bench.subject, model)}
    if bench.reference is not None:
        same = bench.reference.artifact.path == bench.subject.artifact.path
        arms["reference"] = (bench.reference, model if same else bench.reference.load())
    return arms


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
