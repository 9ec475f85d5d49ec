"""Trains on preferences: direct preference optimisation, the third stage of "The Mamba in the Llama".

transformers' Trainer under our records and checkpoints, as in the other stages. TRL's DPOTrainer would replace the
model's forward by one with a head of its own, and counts neither tokens nor pairs as the other stages do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..harness.documents import encode_ended, read_preferences
from ..harness.interfaces import Artifact, Job, MambabenchError, Tokenizer
from . import training
from .distillation import load_frozen
from .fused import head_weight, token_losses, without_head
from .losses import IGNORED, dpo, sequence_logprob, shifted, token_cross_entropy
from .mixers import choose_trained
from .placement import lighten
from .plugin import DpoConfig
from .processes import rank, ranks

TOLD = "reference.pt"
"""What the reference said of all pairs, in the scratch folder."""


@dataclass(frozen=True, slots=True)
class Pairs(Dataset[dict[str, Tensor]]):
    """Chosen and rejected texts, each with its prompt: ids and labels, `IGNORED` for the prompt, all int64 [length]."""

    rows: Sequence[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
    dropped: int
    """Pairs left out, because an answer began beyond the context."""
    told: Tensor | None = None
    """What the reference says of both answers, nat [pairs, 2], where it was asked beforehand."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (chosen, chosen_labels), (rejected, rejected_labels) = self.rows[index]
        row = {
            "chosen": chosen,
            "chosen_labels": chosen_labels,
            "rejected": rejected,
            "rejected_labels": rejected_labels,
        }
        return row if self.told is None else {**row, "told": self.told[index]}


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
    `counted` are the places of answers, as `batches.known` has them; `told` [2 B] is what the reference said.
    """
    ids = [row[side] for side in ("chosen", "rejected") for row in rows]
    answers = [row[f"{side}_labels"] for side in ("chosen", "rejected") for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(row) for row in ids])
    padded = pad(ids, batch_first=True)
    targets = pad(answers, batch_first=True, padding_value=IGNORED)
    batch = {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "answers": targets,
        "counted": (shifted(targets) != IGNORED).flatten().nonzero().squeeze(1),
        "labels": torch.tensor([[IGNORED, 0]]).repeat(len(rows), 1),
    }
    return {**batch, "told": torch.stack([row["told"] for row in rows], 1).flatten()} if "told" in rows[0] else batch


class PreferenceTrainer(training.SummedLossTrainer):
    """DPO against a frozen reference. Records have the loss, the margin of the implicit rewards (nat), and the share
    of pairs whose chosen answer has the higher one."""

    unit = "pair"

    def __init__(
        self, job: Job, model: nn.Module, reference: Artifact, pairs: Pairs, recipe: training.Recipe, config: DpoConfig
    ) -> None:
        steps = math.ceil(config.epochs * len(pairs) / recipe.batch)
        weights = {"dpo": 1.0, "margin": 0.0, "accuracy": 0.0}
        super().__init__(job, model, pairs, recipe, weights, steps, collator=collate_pairs)
        self.config, self.student = config, model
        self.reference: nn.Module | None = None
        kept = job.scratch / TOLD
        if config.precompute and kept.is_file():
            self.train_dataset = replace(pairs, told=torch.load(kept, weights_only=True))
            return
        self.reference = self.beside(load_frozen(reference, job.device, recipe.parallel))
        if config.precompute:
            told = self.ask(self.reference, pairs)
            if rank() == 0:
                unfinished = kept.with_suffix(".partial")
                torch.save(told, unfinished)
                unfinished.replace(kept)
            self.train_dataset, self.reference = replace(pairs, told=told), None

    @torch.no_grad()
    def ask(self, reference: nn.Module, pairs: Pairs) -> Tensor:
        """Log-probabilities of all answers, nat fp32 [pairs, 2]. Ranks share the pairs; all run equally often."""
        number, size, device = ranks(), self.recipe.part, self.args.device
        told = torch.zeros(len(pairs), 2, device=device)
        for first in range(0, len(pairs), size * number):
            rows = [row % len(pairs) for row in range(first, first + size * number)]
            mine = rows[rank() * size :][:size]
            batch = {name: value.to(device) for name, value in collate_pairs([pairs[row] for row in mine]).items()}
            with self.accelerator.autocast():
                said = answer_logprob(reference, reference, batch, self.config.slice)
            told[mine] = said.view(2, -1).T.float()
        if number > 1:
            # None is above 0, which stands where another rank asked.
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MIN)
        return told.cpu()

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        said = answer_logprob(model, self.student, inputs, self.config.slice)
        if self.reference is None:
            told = inputs["told"]
        else:
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
    places = inputs["counted"]
    with without_head(bare):
        hidden = model(input_ids=inputs["input_ids"], use_cache=False).logits.flatten(0, 1)[places]
    (nat,) = token_losses(_negative_logprob, targets.flatten()[places], hidden, head_weight(bare), size=size)
    rows = places // targets.shape[1]
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
        recipe = training.recipe_of(config, tokens=0)
        trainer = PreferenceTrainer(job, student, asked, pairs, recipe, config)
        training.report(trainer, job, training.run(trainer, job))
        job.emit("fact", name="pairs", value=len(pairs), unit="pairs")
        job.emit("fact", name="pairs_dropped", value=pairs.dropped, unit="pairs")
        training.save(job, student)
