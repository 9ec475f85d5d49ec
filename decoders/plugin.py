"""The components of this room, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from ..harness.hooks import hookimpl
from ..harness.interfaces import Choice, ChoiceOf, Component, ModelRef, Rollback


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardConfig:
    """What and how much to generate is up to the suite."""

    look: int = 1
    """Rounds after which the host looks at what came of them. Above 1 the device need not wait in between; text that
    ended meanwhile is dropped."""

    def __post_init__(self) -> None:
        _at_least_one(self, "look")


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramConfig:
    longest: int = 4
    """Most tokens of the text's end that are looked up."""
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"shortest is {self.shortest}; it must be at least 1 and at most longest ({self.longest})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: ModelRef
    """The model that drafts, by its name in the plan. It has the target's vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersConfig:
    count: int = 2
    """Layers at even distances, the first and the last among them."""
    layers: tuple[int, ...] = ()
    """Which ones, in their order; in place of `count`."""

    def __post_init__(self) -> None:
        _at_least_one(self, "count")
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise ValueError(f"layers is {list(self.layers)}; layers are numbered from 0 and stand in their order")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    draft: Annotated[Choice, ChoiceOf("draft")] = field(default_factory=lambda: Choice("draft", "ngram", NgramConfig()))
    k: int = 4
    """Drafted tokens a round; with `adapt`, the most."""
    adapt: bool = False
    """Choose K from 1 … k for each window, from what was accepted and from what rounds cost."""
    window: int = 8
    """Rounds for which a chosen K is kept."""
    steady: bool = True
    """A draft that samples goes one token further, so that sampled text is the same for every K. Without, that token's
    time is saved and the text depends on where rounds begin; its distribution does not."""
    rollback: Rollback = "replay"
    """How recurrent layers take rejected tokens back: `replay` their inputs from a checkpoint, or `snapshot`, a state
    for every token, to compare it with."""
    look: int = 1
    """Rounds after which the host looks at what came of them. Above 1 the device need not wait in between; text that
    ended meanwhile is dropped."""

    def __post_init__(self) -> None:
        _at_least_one(self, "k", "window", "look")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedConfig:
    draft: Annotated[Choice, ChoiceOf("draft")] = field(default_factory=lambda: Choice("draft", "ngram", NgramConfig()))
    k: int = 4
    """Drafted tokens a round."""
    tokens: float = 3.0
    """Mean tokens of a round, the correction or bonus token included: more than 1, less than k + 1."""
    rollback: Rollback = "replay"
    """As of `speculative`."""
    look: int = 1
    """Rounds after which the host looks at what came of them."""

    def __post_init__(self) -> None:
        _at_least_one(self, "k", "look")
        if not 1 < self.tokens < self.k + 1:
            raise ValueError(f"tokens is {self.tokens}; it must be more than 1 and less than k + 1 ({self.k + 1})")


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


@hookimpl
def mambabench_components() -> Iterable[Component]:
    return (
        Component(
            kind="decoder",
            name="standard",
            target="mambabench.decoders.standard:StandardDecoder",
            config=StandardConfig,
            traits=frozenset({"lossless", "streams"}),
            summary="One token a call: greedy, temperature, top-k, top-p",
        ),
        Component(
            kind="decoder",
            name="speculative",
            target="mambabench.decoders.speculative:speculative",
            config=SpeculativeConfig,
            traits=frozenset({"lossless", "streams"}),
            summary="A draft proposes k tokens, one call of the model judges them",
        ),
        Component(
            kind="decoder",
            name="scripted",
            target="mambabench.decoders.scripted:scripted",
            config=ScriptedConfig,
            traits=frozenset({"streams"}),
            summary="All the work of speculative, but chance accepts drafts: for maps of speed, its text means nothing",
        ),
        Component(
            kind="draft",
            name="ngram",
            target="mambabench.decoders.ngram:NgramDraft",
            config=NgramConfig,
            summary="Copies what followed the text's last tokens before",
        ),
        Component(
            kind="draft",
            name="model",
            target="mambabench.decoders.stepping:ModelDraft",
            config=ModelConfig,
            summary="Another model of the plan, with the target's vocabulary",
        ),
        Component(
            kind="draft",
            name="layers",
            target="mambabench.decoders.stepping:LayersDraft",
            config=LayersConfig,
            summary="Some layers of the model itself, the first and the last, without training",
        ),
    )
