"""The backends that ship with mambabench, described without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..harness.hooks import hookimpl
from ..harness.interfaces import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """The teacher has no options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2HybridConfig:
    """Options of new Mamba-2 layers."""

    d_conv: int = 4
    """Taps of the convolution."""
    chunk: int = 64
    """Tokens of a block of the parallel scan."""


@hookimpl
def mambabench_components() -> list[Component]:
    """The components of this room."""
    return [
        Component(
            kind="backend",
            name="teacher",
            target="mambabench.backends.hybrid:TeacherBackend",
            config=TeacherConfig,
            traits=frozenset({"rollback"}),
            summary="a Llama folder as it is",
        ),
        Component(
            kind="backend",
            name="mamba2-hybrid",
            target="mambabench.backends.hybrid:Mamba2HybridBackend",
            config=Mamba2HybridConfig,
            traits=frozenset({"rollback"}),
            summary="attention traded for Mamba-2, initialised from it",
        ),
    ]
