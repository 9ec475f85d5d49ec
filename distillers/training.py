"""What all trainers share: transformers' Trainer with summed losses, records, resuming, facts."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..harness.interfaces import Emit, Job, MambabenchError
from .passes import Passes
from .windows import Windows, collate

CHECKPOINT_EVERY = 30.0
"""Seconds between checkpoints, about: what a killed run loses at most."""
BETA2 = 0.98
"""Adam's memory of squared gradients: the paper's, and the right one for hundreds of steps rather than millions."""
Collator = Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]
TOTAL = "total"
"""Of the losses, beside their parts."""
SECONDS = "seconds.json"
"""Written last into a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast to train; the options of the same names in the plan."""

    tokens: int
    batch: int
    lr: float
    warmup: float
    clip: float
    accumulation: int = 1
    weight_decay: float = 0.0
    phases: int = 1
    """Equal parts of the steps; in each of them the learning rate rises and falls anew."""

    def steps(self, windows: Windows) -> int:
        """Optimiser steps for the tokens wanted, rounded up."""
        return math.ceil(self.tokens / (self.batch * windows.lengths.double().mean().item()))


@dataclass(frozen=True, slots=True)
class Spent:
    """What a training took."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def ranks() -> int:
    """Processes that train together, as torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is; the first one alone writes what stays."""
    return int(os.environ.get("RANK", 0))


def averaged(values: Sequence[float], device: torch.device) -> list[float]:
    """The mean over ranks of each value."""
    if ranks() == 1:
        return list(values)
    summed = torch.tensor(values, device=device, dtype=torch.float64)
    torch.distributed.all_reduce(summed)
    return [float(value) / ranks() for value in summed]


