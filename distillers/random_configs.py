"""Options of models and texts that have a shape and no sense: for speed, memory and arithmetic these are all that
counts, and nothing has to be fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..harness.interfaces import FileRef

SHAPE = ("layers", "hidden", "heads", "intermediate", "vocabulary")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTeacherConfig:
    config: FileRef = ""
    """A config.json of transformers, whose sizes hold where the options below are left at 0."""
    layers: int = 0
    hidden: int = 0
    """Width of the residual stream."""
    heads: int = 0
    kv_heads: int = 0
    """0 without `config`: as many as heads."""
    head_dim: int = 0
    """0 without `config`: hidden / heads."""
    intermediate: int = 0
    """Width of the MLP."""
    vocabulary: int = 0
    """At least 258: the tokenizer knows each byte, and the beginning and the end of a text."""
    context: int = 0
    """Longest text, in tokens. 0 without `config`: 131,072."""
    rope_theta: float = 0.0
    """Base of the rotary frequencies. 0 without `config`: 500,000."""
    tied: bool | None = None
    """Whether the head is the embedding; without `config` and this it is not."""
    init: float = 0.02
    """Standard deviation of the weights."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights on disk."""
    weights: Literal["stored", "drawn"] = "stored"
    """`drawn`: none lie on disk, and whoever loads the model draws them anew, the same on the same device."""

    def __post_init__(self) -> None:
        for name in (*SHAPE, "kv_heads", "head_dim", "context", "rope_theta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be below 0")
        if missing := [name for name in SHAPE if not self.config and not getattr(self, name)]:
            raise ValueError(f"{missing[0]} is not given; a shape needs {', '.join(SHAPE)}, or a `config`")
        if self.heads and self.hidden % self.heads and not self.head_dim:
            raise ValueError(f"hidden is {self.hidden}, which {self.heads} heads do not divide; say head_dim")
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}, which {self.kv_heads} kv_heads do not divide")
        if self.init <= 0:
            raise ValueError(f"init is {self.init}; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTokensConfig:
    documents: int
    length: int
    """Tokens of a document, with the leading token that its tokenizer has."""
    vocabulary: int = 0
    """Tokens are drawn below this number; 0: the teacher's vocabulary."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("length", 2), ("vocabulary", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomMambaConfig:
    layer: Literal["mamba2", "mamba1"] = "mamba2"
    layers: int
    hidden: int
    """Width of the residual stream; the layers are twice as wide inside."""
    vocabulary: int = 50_277
    """Rounded up to a multiple of 16. At least 258, which its tokenizer knows."""
    states: int = 0
    """Of each number of a head, or of each channel. 0: 128 for Mamba-2, 16 for Mamba-1."""
    head_dim: int = 64
    """Of Mamba-2 layers."""
    init: float = 0.02
    """Standard deviation of the weights."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights on disk."""
    weights: Literal["stored", "drawn"] = "stored"
    """`drawn`: none lie on disk, and whoever loads the model draws them anew, the same on the same device."""

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("hidden", 1), ("vocabulary", 258), ("states", 0), ("head_dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.weights == "drawn" and self.layer != "mamba2":
            raise ValueError(f'weights = "drawn" goes with mamba2 layers, not with {self.layer}')
        if 2 * self.hidden % self.head_dim:
            raise ValueError(f"head_dim is {self.head_dim}, which does not divide 2 x hidden = {2 * self.hidden}")
        if self.init <= 0:
            raise ValueError(f"init is {self.init}; it must be above 0")
