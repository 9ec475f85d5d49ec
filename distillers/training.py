"""What all trainers share: transformers' Trainer with summed losses, records, resuming, facts."""

from __future__ import annotations

import math
import resource
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..harness.interfaces import Job, MambabenchError, Unsupported
from ..harness.parts import rows_at_a_time
from . import flops
from .checkpoints import Account, Checkpoints, load_states, load_weights, save_states, save_weights, whole_checkpoint
from .losses import IGNORED
from .passes import Passes
from .placement import exact_policy, gather, held, restored, sharding
from .plugin import StageConfig
from .processes import rank, ranks
from .records import LOSS, Records, Spent, Sums
from .windows import Windows, collate

Collator = Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]
TOTAL = "total"
"""Of the losses, beside their parts."""


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
    beta2: float = 0.98
    checkpointing: bool = False
    parallel: str = "ddp"
    phases: int = 1
    """Equal parts of the steps; in each of them the learning rate rises and falls anew."""

    @property
    def part(self) -> int:
        """Rows that each rank computes at a time."""
        return rows_at_a_time(self.batch, self.accumulation, ranks())

    def steps(self, windows: Windows) -> int:
        """Optimiser steps for the tokens wanted, rounded up."""
        return math.ceil(self.tokens / (self.batch * windows.lengths.double().mean().item()))


