"""Trains a whole model on text: cross entropy, a divergence from the teacher, or both.

The second stage of "The Mamba in the Llama": cross entropy alone for its Llama-3 models, the divergence alone (from a
larger teacher) for those of Llama-3.1 and 3.2.
"""

from __future__ import annotations

from ..harness.interfaces import Job, MambabenchError
from . import training
from .distillation import DistillationTrainer, load_teacher
from .mixers import choose_trained
from .placement import lighten
from .plugin import SftConfig
from .windows import read_windows


class Sft:
    """The distiller `sft`."""

    def __init__(self, config: SftConfig) -> None:
        self.config = config

    def train(self, job: Job) -> None:
        if job.parent is None or job.backend is None:
            raise MambabenchError("sft: needs a model to train")
        config = self.config
        tokenizer = job.parent.backend.tokenizer(job.parent.path)
        windows = read_windows(job.data[config.data], tokenizer, config.context, job.cache)
        student = job.parent.backend.module(job.parent.path)
        choose_trained(student, config.train, f"sft: {job.parent.name}")
        lighten(student, job.device)
        teacher = load_teacher(job, config, "sft")
        trainer = DistillationTrainer(job, student, teacher, windows, training.recipe_of(config, config.tokens), config)
        training.report(trainer, job, training.run(trainer, job))
        training.save(job, student)
