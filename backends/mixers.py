"""Which class each name in `HybridConfig.mixers` stands for, and the name of its parameters in a checkpoint."""

from __future__ import annotations

from .attention import Attention
from .mamba2 import Mamba2

MIXERS: dict[str, type[Attention] | type[Mamba2]] = {"attention": Attention, "mamba2": Mamba2}
PREFIXES = {"attention": "self_attn", "mamba2": "mamba"}
