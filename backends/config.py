"""What a hybrid is made of, as a transformers config: a Llama-type decoder whose layer i has mixer `mixers[i]`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..harness.interfaces import Unsupported

MODEL_TYPE = "mambabench_hybrid"
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
    "dynamic": ("factor",),
}
"""The kinds that are served, and the numbers that each has beside `rope_theta`."""
REMOVED = "none"
"""The mixer of a layer that is only its MLP."""
LAYER_TYPES = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "mamba2": "linear_attention",
    REMOVED: "linear_attention",
}
"""transformers' own name of each mixer: version 5.17 refuses `mamba2` in `layer_types`, renames `mamba` and
`attention`, and has no name for none; what is not attention keeps nothing that grows."""

SLIDING = "sliding_attention"
CHOICES = {
    "mamba_activation": ("silu", "none"),
    "mamba_norm": ("gated", "none"),
    "mamba_dt_bias": ("once", "twice"),
    "mamba_sub_blocks": ("aligned", "released"),
}


def check_rope(rope: Any) -> None:
    """Raises Unsupported for `rope_parameters` that are not served or none, such as numbers that are texts."""
    if not isinstance(rope, Mapping):
        raise Unsupported(f"rope_parameters: {rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise Unsupported(f"rope_parameters: rope_type {kind!r} is not served; known are {', '.join(ROPE_TYPES)}")
    turned = rope.get("partial_rotary_factor") or 1.0
    if turned != 1:
        raise Unsupported(f"rope_parameters: partial_rotary_factor {turned} is not served, only whole heads (1.0)")
    for name in ("rope_theta", *ROPE_TYPES[kind]):
        value = rope.get(name, 1.0)
        derived = value is None and kind == "yarn" and name != "rope_theta"
        if not derived and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise Unsupported(f"rope_parameters: {name} is {value!r}; it must be a number above 0")


class Mamba2Shape(NamedTuple):
    """Sizes of a Mamba-2 layer; `x`, `b` and `c` have groups of heads that share them."""

    heads: int
    width: int
    """P, of a head."""
    states: int
    """N, of each of its numbers."""
    x: int
    b: int
    c: int
    normed: int
    """Numbers that the gated norm takes together."""

    @property
    def inner(self) -> int:
        """Of the gate, and of what the output projection gets."""
        return self.heads * self.width

    @property
    def parts(self) -> tuple[int, int, int]:
        """Channels of x, B and C in the convolution."""
        return self.x * self.width, self.b * self.states, self.c * self.states


class HybridConfig(PreTrainedConfig):
    """Llama's fields, and `mixers`: one of `attention`, `mamba`, `mamba2`, `none` per layer (all attention if not
    given).

    Without `num_key_value_heads` there are as many as heads, without `head_dim` heads share the hidden size.
    `attention_bias` is of the projections to queries, keys and values, `attention_out_bias` of the one behind them
    (None: as `attention_bias`); `qk_norm` is Qwen3's norm of each query and key head. Attention reads the last
    `sliding_window` tokens where `layer_types` says `sliding_attention`. Mamba layers have biases and norms too, where
    the attention that they stand for has them.
    What the released Mamba2InLlama layers have is the default of `mamba_*`: SiLU behind the convolution, a gated norm,
    a gate without bias, no rotation of B and C. Released Mamba-1 layers add the bias of dt twice and pair the
    sub-blocks of heads in an order of their own (`mamba_dt_bias`, `mamba_sub_blocks`).
    With `mamba_heads` Mamba-2 layers have sizes of their own, as those of mamba-ssm: so many heads of `mamba_head_dim`
    with `mamba_states` states, each with an x, `mamba_groups` of them with a B and a C, and the norm over a group.
    Layers have no MLP where `intermediate_size` is 0.
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
    attention_out_bias: bool | None = None
    qk_norm: bool = False
    sliding_window: int | None = None
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
    mamba_dt_bias: str = "once"
    mamba_sub_blocks: str = "aligned"
    mamba_heads: int = 0
    mamba_head_dim: int = 64
    mamba_states: int = 128
    mamba_groups: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.mixers = self.mixers or ["attention"] * self.num_hidden_layers
        self.num_hidden_layers = len(self.mixers)
        unknown = sorted(set(self.mixers) - set(LAYER_TYPES))
        if unknown:
            raise Unsupported(f"mixers: no mixer is called {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
        self.layer_types = self._layer_types(self.layer_types)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        super().__post_init__(**kwargs)
        check_rope(self.rope_parameters or {})
        if self.hidden_act != "silu":
            raise Unsupported(f"hidden_act: {self.hidden_act!r} is not served, only 'silu'")
        for name in ("d_conv", "chunk"):
            if getattr(self, name) < 1:
                raise Unsupported(f"{name}: must be at least 1, not {getattr(self, name)}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise Unsupported(f"{name}: {getattr(self, name)!r} is not served, only {' or '.join(known)}")
        if "mamba" in self.mixers and self.head_dim % self.d_state:
            raise Unsupported(f"head_dim: mamba layers have {self.d_state} states, which do not divide {self.head_dim}")
        if self.mamba_heads:
            self._check_own_sizes()
        if self.num_attention_heads % self.num_key_value_heads:
            raise Unsupported(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )

    @property
    def mamba2(self) -> Mamba2Shape:
        """Of Mamba-2 layers: in the place of attention if they have no sizes of their own."""
        heads, groups, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if not self.mamba_heads:
            return Mamba2Shape(heads, width, width, groups, groups, heads, width)
        heads, groups, width = self.mamba_heads, self.mamba_groups, self.mamba_head_dim
        return Mamba2Shape(heads, width, self.mamba_states, heads, groups, groups, heads * width // groups)

    @property
    def d_state(self) -> int:
        """States of each channel of a Mamba-1 layer, and the width of the sub-blocks that its heads are cut into."""
        return min(16, self.head_dim)

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers with attention."""
        return [index for index, name in enumerate(self.mixers) if name == "attention"]

    @property
    def windows(self) -> list[int]:
        """How many tokens, itself included, each layer's attention reads; 0 for all before, and where it has none."""
        return [(self.sliding_window or 0) if kind == SLIDING else 0 for kind in self.layer_types]

    @property
    def calls(self) -> list[str]:
        """Whose indices each layer reads in a call of the stepping engine: a mixer's, or `sliding`."""
        return ["sliding" if window else name for name, window in zip(self.mixers, self.windows, strict=True)]

    def _check_own_sizes(self) -> None:
        """Of Mamba-2 layers. Raises Unsupported for what goes only with sizes taken from attention."""
        for name in ("mamba_head_dim", "mamba_states", "mamba_groups"):
            if getattr(self, name) < 1:
                raise Unsupported(f"{name}: must be at least 1, not {getattr(self, name)}")
        if self.mamba_heads % self.mamba_groups:
            raise Unsupported(f"mamba_groups: {self.mamba_groups} does not divide mamba_heads = {self.mamba_heads}")
        for name in ("qk_norm", "mamba_rope", "mamba_gate_bias"):
            if getattr(self, name):
                raise Unsupported(
                    f"{name}: goes with the sizes of attention, not with mamba_heads = {self.mamba_heads}"
                )

    def _layer_types(self, given: list[str] | None) -> list[str]:
        """transformers' name of each layer's mixer; attention slides where `given` says so."""
        kinds = [LAYER_TYPES[name] for name in self.mixers]
        if not given:
            return kinds
        if len(given) != len(kinds):
            raise Unsupported(f"layer_types: {len(given)} entries for {len(kinds)} layers")
        if SLIDING in given and not self.sliding_window:
            raise Unsupported(f"layer_types: {SLIDING!r} without a sliding_window")
        return [
            SLIDING if old == SLIDING and kind == LAYER_TYPES["attention"] else kind
            for old, kind in zip(given, kinds, strict=True)
        ]
