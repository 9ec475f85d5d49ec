"""The Transformers that this model takes as they are, and what each of them is in the fields of `HybridConfig`.

Their own config classes are asked, so that a key that a config.json leaves out has the value that the family gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from .config import SLIDING, HybridConfig, check_rope

Fields = dict[str, Any]
FOREIGN = (
    "architectures",
    "attention_dropout",
    "auto_map",
    "max_window_layers",
    "mixers",
    "model_type",
    "pretraining_tp",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
)
"""What their configs say and ours does not."""


def _llama(fields: Fields) -> Fields:
    return {"layer_types": [], "sliding_window": None}


def _mistral(fields: Fields) -> Fields:
    """Every layer slides, if any does."""
    window = fields.get("sliding_window")
    layers = [SLIDING] * fields["num_hidden_layers"] if window else []
    return {"attention_bias": False, "mlp_bias": False, "layer_types": layers, "sliding_window": window}


def _qwen2(fields: Fields) -> Fields:
    """Biases on queries, keys and values, none behind them."""
    return {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}


def _qwen3(fields: Fields) -> Fields:
    return {"qk_norm": True, "mlp_bias": False}


FAMILIES: Mapping[str, Callable[[Fields], Fields]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
"""Teachers' `model_type`s, and what is to be known of each beside the fields that it shares with Llama."""


def to_family(config: HybridConfig) -> Fields:
    """The config.json of the Transformer that an all-attention model is, as its family has it. The inverse of
    `from_family`, up to the family's name where several say the same."""
    family = "qwen3" if config.qk_norm else "mistral" if SLIDING in config.layer_types else "llama"
    if config.attention_bias and not config.attention_out_bias:
        family = "qwen2"
    theirs = CONFIG_MAPPING[family]().to_dict()
    shared = {key: value for key, value in config.to_dict().items() if key in theirs and key not in FOREIGN}
    if family in ("llama", "mistral"):
        shared.pop("layer_types", None)
    return {**shared, "model_type": family}


def from_family(fields: Mapping[str, Any], family: str) -> HybridConfig:
    """The all-attention config of a teacher. `fields`: its config.json, or its config as a dict."""
    # Their own checks of it name no key, or only warn.
    check_rope(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theirs = CONFIG_MAPPING[family](**{key: value for key, value in fields.items() if key != "model_type"}).to_dict()
    shared = {key: value for key, value in theirs.items() if key not in FOREIGN}
    for key in ("head_dim", "num_key_value_heads"):
        shared[key] = shared.get(key) or 0
    return HybridConfig(**(shared | FAMILIES[family](theirs)))
