"""Options of the built-in launchers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalConfig:
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to use, as `nvidia-smi` counts them; none runs everything on the CPU."""
    jobs: int = 0
    """Steps side by side. 0: one per GPU, or one per core where no GPU is used."""
    threads: int = 0
    """Threads a step. 0: one on the CPU, an equal share of the cores beside a GPU."""
