"""What a killed training goes on from: the trained weights, the optimiser, and how much was spent.

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
from .processes import averaged, ranks
from .records import Sums

SECONDS = "seconds.json"
"""Written last into a checkpoint."""
WEIGHTS, STATES = "trained.safetensors", "states.pt"
SHARE = 0.05
"""Of the time of a training, that goes into its checkpoints at most."""
QUESTIONS = 200
"""How often in a training ranks ask each other whether a checkpoint is due, for which their GPUs have to be done."""


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint by the clock, since steps take milliseconds in one plan and minutes in another, and marks
    each that is whole with the seconds of training that went into it."""

    def __init__(self, every: float, spent: float) -> None:
        self.every = every
        self.begun = time.perf_counter() - spent
        self.last = self.asked = time.perf_counter()

    def seconds(self) -> float:
        """Of training, those before a resumption included."""
        return time.perf_counter() - self.begun

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
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        unfinished = folder / f"{SECONDS}.partial"
        unfinished.write_text(json.dumps(self.seconds()))
        unfinished.replace(folder / SECONDS)


def whole_checkpoint(folder: Path) -> tuple[Path | None, float]:
    """The newest checkpoint that was written to its end, with its seconds of training; a kill may leave a torso."""
    marks = list(folder.glob(f"checkpoint-*/{SECONDS}"))
    if not marks:
        return None, 0.0
    newest = max(marks, key=lambda mark: int(mark.parent.name.rpartition("-")[2]))
    return newest.parent, float(json.loads(newest.read_text()))


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
