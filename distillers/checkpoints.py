"""What a killed training goes on from: the trained weights and the optimiser; and what it took so far.

A checkpoint has no frozen weights and is the same however many ranks wrote it, sharded or not, so that any number of
them can take it up.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .placement import gather, gather_states, spread, spread_states
from .processes import averaged, rank, ranks
from .records import Sums

WHOLE = "whole"
"""Written last into a checkpoint."""
ACCOUNT = "account.json"
"""Beside the checkpoints: what all attempts took so far."""
NOTED_S = 1.0
"""Between two entries in the account, and so the most of a killed attempt that is missing there."""
WEIGHTS, STATES = "trained.safetensors", "states.pt"
SHARE = 0.05
"""Of the time of a training, that goes into its checkpoints at most."""
QUESTIONS = 200
"""How often in a training ranks ask each other whether a checkpoint is due, for which their GPUs have to be done."""


class Account(TrainerCallback):
    """Counts the seconds of a training over all its attempts, whose work may be lost, and those of the GPUs that each
    of them had."""

    def __init__(self, folder: Path, gpus: int) -> None:
        self.file, self.gpus = folder / ACCOUNT, gpus
        kept = json.loads(self.file.read_text()) if self.file.is_file() else {"wall": 0.0, "gpu": 0.0}
        self.wall, self.gpu = float(kept["wall"]), float(kept["gpu"])
        """Seconds, up to when they were counted last."""
        self._counted = time.perf_counter()

    def count(self) -> None:
        """Up to now, on disk as well."""
        now = time.perf_counter()
        self.wall += now - self._counted
        self.gpu += (now - self._counted) * self.gpus
        self._counted = now
        if rank():
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".partial")
        unfinished.write_text(json.dumps({"wall": self.wall, "gpu": self.gpu}))
        unfinished.replace(self.file)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.perf_counter() - self._counted >= NOTED_S:
            self.count()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.count()


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint by the clock, since steps take milliseconds in one plan and minutes in another, and marks
    each that is whole."""

    def __init__(self, every: float) -> None:
        self.every = every
        self.last = self.asked = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if ranks() > 1 and state.global_step % max(1, state.max_steps // QUESTIONS):
            return
        self.asked = time.perf_counter()
        due = averaged([float(self.asked - self.last >= self.every)], args.device)[0] > 0
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = time.perf_counter()
        self.every = max(self.every, (self.last - self.asked) / SHARE)
        if ranks() > 1:
            # Each rank adds its own random numbers to a checkpoint.
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may leave a torso."""
    found = [mark.parent for mark in folder.glob(f"checkpoint-*/{WHOLE}")]
    return max(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def save_weights(folder: Path, model: nn.Module, first: bool) -> None:
    """Writes what is trained. All ranks take part, and the `first` writes."""
    tensors = gather(model, first)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS)


def load_weights(folder: Path, model: nn.Module) -> None:
    spread(model, load_file(folder / WEIGHTS))


def save_states(folder: Path, optimizer: Any, schedule: Any, sums: Sums, first: bool) -> None:
    """Writes the optimiser, the schedule and what is not recorded yet. All ranks take part, and the `first` writes."""
    states, told = gather_states(optimizer, first), sums.state()
    if first:
        torch.save({"optimizer": states, "schedule": schedule.state_dict(), "sums": told}, folder / STATES)


def load_states(folder: Path, optimizer: Any, schedule: Any, sums: Sums) -> None:
    kept = torch.load(folder / STATES, map_location="cpu", weights_only=True)
    spread_states(optimizer, kept["optimizer"])
    schedule.load_state_dict(kept["schedule"])
    sums.restore(kept["sums"])
