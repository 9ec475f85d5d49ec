"""The suite `train-speed`: an optimiser step of a model beside one of its teacher, alternated on the same device.

Steps are those of the stages: their trainer makes the losses, the precision and the optimiser. Blocks go as in the
suite `speed` (ABBA), so that drift hits both models alike. Every step's end is on record, on the device's own clock.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.interfaces import Artifact, Bench, Job, MambabenchError, silent
from . import flops
from .distillation import DistillationTrainer, load_frozen
from .losses import IGNORED
from .mixers import choose_trained
from .placement import lighten
from .plugin import DistillationConfig
from .train_speed_config import TrainSpeedConfig
from .training import recipe_of
from .windows import Windows, collate, pack, read_windows

ATTENTION = "*.layers.{}.self_attn.*"


class TrainSpeed:
    def __init__(self, config: TrainSpeedConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        """Emits the end of every step as a burst, and what each model trains and holds as facts."""
        arms = load_arms(bench, self.config)
        with frozen():
            total, block = self.config.pairs * len(self.config.context), 0
            bench.emit("progress", done=0, total=total, unit="blocks")
            if (most := device_flops(bench.subject.device)) is not None:
                bench.emit("fact", name="FLOP/s of the device", value=most)
            for context in self.config.context:
                rows = self.config.tokens // context
                windows = self._windows(bench, context, rows)
                batches = forever(windows, rows, bench.subject.device)
                for name, arm in arms.items():
                    seconds = arm.steps(batches, self.config.warmup)[-1]
                    arm.peak = 0
                    bench.emit("fact", name=f"warm-up, {context} tokens", value=seconds, unit="s", arm=name)
                    bench.emit("fact", name=f"FLOPs a step, {context} tokens", value=arm.flops(windows, rows), arm=name)
                for _ in range(self.config.pairs):
                    order = list(arms) if block % 2 == 0 else list(arms)[::-1]
                    for place, name in enumerate(order):
                        ends = arms[name].steps(batches, self.config.steps)
                        self._emit(bench, ends, context, {"arm": name, "block": block, "order": place})
                    block += 1
                    bench.emit("progress", done=block, total=total, unit="blocks")
                for name, peak in peaks(arms).items():
                    bench.emit("fact", name=f"peak memory, {context} tokens", value=peak, unit="byte", arm=name)

    def _emit(self, bench: Bench, ends: Sequence[float], context: int, place: Mapping[str, Any]) -> None:
        tokens = self.config.tokens
        for number, end in enumerate(ends):
            bench.emit(
                "burst",
                **place,
                row=0,
                burst=number,
                at_s=end,
                tokens=tokens,
                batch=tokens // context,
                prompt_tokens=context,
            )

    def _windows(self, bench: Bench, context: int, rows: int) -> Windows:
        """Windows without padding, at least as many as a step has."""
        subject = bench.subject.artifact
        if self.config.data is None:
            size = int(subject.backend.describe(subject.path)["vocab_size"])
            return random_windows(8 * rows, context, size, bench.seed)
        windows = read_windows(bench.data[self.config.data], subject.backend.tokenizer(subject.path), context)
        whole = (windows.lengths == context).nonzero().squeeze(1)
        if len(whole) < rows:
            raise MambabenchError(
                f"train-speed: {self.config.data} fills {len(whole)} windows of {context} tokens; a step needs {rows}"
            )
        return Windows(*(getattr(windows, each.name)[whole] for each in fields(Windows)))


@contextmanager
def frozen() -> Iterator[None]:
    """Spares the garbage collector meanwhile what there is already."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Arm:
    """A model with its optimiser, on the device."""

    def __init__(
        self,
        bench: Bench,
        artifact: Artifact,
        trained: Sequence[str],
        teacher: nn.Module | None,
        config: TrainSpeedConfig,
    ) -> None:
        model = artifact.backend.module(artifact.path)
        self.trained = choose_trained(model, trained, f"train-speed: {artifact.name}")
        lighten(model, bench.subject.device)
        stage = DistillationConfig(
            data="",
            tokens=config.tokens,
            batch=1,
            lr=1e-6,
            ce=config.ce,
            kl=config.kl,
            slice=config.slice,
            checkpointing=config.checkpointing,
        )
        job = Job(
            seed=bench.seed,
            device=bench.subject.device,
            data={},
            models={},
            teacher=None,
            parent=artifact,
            backend=None,
            scratch=bench.scratch,
            out=bench.scratch,
            emit=silent,
        )
        least = random_windows(1, 2, 2, bench.seed)
        self.trainer = DistillationTrainer(job, model, teacher, least, recipe_of(stage, stage.tokens), stage)
        self.clip = stage.clip
        self.trainer.create_optimizer()
        prepared: Any = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.model, self.optimizer = prepared
        self.peak = 0
        """Most device memory that a block took, of all models together, in bytes."""

    def steps(self, batches: Iterator[dict[str, Any]], count: int) -> list[float]:
        """Takes optimiser steps; returns when each ended, in seconds since the first began."""
        clock = _Clock(self.trainer.args.device)
        for _ in range(count):
            samples, items = self.trainer.get_batch_samples(iter([next(batches)]), 1, self.trainer.args.device)
            self.trainer.training_step(self.model, samples[0], items)
            self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.model.zero_grad()
            clock.lap()
        ends = clock.read()
        self.peak = max(self.peak, clock.peak)
        return ends

    def flops(self, windows: Windows, rows: int) -> float:
        """Of a step of so many windows."""
        targets = (windows.labels != IGNORED).sum(1)
        work = flops.work_of(windows.positions, windows.lengths, targets, rows)
        return flops.step(self.trainer.student, self.trainer.teacher, work).total

    def resident(self) -> int:
        """Bytes of the weights and of the optimiser's state."""
        state = [
            value for held in self.optimizer.state.values() for value in held.values() if isinstance(value, Tensor)
        ]
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*self.model.parameters(), *self.model.buffers(), *state)
            if tensor.device.type == self.trainer.args.device.type
        }
        return sum(held.values())


