"""Models that are only a shape: no weights lie on disk, and whoever loads one draws them on its device.

What is measured of random weights are speed, memory and arithmetic, and 16 GB of them need neither be written nor read.
Such an artifact has a `random.json` beside its config.json in the place of weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..harness.interfaces import MambabenchError
from .mamba import EXACT
from .weights import read_json

FILE = "random.json"
STEPS = (1e-3, 1e-1)
"""Step sizes of Mamba layers are log-uniform in this range."""


def is_drawn(folder: Path) -> bool:
    """Whether a model's weights are drawn where it is loaded."""
    return (folder / FILE).is_file()


def take_along(source: Path, out: Path) -> None:
    """The same seed and spread for another shape."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / FILE, out / FILE)


def spread(folder: Path) -> tuple[int, float]:
    """Seed, and standard deviation of the weights."""
    raw = read_json(folder / FILE)
    try:
        return int(raw["seed"]), float(raw["init"])
    except (KeyError, TypeError, ValueError):
        raise MambabenchError(f"{folder / FILE}: must have a whole number `seed` and a number `init`") from None


@torch.no_grad()
def tensors(
    shapes: Mapping[str, torch.Size], folder: Path, dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    """Random weights for the tensors of a model of ours, by name: norms and skips 1, biases 0, decays and step sizes as
    new Mamba layers have them, all others normal."""
    seed, init = spread(folder)
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        last, above = name.rpartition(".")[2], name.split(".")[-2:][0]
        exact = torch.promote_types(dtype, torch.float32)
        tensor = torch.empty(shape, dtype=exact if last in EXACT else dtype, device=device)
        if last == "A_log" and len(shape) == 2:
            tensor.copy_(torch.arange(1, shape[1] + 1, device=device).log())
        elif last == "A_log":
            tensor.uniform_(1, 16, generator=generator).log_()
        elif last == "dt_bias":
            dt = tensor.uniform_(*map(math.log, STEPS), generator=generator).exp_()
            tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif last == "D" or "norm" in above:
            tensor.fill_(1)
        elif len(shape) < 2:
            tensor.zero_()
        else:
            tensor.normal_(std=init if len(shape) == 2 else 0.3, generator=generator)
        found[name] = tensor
    return found
