"""Which class each name in `HybridConfig.mixers` stands for, and the name of its parameters in a checkpoint."""

from __future__ import annotations

from .attention import Attention
from .mamba1 import Mamba1
from .mamba2 import Mamba2

MAMBAS: dict[str, type[Mamba1] | type[Mamba2]] = {"mamba": Mamba1, "mamba2": Mamba2}
MIXERS: dict[str, type[Attention] | type[Mamba1] | type[Mamba2]] = {"attention": Attention, **MAMBAS}
PREFIXES = {"attention": "self_attn", "mamba": "mamba", "mamba2": "mamba"}
