"""Trains the new Mamba mixers of a converted model towards its teacher, with everything else frozen.

The first stage of "The Mamba in the Llama" (section 3.2): cross entropy on text that the teacher wrote, and
KL(teacher ‖ student) of each next-token distribution. Converted layers are trained together or join one set after the
other; those that have not joined yet run the attention that they are to replace. Before all that, the mixers may learn
to do what that attention does on the hidden states of the model before its conversion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..harness.interfaces import Job, MambabenchError
from . import training
from .batches import counted, read
from .distillation import DistillationTrainer, load_frozen, load_teacher
from .losses import alignment, shifted
from .mixers import choose_trained, compared, give_back, lend, mixers, replaced
from .placement import lighten
from .plugin import ProgressiveConfig
from .processes import rank
from .windows import Windows, read_windows

ALIGNED = "aligned.pt"
"""Mixers and cost of the finished first phase, in the scratch folder."""


class Progressive:
    """The distiller `progressive`."""

    def __init__(self, config: ProgressiveConfig) -> None:
        self.config = config

    def train(self, job: Job) -> None:
        if job.parent is None or job.teacher is None or job.backend is None:
            raise MambabenchError("progressive: needs a model to train and its teacher")
        config = self.config
        tokenizer = job.parent.backend.tokenizer(job.parent.path)
        windows = read_windows(job.data[config.data], tokenizer, config.context, job.cache)
        student = job.parent.backend.module(job.parent.path)
        name, aligned = f"progressive: {job.parent.name}", ("mixers",) if config.align_tokens else ()
        choose_trained(student, (*aligned, *config.train), name)
        lighten(student, job.device)
        choose_trained(student, aligned or config.train, name)
        joining = join(config.schedule, sorted(mixers(student, "mamba")), config.sets)
        teacher = load_teacher(job, config, "progressive")
        former = None
        if config.align_tokens or len(joining) > 1:
            shared = teacher is not None and not config.teacher
            former = teacher if shared else load_frozen(job.teacher, job.device)
        before = align(job, student, former, windows, config)
        choose_trained(student, config.train, name)
        recipe = training.recipe_of(config, config.tokens, phases=len(joining))
        trainer = DistillationTrainer(job, student, teacher, windows, recipe, config, before)
        if former is not None and len(joining) > 1:
            trainer.add_callback(_Joining(student, former.to(trainer.args.device), joining))
        training.report(trainer, job, training.run(trainer, job))
        choose_trained(student, (*aligned, *config.train), name)
        training.save(job, student)


def join(schedule: str, layers: Sequence[int], sets: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """The layers that join in each phase, of the converted `layers`; those that no set names are there from the start.

    Without `sets` each layer is one: in order if `stepwise`, every other one first if `interleaved` (the order of the
    released `mamba2_llama_stepwise` recipe). Raises MambabenchError for a layer that is not converted, or named twice.

    >>> [sorted(part) for part in join("interleaved", [0, 1, 2, 4], ())], len(join("together", [0, 1], ()))
    ([[0], [2], [1], [4]], 1)
    """
    if schedule == "together" or not layers:
        return [frozenset(layers)]
    if not sets:
        order = layers if schedule == "stepwise" else [*layers[::2], *layers[1::2]]
        return [frozenset([layer]) for layer in order]
    named = [layer for part in sets for layer in part]
    for layer in named:
        if layer not in layers:
            raise MambabenchError(f"sets: layer {layer} is not converted; converted are {list(layers)}")
        if named.count(layer) > 1:
            raise MambabenchError(f"sets: layer {layer} is named twice")
    first, *later = map(frozenset, sets)
    return [first | (set(layers) - set(named)), *later]


class _Joining(TrainerCallback):
    """Lends the attention that they replace to the layers that have not joined yet; the step number decides, so that a
    resumed training goes on alike."""

    def __init__(self, student: nn.Module, former: nn.Module, joining: Sequence[frozenset[int]]) -> None:
        self.pairs, self.joining = replaced(student, former), joining

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phases = len(self.joining)
        phase = min(state.global_step * phases // state.max_steps, phases - 1)
        joined = frozenset().union(*self.joining[: phase + 1])
        for layer, (mixer, attention) in self.pairs.items():
            if layer in joined:
                give_back(mixer)
            else:
                lend(mixer, attention)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for mixer, _ in self.pairs.values():
            give_back(mixer)


class AlignmentTrainer(training.SummedLossTrainer):
    """Each mixer alone learns what the attention that it replaces does, on the hidden states of the model with it."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        teacher: nn.Module,
        windows: Windows,
        recipe: training.Recipe,
    ) -> None:
        super().__init__(job, model, windows, recipe, {"align": 1.0}, recipe.steps(windows), folder="align")
        self.bare, self.pairs = model, replaced(model, teacher)
        for _, attention in self.pairs.values():
            attention.to(self.args.device)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        places = counted(inputs, shifted(inputs["labels"]))
        with compared(self.pairs) as seen:
            model(**read(self.bare, inputs), use_cache=False)
        total = torch.zeros((), device=places.device)
        for pair in seen.values():
            total = total + alignment(*(output.flatten(0, 1)[places] for output in pair)).sum()
        return {"align": total / len(self.pairs)}


def align(
    job: Job, student: nn.Module, former: nn.Module | None, windows: Windows, config: ProgressiveConfig
) -> training.Spent:
    """The first phase, if `align_tokens` asks for one; returns what it took. A finished one is not run again.
    `former` has the attention that the mixers replace."""
    if not config.align_tokens or former is None:
        return training.Spent()
    finished = job.scratch / ALIGNED
    if finished.is_file():
        kept = torch.load(finished, weights_only=True)
        student.load_state_dict(kept["mixers"], strict=False)
        return training.Spent(**kept["spent"])
    # All the model's layers run as they were, so that a copy for each GPU has to do.
    recipe = replace(training.recipe_of(config, config.align_tokens), checkpointing=False, parallel="ddp")
    spent = training.run(AlignmentTrainer(job, student, former, windows, recipe), job)
    if rank():
        return spent
    learnt = {name: value.detach().cpu() for name, value in student.named_parameters() if value.requires_grad}
    unfinished = finished.with_suffix(".partial")
    torch.save({"mixers": learnt, "spent": asdict(spent)}, unfinished)
    unfinished.replace(finished)
    return spent