def pace(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the peak learning rate at a step: a rise, then a cosine to 0, in each phase."""
    phase = min(step * recipe.phases // steps, recipe.phases - 1)
    begin, end = (-(-steps * bound // recipe.phases) for bound in (phase, phase + 1))
    warmup = round(recipe.warmup * (end - begin))
    if step - begin < warmup:
        return (step - begin) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - begin - warmup) / max(1, end - begin - warmup)))


class SummedLossTrainer(Trainer):
    """transformers' Trainer with losses that are sums over tokens.

    The sums are divided by the tokens of the whole optimiser step, so that accumulated parts and ranks add up to the
    gradient of one large batch. (A mean of each part would weigh its tokens by the part's size, and Trainer, which
    divides only the losses of models that take no `num_items_in_batch`, would not divide by the parts at all.)
    """

    unit = "token"
    """What the losses are sums over."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        data: Dataset[dict[str, Tensor]],
        recipe: Recipe,
        weights: Mapping[str, float],
        steps: int,
        *,
        collator: Collator = collate,
        before: Spent | None = None,
        folder: str = "trainer",
    ) -> None:
        """`weights` are those of the loss's parts, per token; `before` is what went before in the same stage;
        checkpoints are in `folder` of the scratch folder."""
        if recipe.batch % recipe.accumulation:
            raise MambabenchError(f"batch = {recipe.batch} cannot be split into accumulation = {recipe.accumulation}")
        if recipe.batch // recipe.accumulation % ranks():
            raise MambabenchError(
                f"batch = {recipe.batch} with accumulation = {recipe.accumulation} cannot be split among {ranks()} GPUs"
            )
        if recipe.phases > steps:
            raise MambabenchError(f"{steps} steps cannot be split into {recipe.phases} phases; raise tokens")
        self.weights, self.recipe = weights, recipe
        self.before = before or Spent()
        self.parts: dict[str, float | Tensor] = dict.fromkeys(self.weights, 0.0)
        super().__init__(
            model=model,
            args=_arguments(job, recipe, steps, folder),
            train_dataset=data,
            data_collator=collator,
            callbacks=[_Records(job.emit, self.parts, self.before)],
        )
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Passes:
        """All steps as one pass of the Trainer's, so that every one of them has a whole batch."""
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return Passes(len(data), self.args.max_steps * self.recipe.batch, self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' cosine schedule, anew in each phase."""
        if self.lr_scheduler is None:
            paced: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(paced, lambda step: pace(step, num_training_steps, self.recipe))
        return self.lr_scheduler

    @abstractmethod
    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parts of the loss, each a sum over the tokens of `inputs`. Where they carry no gradient, `TOTAL` is their
        weighted sum, which does."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs or num_items_in_batch is None:
            raise ValueError("this trainer trains only; losses are summed over labels")
        # Ranks average their gradients, so each must bring its share of the sum times their number.
        scale = self.accelerator.num_processes / num_items_in_batch
        # A model's own forward is under autocast already; what a loss runs beside it is not.
        with self.accelerator.autocast():
            parts = {name: value * scale for name, value in self.losses(model, inputs).items()}
        total = parts.pop(TOTAL, None)
        for name, value in parts.items():
            self.parts[name] += value.detach()
        return sum(self.weights[name] * value for name, value in parts.items()) if total is None else total


class _Records(TrainerCallback):
    """Turns the Trainer's logs into records. Parts are summed over the steps since the last log."""

    def __init__(self, emit: Emit, parts: dict[str, float | Tensor], before: Spent) -> None:
        self.emit, self.parts, self.before, self.since = emit, parts, before, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.since = state.global_step
        self.emit("progress", done=state.global_step, total=state.max_steps, unit="steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        logs: Mapping[str, float] = kwargs["logs"]
        if "loss" not in logs or state.global_step == self.since:
            return
        steps, self.since = state.global_step - self.since, state.global_step
        parts = dict(zip(self.parts, averaged([float(part) for part in self.parts.values()], args.device), strict=True))
        self.emit(
            "loss",
            step=self.before.steps + state.global_step,
            tokens=self.before.tokens + state.num_input_tokens_seen,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            gradient_norm=logs["grad_norm"],
            **{name: value / steps for name, value in parts.items()},
        )
        self.emit("progress", done=state.global_step, total=state.max_steps, unit="steps")
        self.parts.update(dict.fromkeys(self.parts, 0.0))


class _Checkpoints(TrainerCallback):
    """Asks for a checkpoint by the clock, since steps take milliseconds in one plan and minutes in another, and marks
    each that is whole with the seconds of training that went into it."""

    def __init__(self, spent: float) -> None:
        self.begun = time.perf_counter() - spent
        self.last = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = averaged([float(time.perf_counter() - self.last >= CHECKPOINT_EVERY)], args.device)[0] > 0
        if due and state.global_step < state.max_steps:
            control.should_save = True
            self.last = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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


def _arguments(job: Job, recipe: Recipe, steps: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(job.scratch / folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch // recipe.accumulation // ranks(),
        # Layers that have not joined yet have no gradient.
        ddp_find_unused_parameters=recipe.phases > 1,
        ddp_broadcast_buffers=False,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        adam_beta2=BETA2,
        max_grad_norm=recipe.clip,
        seed=job.seed,
        use_cpu=job.device == "cpu",
        bf16=job.device != "cpu",
        logging_steps=max(1, steps // 50),
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=job.device != "cpu",
        disable_tqdm=True,
        report_to=[],
    )


def run(trainer: SummedLossTrainer, job: Job) -> Spent:
    """Trains, from the newest whole checkpoint in the trainer's folder if there is one. Returns what it took, with all
    that went before."""
    if job.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    checkpoint, seconds = whole_checkpoint(Path(str(trainer.args.output_dir)))
    checkpoints = _Checkpoints(seconds)
    trainer.add_callback(checkpoints)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    before = trainer.before
    return Spent(
        before.steps + trainer.state.global_step,
        before.tokens + int(trainer.state.num_input_tokens_seen),
        before.seconds + checkpoints.seconds(),
    )


def report(trainer: SummedLossTrainer, job: Job, spent: Spent) -> None:
    """Emits what a whole stage took and trained, and what a token weighs in each part of its loss."""
    assert trainer.model is not None
    parameters = list(trainer.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    gpus = 0 if job.device == "cpu" else trainer.accelerator.num_processes
    facts = [
        ("training_tokens", spent.tokens, "tokens"),
        ("training_steps", spent.steps, "steps"),
        ("training_wall", spent.seconds, "s"),
        ("training_gpu", spent.seconds * gpus, "s"),
        ("parameters", total, ""),
        ("trainable_share", trained / total, ""),
        ("peak_memory", _peak_bytes(job.device), "bytes"),
    ]
    facts += [(f"weight_per_{trainer.unit}_{name}", weight, "") for name, weight in trainer.weights.items() if weight]
    for name, value, unit in facts:
        job.emit("fact", name=name, value=value, unit=unit)


def save(job: Job, module: nn.Module) -> None:
    """Writes the trained module as the stage's result, like its parent."""
    assert job.backend is not None
    assert job.parent is not None
    if rank() == 0:
        job.backend.save(module, job.out, like=job.parent.path)


def _peak_bytes(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()
