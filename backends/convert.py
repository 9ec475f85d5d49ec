"""From a teacher, or another student, to a hybrid: chosen layers trade their attention for Mamba.

Every other weight is taken as it is. A layer's new parameters depend on the seed and its index alone, so that two
hybrids of one teacher begin alike in the layers that they share.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..harness.interfaces import Unsupported
from . import checkpoint, released
from .config import HybridConfig
from .mamba import EXACT
from .mixers import MAMBAS
from .plugin import Mamba2HybridConfig, MambaConfig


def check_parent(parent: Path) -> HybridConfig:
    """Reads a parent's config and holds its tensors against it."""
    if released.is_released(parent):
        raise Unsupported(
            f'{parent}: a released hybrid (it has {released.SETTINGS}) is taken whole, with use = "teacher"'
        )
    config = checkpoint.read_config(parent)
    checkpoint.check(parent, checkpoint.skeleton(config), config)
    return config


def adopt(parent: Path, out: Path) -> None:
    """Takes a teacher's folder, or a released hybrid's, as it is: the weights are hard links (or copies), the config is
    ours. Only released Mamba-1 layers are laid out anew."""
    is_released = released.is_released(parent)
    config = released.check(parent) if is_released else check_parent(parent)
    out.mkdir(parents=True, exist_ok=True)
    if is_released and "mamba" in config.mixers:
        released.write_fused(parent, config, out)
    else:
        link_weights(parent, out)
    checkpoint.save_config(config, out)
    checkpoint.copy_side_files(parent, out)


def link_weights(parent: Path, out: Path) -> None:
    """All shards, and their index."""
    for path in sorted(set(checkpoint.tensor_files(parent).values())):
        link(path, out / path.name)
    index = parent / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, out / index.name)


def link(source: Path, target: Path) -> None:
    """A hard link to the file itself (hub caches hold relative symbolic links), or a copy where there can be none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def convert(parent: Path, keep: Sequence[int], out: Path, seed: int, options: Mamba2HybridConfig | MambaConfig) -> None:
    """Writes the hybrid of `parent` in which only the layers in `keep` have attention."""
    old = check_parent(parent)
    had = set(old.attention_layers)
    for index in keep:
        if index not in had:
            raise Unsupported(
                f"{parent}: layer {index} cannot keep attention, it has none; layers with it: {sorted(had)}"
            )
    fields: dict[str, Any] = old.to_dict()
    form: dict[str, object] = {
        "d_conv": options.d_conv,
        "mamba_activation": options.activation,
        "mamba_gate_bias": options.gate == "open",
        "mamba_rope": options.rope == "kept",
    }
    mixer = "mamba"
    if isinstance(options, Mamba2HybridConfig):
        mixer, form["mamba_norm"], fields["chunk"] = "mamba2", options.norm, options.chunk
    else:
        form |= {"mamba_dt_bias": options.dt_bias, "mamba_sub_blocks": options.sub_block_order}
    for name, value in form.items():
        if len(had) < old.num_hidden_layers and value != getattr(old, name):
            raise Unsupported(
                f"{parent}: its mamba layers have {name} {getattr(old, name)}, so {name} = {value} cannot be added"
            )
    kept = set(keep)
    for index in had - kept:
        fields["mixers"][index] = mixer
    fields |= form
    fields.pop("model_type")
    config = HybridConfig(**fields)
    model = checkpoint.skeleton(config)
    source = {name: None for name in checkpoint.tensor_files(parent) if not checkpoint.IGNORED.search(name)}
    tensors = {name: tensor.clone() for name, tensor in checkpoint.read_tensors(parent, source)}
    for index in sorted(had - kept):
        tensors |= _trade(config, tensors, index, seed, options)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    checkpoint.fill(model, tensors)
    checkpoint.save(model, out)
    checkpoint.copy_side_files(parent, out)


def _trade(
    config: HybridConfig,
    tensors: dict[str, Tensor],
    index: int,
    seed: int,
    options: Mamba2HybridConfig | MambaConfig,
) -> dict[str, Tensor]:
    """Takes layer `index`'s attention out of `tensors` and returns the Mamba tensors that replace it. A scale of the
    queries goes on what sets theirs last: the weight of their norm if they have one, else their projection."""
    old, new = f"model.layers.{index}.self_attn", f"model.layers.{index}.mamba"
    had = {name.removeprefix(f"{old}."): tensors.pop(name) for name in list(tensors) if name.startswith(f"{old}.")}
    if options.q_scale == "attention":
        for name in ["q_norm.weight"] if config.qk_norm else had.keys() & {"q_proj.weight", "q_proj.bias"}:
            had[name] = had[name] / math.sqrt(config.head_dim)
    q, k, v, o = (had[f"{name}_proj.weight"] for name in "qkvo")
    mixer = MAMBAS[config.mixers[index]](config).to(torch.float32)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    mixer.initialise(generator)
    if options.init == "random":
        mixer.invent(generator)
    else:
        mixer.inherit(q, k, v, o)
        mixer.inherit_rest(had)
    if options.conv == "identity":
        mixer.pass_through()
    return {
        f"{new}.{name}": tensor if name in EXACT else tensor.to(q.dtype) for name, tensor in mixer.state_dict().items()
    }
