"""Trains the new Mamba mixers of a converted model towards its teacher, with everything else frozen.

The first stage of "The Mamba in the Llama" (section 3.2): cross entropy on text that the teacher wrote, and
KL(teacher ‖ student) of each next-token distribution. All converted layers are trained at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..harness.interfaces import Job, MambabenchError
from . import training
from .losses import Divergence, cross_entropy, divergence, shifted
from .plugin import ProgressiveConfig


class DistillationTrainer(training.SummedLossTrainer):
    """Cross entropy on the labels and forward KL to a teacher that is run beside the student."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        teacher: nn.Module,
        windows: training.Windows,
        recipe: training.Recipe,
        config: ProgressiveConfig,
    ) -> None:
        super().__init__(job, model, windows, recipe, {"ce": config.ce, "kl": config.kl})
        self.temperature = config.temperature
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        ids, targets = inputs["input_ids"], shifted(inputs["labels"])
        student = model(input_ids=ids, use_cache=False).logits
        parts = {"ce": cross_entropy(student, targets)}
        if self.weights["kl"]:
            with torch.no_grad():
                teacher = self.teacher(input_ids=ids, use_cache=False).logits
            parts["kl"] = divergence(student, teacher, targets, Divergence(temperature=self.temperature))
        return parts


class Progressive:
    """The distiller `progressive`."""

    def __init__(self, config: ProgressiveConfig) -> None:
        self.config = config

    def train(self, job: Job) -> None:
        if job.parent is None or job.teacher is None or job.backend is None:
            raise MambabenchError("progressive: needs a model to train and its teacher")
        config = self.config
        tokenizer = job.parent.backend.tokenizer(job.parent.path)
        windows = training.read_windows(job.data[config.data], tokenizer, config.context)
        student = job.parent.backend.module(job.parent.path)
        if not freeze_all_but_mixers(student):
            raise MambabenchError(f"progressive: {job.parent.name} has no Mamba mixers, so there is nothing to train")
        recipe = training.Recipe(
            tokens=config.tokens,
            batch=config.batch,
            lr=config.lr,
            warmup=config.warmup,
            clip=config.clip,
            accumulation=config.accumulation,
        )
        teacher = job.teacher.backend.module(job.teacher.path)
        if job.device != "cpu":
            teacher = teacher.to(torch.bfloat16)
        training.run(DistillationTrainer(job, student, teacher, windows, recipe, config), job)
        job.backend.save(student, job.out, like=job.parent.path)


def freeze_all_but_mixers(model: nn.Module) -> int:
    """Leaves only the parameters of Mamba mixers (`….mamba.…`) to be trained; returns how many numbers those are."""
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mamba." in name)
        trained += parameter.numel() if parameter.requires_grad else 0
    return trained
