"""What the package brings, as data: loaded with every command of mambabench, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mambabench import Component, DataRef, hookimpl


@dataclass(frozen=True, slots=True, kw_only=True)
class BigramConfig:
    batch: int = 64
    """Tokens whose successors the teacher is asked for at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRepeatConfig:
    n: int = 4
    """Length of the n-grams that appear at most once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistinctConfig:
    data: DataRef
    prompts: int = 8
    prompt_tokens: int = 8
    new_tokens: int = 32
    n: tuple[int, ...] = (1, 2, 4)
    """Lengths of the n-grams that are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VarietyConfig:
    """The table has no options."""


@hookimpl
def mambabench_components() -> Iterable[Component]:
    return (
        Component(
            kind="backend",
            name="bigram",
            target="mambabench_bigram.backend:Bigram",
            config=BigramConfig,
            traits=frozenset({"rollback"}),
            summary="The teacher's next-token distribution after each single token",
        ),
        Component(
            kind="decoder",
            name="no-repeat",
            target="mambabench_bigram.decoder:NoRepeat",
            config=NoRepeatConfig,
            summary="Decoding in which no n-gram appears twice",
        ),
        Component(
            kind="suite",
            name="distinct",
            target="mambabench_bigram.suite:Distinct",
            config=DistinctConfig,
            traits=frozenset({"generate"}),
            summary="Share of different n-grams in generated text",
        ),
        Component(
            kind="table",
            name="variety",
            target="mambabench_bigram.table:Variety",
            config=VarietyConfig,
            summary="Distinct n-grams by model and decoder",
        ),
    )
