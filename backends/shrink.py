"""Some layers of a model, between its own embeddings and head, on the very same weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ..harness.interfaces import Unsupported
from .config import HybridConfig
from .model import HybridForCausalLM


def shrink(model: HybridForCausalLM, layers: Sequence[int]) -> HybridForCausalLM:
    """A model of the layers of these indices, in this order. It shares the weights of `model`, which is not changed."""
    with torch.device("meta"):
        shrunk = HybridForCausalLM(shrunk_config(model.config, layers))
    shrunk.model.embed_tokens, shrunk.model.norm = model.model.embed_tokens, model.model.norm
    shrunk.model.layers = nn.ModuleList(model.model.layers[index] for index in layers)
    shrunk.lm_head = model.lm_head
    return shrunk.eval()


def shrunk_config(config: HybridConfig, layers: Sequence[int]) -> HybridConfig:
    """That of the layers of these indices. Raises Unsupported where there are no such layers."""
    if not layers or min(layers) < 0 or max(layers) >= config.num_hidden_layers:
        raise Unsupported(f"layers {list(layers)} of a model of {config.num_hidden_layers} cannot be")
    fewer = copy.deepcopy(config)
    fewer.mixers = [config.mixers[index] for index in layers]
    fewer.layer_types = [config.layer_types[index] for index in layers]
    fewer.num_hidden_layers = len(layers)
    return fewer
