"""A model of mamba-ssm with random weights, in its own format: for measuring its speed beside others.

The weights are drawn as mamba-ssm draws them where that matters for a state (decays, step sizes), else normal; on the
device, in the dtype in which they are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..harness.interfaces import Job, MambabenchError
from .random_configs import RandomMambaConfig
from .random_teacher import byte_tokenizer, write_drawn

TIED = {"tie_embeddings": True, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
DT = (1e-3, 1e-1)
"""Step sizes are log-uniform in this range."""


class RandomMamba:
    """The distiller `random-mamba`."""

    def __init__(self, config: RandomMambaConfig) -> None:
        self.config = config

    def train(self, job: Job) -> None:
        if job.backend is None:
            raise MambabenchError("random-mamba: the model's backend is missing")
        settings, tokenizer = _settings(self.config), byte_tokenizer()
        folder = job.scratch / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)
        if self.config.weights == "drawn":
            write_drawn(folder, job.seed, self.config.init)
        else:
            torch.manual_seed(job.seed)
            kind = getattr(torch, self.config.dtype)
            with torch.device(job.device):
                drawn = {name: tensor.to(kind) for name, tensor in _tensors(self.config, settings["vocab_size"])}
            save_file({name: tensor.cpu().contiguous() for name, tensor in drawn.items()}, folder / "model.safetensors")
        job.backend.convert(parent=folder, keep=[], out=job.out, seed=job.seed)
        job.emit("fact", name="parameters", value=job.backend.describe(job.out)["parameters"])


def _settings(config: RandomMambaConfig) -> dict[str, Any]:
    """mamba-ssm's config.json."""
    ssm: dict[str, Any] = {"d_state": _states(config)}
    if config.layer == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": config.head_dim}
    size = -(-config.vocabulary // 16) * 16
    sizes = {"d_model": config.hidden, "n_layer": config.layers, "vocab_size": size, "pad_vocab_size_multiple": 16}
    return {**sizes, "d_intermediate": 0, "ssm_cfg": ssm, "attn_layer_idx": [], "attn_cfg": {}, **TIED}


def _tensors(config: RandomMambaConfig, vocabulary: int) -> Iterator[tuple[str, Tensor]]:
    yield "backbone.embedding.weight", _normal(config, vocabulary, config.hidden)
    for layer in range(config.layers):
        prefix = f"backbone.layers.{layer}"
        yield f"{prefix}.norm.weight", torch.ones(config.hidden)
        for name, tensor in (_mamba2 if config.layer == "mamba2" else _mamba1)(config):
            yield f"{prefix}.mixer.{name}", tensor
    yield "backbone.norm_f.weight", torch.ones(config.hidden)


def _mamba2(config: RandomMambaConfig) -> Iterator[tuple[str, Tensor]]:
    """Mamba-2: one decay and step size per head, one B and C for all."""
    inner, shared = 2 * config.hidden, 2 * _states(config)
    heads = inner // config.head_dim
    yield "in_proj.weight", _normal(config, 2 * inner + shared + heads, config.hidden)
    yield from _convolution(inner + shared)
    yield "dt_bias", _step_bias(heads)
    yield "A_log", torch.empty(heads).uniform_(1, 16).log()
    yield "D", torch.ones(heads)
    yield "norm.weight", torch.ones(inner)
    yield "out_proj.weight", _normal(config, config.hidden, inner)


def _mamba1(config: RandomMambaConfig) -> Iterator[tuple[str, Tensor]]:
    """Mamba-1: a step size per channel, of low rank; A is -1 … -N in each."""
    inner, rank = 2 * config.hidden, -(-config.hidden // 16)
    yield "in_proj.weight", _normal(config, 2 * inner, config.hidden)
    yield from _convolution(inner)
    yield "x_proj.weight", _normal(config, rank + 2 * _states(config), inner)
    yield "dt_proj.weight", torch.empty(inner, rank).uniform_(-(rank**-0.5), rank**-0.5)
    yield "dt_proj.bias", _step_bias(inner)
    yield "A_log", torch.arange(1, _states(config) + 1).log().repeat(inner, 1)
    yield "D", torch.ones(inner)
    yield "out_proj.weight", _normal(config, config.hidden, inner)


def _states(config: RandomMambaConfig) -> int:
    return config.states or (128 if config.layer == "mamba2" else 16)


def _convolution(channels: int, taps: int = 4) -> Iterator[tuple[str, Tensor]]:
    bound = taps**-0.5
    yield "conv1d.weight", torch.empty(channels, 1, taps).uniform_(-bound, bound)
    yield "conv1d.bias", torch.empty(channels).uniform_(-bound, bound)


def _normal(config: RandomMambaConfig, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=getattr(torch, config.dtype)).normal_(std=config.init)


def _step_bias(count: int) -> Tensor:
    """softplus^-1 of the step sizes."""
    dt = torch.empty(count).uniform_(math.log(DT[0]), math.log(DT[1])).exp()
    return dt + torch.log(-torch.expm1(-dt))
