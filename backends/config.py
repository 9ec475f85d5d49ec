"""What a hybrid is made of, as a transformers config: a Llama-type decoder whose layer i has mixer `mixers[i]`."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from ..harness.interfaces import Unsupported

MODEL_TYPE = "mambabench_hybrid"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = {"attention": "full_attention", "mamba2": "linear_attention"}
"""transformers' own name of each mixer: version 5.17 refuses `mamba2` in `layer_types` and renames `attention`."""

CHOICES = {"mamba_activation": ("silu", "none"), "mamba_norm": ("gated", "none")}


class HybridConfig(PreTrainedConfig):
    """Llama's fields, and `mixers`: one of `attention`, `mamba2` per layer (all attention if not given).

    Without `num_key_value_heads` there are as many as heads, without `head_dim` heads share the hidden size.
    What the released Mamba2InLlama layers have is the default of `mamba_*`: SiLU behind the convolution, a gated norm,
    a gate without bias, no rotation of B and C.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    mixers: list[str] = field(default_factory=list)
    layer_types: list[str] = field(default_factory=list)
    d_conv: int = 4
    chunk: int = 64
    mamba_norm_eps: float = 1e-5
    mamba_activation: str = "silu"
    mamba_norm: str = "gated"
    mamba_gate_bias: bool = False
    mamba_rope: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.mixers = self.mixers or ["attention"] * self.num_hidden_layers
        self.num_hidden_layers = len(self.mixers)
        unknown = sorted(set(self.mixers) - set(LAYER_TYPES))
        if unknown:
            raise Unsupported(f"mixers: no mixer is called {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
        self.layer_types = [LAYER_TYPES[name] for name in self.mixers]
        super().__post_init__(**kwargs)
        rope = (self.rope_parameters or {}).get("rope_type", "default")
        if rope not in ROPE_TYPES:
            raise Unsupported(f"rope_parameters: rope_type {rope!r} is not served; known are {', '.join(ROPE_TYPES)}")
        if self.hidden_act != "silu":
            raise Unsupported(f"hidden_act: {self.hidden_act!r} is not served, only 'silu'")
        for name in ("d_conv", "chunk"):
            if getattr(self, name) < 1:
                raise Unsupported(f"{name}: must be at least 1, not {getattr(self, name)}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise Unsupported(f"{name}: {getattr(self, name)!r} is not served, only {' or '.join(known)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise Unsupported(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers with attention."""
        return [index for index, name in enumerate(self.mixers) if name == "attention"]
