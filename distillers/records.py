"""Turns what a training does into records, without waiting for the device at every step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..harness.interfaces import Emit
from .processes import averaged, summed

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Spent:
    """What a training took."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Seconds times the GPUs that there were at each time."""
    peak: int = 0
    """Most memory, in bytes: of the GPU, or of the process where there is none."""


class Sums:
    """The parts of a loss since the last record, and the tokens from the start on. They stay on the device until they
    are read, which all ranks do together."""

    def __init__(self, parts: Iterable[str], device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, float | Tensor] = dict.fromkeys((LOSS, *parts), 0.0)
        self.since = 0
        """The step of the last record."""
        self._tokens: int | Tensor = 0
        self._before = 0
        """Tokens of all ranks from before a resumption."""

    def add(self, parts: Mapping[str, Tensor], tokens: Tensor) -> None:
        """Shares of a step's means, and how many tokens they are of."""
        for name, value in parts.items():
            self.parts[name] += value.detach()
        self._tokens = self._tokens + tokens

    def means(self) -> dict[str, float]:
        """Of each part, summed over the steps since the last record."""
        return dict(zip(self.parts, averaged([float(part) for part in self.parts.values()], self.device), strict=True))

    def tokens(self) -> int:
        return self._before + round(summed([float(self._tokens)], self.device)[0])

    def begin(self, step: int) -> None:
        """A new record begins after `step`."""
        self.parts, self.since = dict.fromkeys(self.parts, 0.0), step

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"since": self.since, "parts": self.means(), "tokens": self.tokens()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.since, self.parts = state["since"], dict(state["parts"])
        self._before, self._tokens = state["tokens"], 0


class Records(TrainerCallback):
    """Emits what the Trainer logs, and how long its steps take."""

    def __init__(self, emit: Emit, sums: Sums, before: Spent) -> None:
        self.emit, self.sums, self.before = emit, sums, before
        self.times: list[float] = []
        """Seconds a step, one number per interval between two records. The device was done at both ends."""
        self._begun: float | None = None
        self._from = 0

    def step_time(self) -> float | None:
        """Median seconds of a step, without the first interval, in which much happens for the first time."""
        return statistics.median(self.times[1:]) if len(self.times) > 1 else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun, self._from = time.perf_counter(), state.global_step
        self.emit("progress", done=state.global_step, total=state.max_steps, unit="steps")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begun = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        logs: Mapping[str, float] = kwargs["logs"]
        if LOSS not in logs or state.global_step == self.sums.since:
            return
        steps, means, tokens = state.global_step - self.sums.since, self.sums.means(), self.sums.tokens()
        now = time.perf_counter()
        if self._begun is not None:
            self.times.append((now - self._begun) / (state.global_step - self._from))
        self.emit(
            "loss",
            step=self.before.steps + state.global_step,
            tokens=self.before.tokens + tokens,
            lr=logs["learning_rate"],
            gradient_norm=logs["grad_norm"],
            **{name: value / steps for name, value in means.items()},
        )
        self.emit("progress", done=state.global_step, total=state.max_steps, unit="steps")
        self.sums.begin(state.global_step)
        self._begun, self._from = time.perf_counter(), state.global_step
