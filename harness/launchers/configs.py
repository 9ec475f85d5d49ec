"""Options of the built-in launchers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalConfig:
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to use, as `nvidia-smi` counts them; none runs everything on the CPU."""
    share: int = 1
    """Steps that may use one GPU at the same time, if each needs a single one and none must be alone."""
    jobs: int = 0
    """Steps side by side. 0: `share` per GPU, or one per core where no GPU is used. As many that wait for a judge run
    beside them."""
    threads: int = 0
    """Threads a step. 0: one on the CPU, an equal share of the cores beside a GPU."""

    def __post_init__(self) -> None:
        if self.share < 1:
            raise ValueError(f"share is {self.share}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    gpus: tuple[int, ...] = ()
    """GPUs of the machine that starts the run. Ray chooses which ones steps get; speed is measured on their kind."""
    share: int = 1
    """Steps that may use one GPU at the same time, if each needs a single one and none must be alone."""
    jobs: int = 0
    """Steps side by side. 0: as many as the cluster has room for."""
    threads: int = 0
    """Threads a step, and the cores that it takes of Ray. 0: one."""

    def __post_init__(self) -> None:
        if self.share < 1:
            raise ValueError(f"share is {self.share}; it must be at least 1")