def recipe_of(config: StageConfig, tokens: int, phases: int = 1) -> Recipe:
    """How to train on so many tokens, from a stage's options."""
    return Recipe(
        tokens=tokens,
        batch=config.batch,
        lr=config.lr,
        warmup=config.warmup,
        clip=config.clip,
        accumulation=config.accumulation,
        weight_decay=config.weight_decay,
        beta2=config.beta2,
        checkpointing=config.checkpointing,
        parallel=config.parallel,
        phases=phases,
    )


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
        if recipe.checkpointing:
            recompute(model)
        if recipe.phases > steps:
            raise MambabenchError(f"{steps} steps cannot be split into {recipe.phases} phases; raise tokens")
        self.weights, self.recipe = weights, recipe
        self.before = before or Spent()
        super().__init__(
            model=model,
            args=_arguments(job, recipe, steps, folder),
            train_dataset=data,
            data_collator=collator,
        )
        self.sums = Sums(self.weights, self.args.device)
        self.records = Records(job.emit, self.sums, self.before)
        self.add_callback(self.records)
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
        if total is None:
            total = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        self.sums.add({**parts, LOSS: total}, inputs["attention_mask"].sum())
        return total

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's, which would walk through all modules at every step to tell them that they train."""
        assert self.model is not None
        if not self.model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate shards on GPUs alone; torch can do it on a CPU as well."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp_plugin_args and not self.is_fsdp_enabled:
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def beside(self, model: nn.Module, shared: bool = True) -> nn.Module:
        """A model that is only asked, where the trained one is; if `shared`, in parts over the ranks where that is."""
        model.eval().requires_grad_(False)
        if shared and self.is_fsdp_enabled:
            sharded: nn.Module = fsdp2_prepare_model(self.accelerator, model)
            return sharded
        return model.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody asks; the Trainer's count would walk through all modules at every step."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a checkpoint: only what is trained, since the rest is the parent's."""
        assert self.model is not None
        save_weights(Path(str(output_dir)), self.model, self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        assert model is not None
        load_weights(Path(resume_from_checkpoint), model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_states(Path(output_dir), self.optimizer, self.lr_scheduler, self.sums, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_states(Path(checkpoint), self.optimizer, self.lr_scheduler, self.sums)


def recompute(model: nn.Module) -> None:
    """From now on layers keep their inputs alone for backward. Raises MambabenchError for a model that cannot."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise MambabenchError(f"{type(model).__name__} has no activation checkpointing; say checkpointing = false")
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _arguments(job: Job, recipe: Recipe, steps: int, folder: str) -> TrainingArguments:
    gpu = job.device != "cpu"
    arguments = TrainingArguments(
        output_dir=str(job.scratch / folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.part,
        # Layers that have not joined yet have no gradient.
        ddp_find_unused_parameters=recipe.phases > 1,
        ddp_broadcast_buffers=False,
        gradient_accumulation_steps=recipe.batch // (recipe.part * ranks()),
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        optim="adamw_torch_fused",
        max_grad_norm=recipe.clip,
        seed=job.seed,
        use_cpu=not gpu,
        bf16=gpu,
        logging_steps=max(1, steps // 50),
        # Both would have the host wait for the GPU at every step, as would a copy that blocks.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",
        accelerator_config={"non_blocking": gpu},
        save_strategy="no",
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        report_to=[],
        **(sharding() if recipe.parallel == "fsdp" and ranks() > 1 else {}),
    )
    if arguments.n_gpu > 1:
        # A process is one GPU's. Where it sees others as well, the Trainer would put the model into nn.DataParallel.
        arguments._n_gpu = 1
    if arguments.fsdp_plugin_args:
        arguments.fsdp_plugin_args["mixed_precision_policy"] = exact_policy()
    return arguments


def run(trainer: SummedLossTrainer, job: Job) -> Spent:
    """Trains, from the newest whole checkpoint in the trainer's folder if there is one. Returns what it took, with all
    that went before."""
    if job.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    folder = Path(str(trainer.args.output_dir))
    checkpoint = whole_checkpoint(folder)
    account = Account(folder, 0 if job.device == "cpu" else ranks())
    trainer.add_callback(account)
    trainer.add_callback(Checkpoints(job.checkpoint_s))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    account.count()
    before = trainer.before
    return Spent(
        before.steps + trainer.state.global_step,
        before.tokens + trainer.sums.tokens(),
        before.seconds + account.wall,
        before.gpu_seconds + account.gpu,
        max(before.peak, _peak_bytes(job.device)),
    )


def flops_per_step(trainer: SummedLossTrainer) -> float | None:
    """What a step over all ranks asks for, as `flops` counts it; None where that is not known, or not the same in
    every step."""
    windows = trainer.train_dataset
    if not isinstance(windows, Windows) or trainer.recipe.phases > 1 or trainer.model is None:
        return None
    teacher = getattr(trainer, "teacher", None) if "kl" in trainer.weights else None
    targets = (windows.labels[:, 1:] != IGNORED).sum(1)
    work = flops.work_of(windows.positions, windows.lengths, targets, trainer.recipe.batch)
    try:
        return flops.step(trainer.model, teacher, work).total
    except Unsupported:
        return None


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
        ("training_gpu", spent.gpu_seconds, "s"),
        ("parameters", total, ""),
        ("trainable_share", trained / total, ""),
        ("peak_memory", spent.peak, "bytes"),
    ]
    if ranks() > 1:
        share = sum(map(held, parameters)) / total
        facts += [("ranks", ranks(), ""), ("weights_held_share", share, "")]
    if step_time := trainer.records.step_time():
        facts += [("step_time", step_time, "s"), ("training_rate", spent.tokens / spent.steps / step_time, "tokens/s")]
    if need := flops_per_step(trainer):
        facts.append(("training_flops_per_step", need, ""))
        most = flops.peak(torch.cuda.get_device_name(trainer.args.device)) if gpus else None
        if step_time and most:
            facts.append(("model_flop_utilisation", need / (step_time * most * gpus), ""))
    facts += [(f"weight_per_{trainer.unit}_{name}", weight, "") for name, weight in trainer.weights.items() if weight]
    for name, value, unit in facts:
        job.emit("fact", name=name, value=value, unit=unit)


def save(job: Job, module: nn.Module) -> None:
    """Writes the stage's result: its parent, with what was trained. Ranks take part in it together."""
    assert job.backend is not None
    assert job.parent is not None
    tensors = gather(module, rank() == 0)
    if rank() == 0:
        job.backend.save(restored(job.parent, tensors), job.out, like=job.parent.path)


def _peak_bytes(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()
