"""Rotary position embeddings with the scalings of transformers, at fp32 or better whatever the weights' dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..harness.interfaces import Unsupported
from ..kernels.pointwise import rotate
from ..kernels.scan.reference import compute_dtype
from .config import HybridConfig

__all__ = ["Rope", "inverse_frequencies", "rotate"]


def inverse_frequencies(config: HybridConfig) -> tuple[Tensor, float]:
    """fp32 [head_dim / 2] on CPU and the factor on cos and sin, as transformers computes them."""
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies, float(factor)
    width = config.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / (parameters.get("rope_theta", 10000.0) ** exponents), 1.0


class Rope:
    """Makes cos and sin of positions. Not a module: a cast of the model must never round the frequencies."""

    def __init__(self, config: HybridConfig) -> None:
        self.config = config
        self._cached: dict[torch.device, Tensor] = {}
        self._factor = 1.0

    def check(self, reached: Tensor | int) -> None:
        """Refuses what `dynamic` does beyond the original context, where the frequencies depend on how a text was cut
        into calls. `reached`: positions int [B, L], or how many of them there are."""
        if (self.config.rope_parameters or {}).get("rope_type") != "dynamic":
            return
        count = reached if isinstance(reached, int) else int(reached.max()) + 1
        if count > self.config.max_position_embeddings:
            raise Unsupported(
                f"rope_type 'dynamic' is served up to its original context of {self.config.max_position_embeddings} "
                f"tokens, not for {count}: beyond it the result depends on how the text was cut into calls"
            )

    def __call__(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """positions int [B, L] -> cos, sin [B, L, 1, head_dim], exact, then in `like`'s dtype."""
        if positions.device not in self._cached:
            frequencies, self._factor = inverse_frequencies(self.config)
            self._cached[positions.device] = frequencies.to(positions.device)
        kind = compute_dtype(like)
        angles = positions.to(kind).unsqueeze(-1) * self._cached[positions.device].to(kind)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return (angles.cos() * self._factor).to(like.dtype), (angles.sin() * self._factor).to(like.dtype)
