"""Chooses the layers whose attention is worth most: restores one at a time and measures what the teacher says of it.

It needs a model that has lost all attention, and is better trained a little, since untrained mixers say nothing of what
trained ones lack; that model and the measuring are the price of the choice. The idea is that of KL-guided layer
selection (Li et al. 2025, arXiv 2512.20569).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.interfaces import Job, MambabenchError
from .batches import read
from .distillation import load_frozen
from .losses import Divergence
from .mixers import give_back, lend, mixers, replaced
from .plugin import KlGuidedConfig
from .selectors import spread_some
from .windows import Windows, collate, read_windows

SLICE = 1024
"""Positions whose distributions are held at a time: with a vocabulary of 128k they are half a gigabyte in fp32."""


class KlGuided:
    """The selector `kl-guided`."""

    def __init__(self, config: KlGuidedConfig) -> None:
        self.config = config

    def select(self, job: Job) -> list[int]:
        """Emits the KL with no layer restored and with the chosen ones, what each layer gains alone, and the cost."""
        if job.parent is None or job.teacher is None:
            raise MambabenchError("selector kl-guided: needs a parent model and the teacher")
        begun, config = time.perf_counter(), self.config
        name, artifact = config.model, job.models[config.model]
        parent = load_frozen(job.parent, job.device).to(job.device)
        same = job.teacher.path == job.parent.path
        teacher = parent if same else load_frozen(job.teacher, job.device).to(job.device)
        student = load_frozen(artifact, job.device).to(job.device)
        pairs = replaced(student, parent)
        layers = sorted(job.parent.backend.describe(job.parent.path)["attention_layers"])
        if kept := [layer for layer in layers if layer not in pairs]:
            has = (
                "attention" if kept[0] in mixers(student, "self_attn") else "nothing that attention could stand in for"
            )
            raise MambabenchError(
                f"selector kl-guided: {name} has {has} in layer {kept[0]}; name a model that is all Mamba"
            )
        count = len(spread_some(job, config.share, "kl-guided"))
        if count > len(layers):
            raise MambabenchError(
                f"selector kl-guided: a share of {config.share:g} is {count} layers, the parent has attention in "
                f"{len(layers)}"
            )
        tokenizer = job.parent.backend.tokenizer(job.parent.path)
        windows = read_windows(job.data[config.data], tokenizer, config.context, job.cache)
        measure = _Measure(student, teacher, pairs, windows, config, job)
        chosen: list[int] = []
        (before, *first) = measure([[], *([layer] for layer in layers)])
        gains = {layer: before - after for layer, after in zip(layers, first, strict=True)}
        for layer, gain in gains.items():
            job.emit("fact", name="kl_gain", value=gain, unit="nat/token", arm=f"layer {layer}")
        if not config.greedy:
            chosen = sorted(layers, key=lambda layer: -gains[layer])[:count]
        while len(chosen) < count:
            left = [layer for layer in layers if layer not in chosen]
            after = measure([[*chosen, layer] for layer in left]) if chosen else first
            chosen.append(min(zip(after, left, strict=True))[1])
        (restored,) = measure([chosen])
        seconds = time.perf_counter() - begun
        for fact, value, unit in (
            ("kl_none_restored", before, "nat/token"),
            ("kl_chosen_restored", restored, "nat/token"),
            ("selection_tokens", measure.tokens, "tokens"),
            ("selection_wall", seconds, "s"),
            ("selection_gpu", 0.0 if job.device == "cpu" else seconds, "s"),
        ):
            job.emit("fact", name=fact, value=value, unit=unit)
        return sorted(chosen)


class _Measure:
    """KL(teacher ‖ student) per token on a fixed sample of windows, with the attention of some layers restored."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Mapping[int, tuple[nn.Module, nn.Module]],
        windows: Windows,
        config: KlGuidedConfig,
        job: Job,
    ) -> None:
        self.student, self.teacher, self.pairs, self.windows = student, teacher, pairs, windows
        self.job, self.batch = job, config.batch
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(job.seed))
        enough = int((windows.lengths[order].cumsum(0) < config.tokens).sum()) + 1
        self.rows = order[:enough].tolist()
        self.tokens = 0
        """Run by student or teacher so far."""

    @torch.no_grad()
    def __call__(self, choices: Sequence[Sequence[int]]) -> list[float]:
        """nat per token, of each choice of restored layers."""
        sums, targets_seen = torch.zeros(len(choices), dtype=torch.float64, device=self.job.device), 0
        for first in range(0, len(self.rows), self.batch):
            batch = collate([self.windows[row] for row in self.rows[first : first + self.batch]])
            inputs = {
                name: value.to(self.job.device) if isinstance(value, Tensor) else value for name, value in batch.items()
            }
            counted = inputs["counted"]
            told = self._logits(self.teacher, inputs).flatten(0, 1)[counted]
            for number, choice in enumerate(choices):
                for layer in choice:
                    lend(*self.pairs[layer])
                said = self._logits(self.student, inputs).flatten(0, 1)[counted]
                for layer in choice:
                    give_back(self.pairs[layer][0])
                for part in range(0, len(counted), SLICE):
                    rows = slice(part, part + SLICE)
                    sums[number] += Divergence()(said[rows], told[rows]).double().sum()
            targets_seen += len(counted)
            self.tokens += int(batch["attention_mask"].sum()) * (len(choices) + 1)
            self.job.emit(
                "progress", done=min(first + self.batch, len(self.rows)), total=len(self.rows), unit="windows"
            )
        return (sums / targets_seen).tolist()

    def _logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        logits: Tensor = model(**read(model, inputs), use_cache=False).logits
        return logits
