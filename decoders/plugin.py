"""The components of this room, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from ..harness.hooks import hookimpl
from ..harness.interfaces import Choice, ChoiceOf, Component


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardConfig:
    """Plain decoding has no options: what and how much to generate is up to the suite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramConfig:
    longest: int = 4
    """Most tokens of the text's end that are looked up."""
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"shortest is {self.shortest}; it must be at least 1 and at most longest ({self.longest})")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    draft: Annotated[Choice, ChoiceOf("draft")] = field(default_factory=lambda: Choice("draft", "ngram", NgramConfig()))
    k: int = 4
    """Drafted tokens a round."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1")


@hookimpl
def mambabench_components() -> Iterable[Component]:
    return (
        Component(
            kind="decoder",
            name="standard",
            target="mambabench.decoders.standard:StandardDecoder",
            config=StandardConfig,
            traits=frozenset({"lossless"}),
            summary="One token a call: greedy, temperature, top-k, top-p",
        ),
        Component(
            kind="decoder",
            name="speculative",
            target="mambabench.decoders.speculative:speculative",
            config=SpeculativeConfig,
            traits=frozenset({"lossless"}),
            summary="A draft proposes k tokens, one call of the model judges them",
        ),
        Component(
            kind="draft",
            name="ngram",
            target="mambabench.decoders.ngram:NgramDraft",
            config=NgramConfig,
            summary="Copies what followed the text's last tokens before",
        ),
    )
