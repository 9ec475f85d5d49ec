"""Options of the suite `train-speed`."""

from __future__ import annotations

from dataclasses import dataclass

from ..harness.interfaces import DataRef, ModelRef


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpeedConfig:
    context: tuple[int, ...] = (2048,)
    """Tokens of a window; each is measured by itself."""
    tokens: int = 16_384
    """Tokens of an optimiser step, a multiple of every context."""
    steps: int = 4
    """Optimiser steps of a block."""
    pairs: int = 8
    """Blocks per context; in each, both models take the same steps once."""
    warmup: int = 3
    """Steps per context and model that are run first and only timed as a whole."""
    data: DataRef | None = None
    """Text to train on; without it, random tokens."""
    teacher: ModelRef = "teacher"
    """The model that is trained beside, and the one that the divergence asks."""
    train: tuple[str, ...] = ("mixers",)
    """What is trained, as in the stages. `mixers`: of a model without Mamba layers the attention, in those layers that
    the other one has converted."""
    ce: float = 1.0
    """Weight of the cross entropy, per token."""
    kl: float = 0.0
    """Weight of the divergence from the teacher, per token. 0: the teacher is not asked."""
    slice: int = 0
    """Positions whose logits are held at a time. 0: as the stages choose it."""
    checkpointing: bool = False
    """Runs each layer again in the backward pass instead of keeping what it made."""

    def __post_init__(self) -> None:
        least = {"tokens": 2, "steps": 2, "pairs": 1, "warmup": 1, "ce": 0, "kl": 0, "slice": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        for context in self.context:
            if context < 2 or self.tokens % context:
                raise ValueError(f"context {context} does not divide tokens = {self.tokens}")
        if not self.context or not self.train:
            raise ValueError(f"{'train' if self.context else 'context'} is empty; it must name at least one")
        if not self.ce and not self.kl:
            raise ValueError("ce and kl are both 0; one of them must be above 0")
