"""Training towards a teacher: what the stages `progressive` and `sft` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.interfaces import Artifact, Job, MambabenchError
from . import training
from .batches import counted, read
from .fused import head_weight, plain_head, summed_losses, without_head
from .losses import Distillation, Divergence, shifted
from .plugin import DistillationConfig
from .processes import ranks
from .windows import Windows

LOGITS = 2**28
"""Of one model, held at a time on a GPU, if the plan does not say: half a gigabyte in bf16."""


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
        divergence = Divergence(config.kl_kind, config.js_beta, config.temperature)
        self.loss, self.slice = Distillation(config.ce, config.kl, divergence), config.slice
        super().__init__(job, model, windows, recipe, self.loss.weights, recipe.steps(windows), before=before)
        # In phases, layers borrow the teacher's attention, and need it whole.
        self.teacher = None if teacher is None else self.beside(teacher, shared=recipe.phases == 1)
        self.student = model
        head = plain_head(model)
        # DDP, where it has to look for weights that a step leaves out, would take one that is used beside its forward
        # for such.
        self.unseen = recipe.phases > 1 and ranks() > 1 and head is not None and head.weight.requires_grad
        if self.slice and self.unseen:
            raise MambabenchError("slice: several GPUs cannot train the head while layers join in turn; say slice = 0")

    def losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        targets = shifted(inputs["labels"]).flatten()
        places = counted(inputs, targets)
        targets, given = targets[places], read(self.student, inputs)
        teacher = self.teacher if self.loss.kl else None
        told = None
        with ExitStack() as heads:
            size = self.slice or self._fitting(teacher)
            if size:
                for asked in (self.student,) if teacher is None else (self.student, teacher):
                    heads.enter_context(without_head(asked))
            said = model(**given, use_cache=False).logits.flatten(0, 1)[places]
            if teacher is not None:
                with torch.no_grad():
                    told = teacher(**given, use_cache=False).logits.flatten(0, 1)[places]
        if not size:
            return dict(zip(self.weights, self.loss(said, told, targets).sum(1), strict=True))
        head, their_head = head_weight(self.student), None if teacher is None else head_weight(teacher)
        total, sums = summed_losses(self.loss, targets, said, head, told, their_head, size)
        return {**dict(zip(self.weights, sums, strict=True)), training.TOTAL: total}

    def _fitting(self, teacher: nn.Module | None) -> int:
        """Positions whose logits a GPU holds at a time if the plan does not say; 0: the models make all of them."""
        models = [self.student] if teacher is None else [self.student, teacher]
        if self.args.device.type != "cuda" or self.unseen or not all(map(plain_head, models)):
            return 0
        words = max(head.out_features for head in map(plain_head, models) if head is not None)
        return max(1, LOGITS // words)


def load_frozen(model: Artifact, device: str, parallel: str = "ddp") -> nn.Module:
    """A model that is only asked: on a GPU in bf16.

    A backend may have a quicker way there, which it calls `frozen`. Where ranks hold a part each, nobody may hold the
    whole on a GPU: it stays on the CPU until then, if the backend can in memory that ranks share, which it calls
    `mapped`.
    """
    way = "mapped" if parallel == "fsdp" and ranks() > 1 else "frozen"
    load: Callable[[Path, str], nn.Module] | None = getattr(model.backend, way, None)
    if load is not None:
        return load(model.path, device).eval().requires_grad_(False)
    module = model.backend.module(model.path)
    return (module if device == "cpu" else module.to(torch.bfloat16)).eval().requires_grad_(False)


def load_teacher(job: Job, config: DistillationConfig, stage: str) -> nn.Module | None:
    """The model that the divergence asks, the plan's teacher if the stage names no other; None without a divergence."""
    if not config.kl:
        return None
    asked = job.models[config.teacher] if config.teacher else job.teacher
    if asked is None:
        raise MambabenchError(
            f"{stage}: kl = {config.kl:g} needs a teacher; say kl = 0 where the teacher itself trains"
        )
    assert job.parent is not None
    words, own = (of.backend.describe(of.path)["vocab_size"] for of in (asked, job.parent))
    if words != own:
        raise MambabenchError(
            f"{stage}: the teacher {asked.name} has a vocabulary of {words} tokens, {job.parent.name} one of {own}"
        )
    return load_frozen(asked, job.device, config.parallel)