class _Clock:
    """Times of the device's work: a GPU's by events in its stream, for which nothing waits before the end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.laps: list[Any] = []
        self.lap()

    def lap(self) -> None:
        """Notes the moment that the work given so far is done."""
        if self.device.type != "cuda":
            self.laps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.laps.append(event)

    def read(self) -> list[float]:
        """Seconds from the first lap to each of the others."""
        first, *others = self.laps
        if self.device.type != "cuda":
            return [lap - first for lap in others]
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device)
        return [first.elapsed_time(lap) / 1e3 for lap in others]


def load_arms(bench: Bench, config: TrainSpeedConfig) -> dict[str, Arm]:
    """The model and, unless it is the same, the teacher, each ready to train; both ask one frozen teacher."""
    subject, beside = bench.subject.artifact, bench.models[config.teacher]
    teacher = load_frozen(beside, bench.subject.device) if config.kl else None
    both = {"subject": subject, **({} if subject.path == beside.path else {"reference": beside})}
    attention = {name: set(of.backend.describe(of.path)["attention_layers"]) for name, of in both.items()}
    mixed = attention.get("reference", attention["subject"]) - (attention["subject"] if len(both) > 1 else set())
    arms = {}
    for name, artifact in both.items():
        stands_in = [ATTENTION.format(layer) for layer in sorted(mixed)]
        own = name == "subject" and len(both) > 1
        trained = [entry for kind in config.train for entry in ([kind] if own or kind != "mixers" else stands_in)]
        arms[name] = Arm(bench, artifact, trained, teacher, config)
        bench.emit("fact", name="trained parameters", value=arms[name].trained, arm=name)
    return arms


def peaks(arms: Mapping[str, Arm]) -> dict[str, int]:
    """Most device memory of each model's steps since it was last asked, in bytes, without what the others hold."""
    found = {}
    for name, arm in arms.items():
        others = sum(other.resident() for key, other in arms.items() if key != name)
        if arm.peak:
            found[name] = arm.peak - others
        arm.peak = 0
    return found


def device_flops(device: str) -> float | None:
    """What a device could do in a second, where that is known."""
    return None if device == "cpu" else flops.peak(torch.cuda.get_device_name(device))


def forever(windows: Windows, rows: int, device: str) -> Iterator[dict[str, Any]]:
    """Batches of `rows` windows without end. They lie on the device, where the stages' loader brings them ahead."""
    whole = range(0, len(windows) - rows + 1, rows)
    batches = (collate([windows[first + row] for row in range(rows)]) for first in whole)
    there = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    return itertools.cycle(there)


def random_windows(count: int, context: int, vocabulary: int, seed: int) -> Windows:
    """Whole windows of random tokens, each one document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, context), generator=generator).numpy()
    return pack(zip(ids, ids, strict=True), context)
