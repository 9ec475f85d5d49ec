"""The processes that train together, as torchrun, accelerate and the harness name them to each other."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def ranks() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is; the first one alone writes what stays."""
    return int(os.environ.get("RANK", 0))


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """The sum over ranks of each value."""
    if ranks() == 1:
        return list(values)
    total = torch.tensor(values, device=device, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total]


def averaged(values: Sequence[float], device: torch.device) -> list[float]:
    """The mean over ranks of each value."""
    return [value / ranks() for value in summed(values, device)]
