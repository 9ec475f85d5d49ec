"""Trains on preferences: direct preference optimisation, the third stage of "The Mamba in the Llama".

transformers' Trainer under our records and checkpoints, as in the other stages. TRL's DPOTrainer would replace the
model's forward by one with a head of its own, and counts neither tokens nor pairs as the other stages do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..harness.documents import encode_ended, read_preferences
from ..harness.interfaces import Job, MambabenchError, Tokenizer
from . import training
from .distillation import load_frozen
from .fused import head_weight, token_losses, without_head
from .losses import IGNORED, dpo, sequence_logprob, shifted, token_cross_entropy
from .mixers import choose_trained
from .placement import lighten
from .plugin import DpoConfig


@dataclass(frozen=True, slots=True)
class Pairs(Dataset[dict[str, Tensor]]):
    """Chosen and rejected texts, each with its prompt: ids and labels, `IGNORED` for the prompt, all int64 [length]."""

    rows: Sequence[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
    dropped: int
    """Pairs left out, because an answer began beyond the context."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (chosen, chosen_labels), (rejected, rejected_labels) = self.rows[index]
        return {
            "chosen": chosen,
            "chosen_labels": chosen_labels,
            "rejected": rejected,
            "rejected_labels": rejected_labels,
        }


def read_pairs(path: Path, tokenizer: Tokenizer, context: int) -> Pairs:
    """Reads preferences; texts are cut after `context` tokens. Raises MambabenchError where no pair is left."""
    rows, dropped = [], 0
    for preference in read_preferences(path):
        both = []
        for document in preference.documents():
            ids, prompt = encode_ended(document, tokenizer)
            labels = [IGNORED] * prompt + ids[prompt:]
            both.append((torch.tensor(ids[:context]), torch.tensor(labels[:context])))
        if all(bool((labels != IGNORED).any()) for _, labels in both):
            rows.append((both[0], both[1]))
        else:
            dropped += 1
    if not rows:
        raise MambabenchError(f"{path}: no pair whose answers begin within context = {context} tokens")
    return Pairs(rows, dropped)


def collate_pairs(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """B pairs as 2 B rows, the chosen ones first, padded at the right.

    `labels` [B, 2] has one label a pair: transformers divides by their number, which makes the loss a mean over pairs.
    """
    ids = [row[side] for side in ("chosen", "rejected") for row in rows]
    answers = [row[f"{side}_labels"] for side in ("chosen", "rejected") for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(row) for row in ids])
    padded = pad(ids, batch_first=True)
    return {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "answers": pad(answers, batch_first=True, padding_value=IGNORED),
        "labels": torch.tensor([[IGNORED, 0]]).repeat(len(rows), 1),
    }


class PreferenceTrainer(training.SummedLossTrainer):
    """DPO against a frozen reference. Records have the loss, the margin of the implicit rewards (nat), and the share
    of pairs whose chosen answer has the higher one."""

    unit = "pair"

    def __init__(
        self, job: Job, model: nn.Module, reference: nn.Module, pairs: Pairs, recipe: training.Recipe, config: DpoConfig
    ) -> None:
        steps = math.ceil(config.epochs * len(pairs) / recipe.batch)
        weights = {"dpo": 1.0, "margin": 0.0, "accuracy": 0.0}
        super().__init__(job, model, pairs, recipe, weights, steps, collator=collate_pairs)
        self.config, self.student = config, model
        self.reference = self.beside(reference)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        said = answer_logprob(model, self.student, inputs, self.config.slice)
        with torch.no_grad():
            told = answer_logprob(self.reference, self.reference, inputs, self.config.slice)
        (chosen, rejected), (ref_chosen, ref_rejected) = said.chunk(2), told.chunk(2)
        preference = dpo(chosen, rejected, ref_chosen, ref_rejected, self.config.beta)
        margin = preference.chosen_reward - preference.rejected_reward
        return {
            "dpo": preference.loss.sum(),
            "margin": margin.sum(),
            "accuracy": (margin > 0).to(margin.dtype).sum(),
        }


def answer_logprob(model: nn.Module, bare: nn.Module, inputs: Mapping[str, Tensor], size: int) -> Tensor:
    """Log-probability of each row's answer given its prompt, nat [2 B]. `bare` is the model without what wraps it;
    `size` > 0 computes logits for so many positions at a time."""
    targets = shifted(inputs["answers"])
    if not size:
        return sequence_logprob(model(input_ids=inputs["input_ids"], use_cache=False).logits, targets)
    counted = targets != IGNORED
    with without_head(bare):
        hidden = model(input_ids=inputs["input_ids"], use_cache=False).logits[counted]
    (nat,) = token_losses(_negative_logprob, targets[counted], hidden, head_weight(bare), size=size)
    rows = counted.nonzero()[:, 0]
    return -torch.zeros(len(targets), dtype=nat.dtype, device=nat.device).index_add(0, rows, nat)


def _negative_logprob(logits: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
    return token_cross_entropy(logits, targets).unsqueeze(0)


class Dpo:
    """The distiller `dpo`."""

    def __init__(self, config: DpoConfig) -> None:
        self.config = config

    def train(self, job: Job) -> None:
        if job.parent is None or job.backend is None:
            raise MambabenchError("dpo: needs a model to train")
        config = self.config
        asked = job.parent if config.reference == "start" else job.teacher
        if asked is None:
            raise MambabenchError('dpo: reference = "teacher" needs a teacher; say "start" where the teacher trains')
        pairs = read_pairs(job.data[config.data], job.parent.backend.tokenizer(job.parent.path), config.context)
        student = job.parent.backend.module(job.parent.path)
        choose_trained(student, config.train, f"dpo: {job.parent.name}")
        lighten(student, job.device)
        recipe = training.Recipe(
            tokens=0,
            batch=config.batch,
            lr=config.lr,
            warmup=config.warmup,
            clip=config.clip,
            accumulation=config.accumulation,
            weight_decay=config.weight_decay,
            beta2=config.beta2,
            checkpointing=config.checkpointing,
            parallel=config.parallel,
        )
        trainer = PreferenceTrainer(job, student, load_frozen(asked, job.device), pairs, recipe, config)
        training.report(trainer, job, training.run(trainer, job))
        job.emit("fact", name="pairs", value=len(pairs), unit="pairs")
        job.emit("fact", name="pairs_dropped", value=pairs.dropped, unit="pairs")
        training.save(job, student)
