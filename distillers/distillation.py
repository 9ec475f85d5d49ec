"""Training towards a teacher: what the stages `progressive` and `sft` share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..harness.interfaces import Artifact, Job, MambabenchError
from . import training
from .fused import token_losses, without_head
from .losses import IGNORED, Divergence, shifted, token_cross_entropy
from .plugin import DistillationConfig
from .windows import Windows

READ = ("input_ids", "position_ids")
"""What of a batch a model is given; windows are padded at the right, where causal models need no mask."""


class DistillationTrainer(training.SummedLossTrainer):
    """Cross entropy on the labels, and a divergence from a teacher that is run beside the student."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        teacher: nn.Module | None,
        windows: Windows,
        recipe: training.Recipe,
        config: DistillationConfig,
        before: training.Spent | None = None,
    ) -> None:
        weights = {name: weight for name, weight in (("ce", config.ce), ("kl", config.kl)) if weight}
        super().__init__(job, model, windows, recipe, weights, recipe.steps(windows), before=before)
        self.divergence = Divergence(config.kl_kind, config.js_beta, config.temperature)
        self.slice = config.slice
        self.student, self.teacher = model, teacher
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        targets = shifted(inputs["labels"])
        counted = targets != IGNORED
        given = {name: inputs[name] for name in READ if name in inputs}
        teacher = self.teacher if "kl" in self.weights else None
        told = None
        if not self.slice:
            said = model(**given, use_cache=False).logits[counted]
            if teacher is not None:
                with torch.no_grad():
                    told = teacher(**given, use_cache=False).logits[counted]
            values = self.of_tokens(said, told, targets[counted])
        else:
            with ExitStack() as heads:
                head = heads.enter_context(without_head(self.student))
                said = model(**given, use_cache=False).logits[counted]
                their_head = None
                if teacher is not None:
                    their_head = heads.enter_context(without_head(teacher))
                    with torch.no_grad():
                        told = teacher(**given, use_cache=False).logits[counted]
            values = token_losses(self.of_tokens, targets[counted], said, head, told, their_head, self.slice)
        return dict(zip(self.weights, values.sum(1), strict=True))

    def of_tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """The loss's parts of each token [parts, N], from logits [N, V] and targets [N]."""
        parts = []
        if "ce" in self.weights:
            parts.append(token_cross_entropy(student, targets))
        if teacher is not None:
            parts.append(self.divergence(student, teacher))
        return torch.stack(parts)


def recipe_of(config: DistillationConfig, phases: int = 1) -> training.Recipe:
    """How to train, from a stage's options."""
    return training.Recipe(
        tokens=config.tokens,
        batch=config.batch,
        lr=config.lr,
        warmup=config.warmup,
        clip=config.clip,
        accumulation=config.accumulation,
        weight_decay=config.weight_decay,
        phases=phases,
    )


def load_frozen(model: Artifact, device: str) -> nn.Module:
    """A model that is only asked: on a GPU in bf16."""
    module = model.backend.module(model.path)
    return (module if device == "cpu" else module.to(torch.bfloat16)).eval().requires_grad_(False)


def load_teacher(job: Job, config: DistillationConfig, stage: str) -> nn.Module | None:
    """The teacher, where the loss or the stage asks for one."""
    if not config.kl:
        return None
    if job.teacher is None:
        raise MambabenchError(
            f"{stage}: kl = {config.kl:g} needs a teacher; say kl = 0 where the teacher itself trains"
        )
    return load_frozen(job.teacher, job.device)
