"""From a teacher, or another student, to a hybrid: chosen layers trade their attention for Mamba.

Every other weight is taken as it is. A layer's new parameters depend on the seed and its index alone, so that two
hybrids of one teacher begin alike in the layers that they share.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..harness.interfaces import Unsupported
from . import checkpoint, drawn, native, released
from .config import REMOVED, HybridConfig
from .mamba import EXACT
from .mixers import MAMBAS
from .plugin import Mamba2HybridConfig, MambaConfig, RemovedConfig
from .weights import SINGLE, Weights, index_of, shards, write


def check_parent(parent: Path) -> HybridConfig:
    """Reads a parent's config and holds its tensors against it."""
    if released.is_released(parent):
        raise Unsupported(
            f'{parent}: a released hybrid (it has {released.SETTINGS}) is taken whole, with use = "teacher"'
        )
    if native.is_native(parent):
        raise Unsupported(f'{parent}: a model of mamba-ssm has no attention to trade; it is taken with use = "teacher"')
    config = checkpoint.read_config(parent)
    checkpoint.check(parent, checkpoint.skeleton(config), config)
    return config


def adopt(parent: Path, out: Path) -> None:
    """Takes a teacher's folder, or a released hybrid's, as it is: the weights are hard links (or copies), the config is
    ours. Released Mamba-1 layers are laid out anew, PyTorch's own files become safetensors, and the tensors of
    mamba-ssm get our names."""
    if native.is_native(parent):
        native.adopt(parent, out)
        return
    is_released = released.is_released(parent)
    config = released.check(parent) if is_released else check_parent(parent)
    out.mkdir(parents=True, exist_ok=True)
    if drawn.is_drawn(parent):
        drawn.take_along(parent, out)
    elif is_released and "mamba" in config.mixers:
        released.write_fused(parent, config, out)
    elif all(path.suffix == ".safetensors" for path in shards(parent)):
        link_weights(parent, out)
    else:
        write(out, kept(config, Weights(parent)))
    checkpoint.save_config(config, out)
    checkpoint.copy_side_files(parent, out)


def link_weights(parent: Path, out: Path) -> None:
    """All shards, and their index."""
    for path in shards(parent):
        link(path, out / path.name)
    if (index := index_of(parent / SINGLE)).is_file():
        shutil.copyfile(index, out / index.name)


def link(source: Path, target: Path) -> None:
    """A hard link to the file itself (hub caches hold relative symbolic links), or a copy where there can be none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def convert(
    parent: Path, keep: Sequence[int], out: Path, seed: int, options: Mamba2HybridConfig | MambaConfig | RemovedConfig
) -> None:
    """Writes the hybrid of `parent` in which only the layers in `keep` have attention."""
    old = check_parent(parent)
    for index in keep:
        if index not in old.attention_layers:
            raise Unsupported(
                f"{parent}: layer {index} cannot keep attention, it has none; layers with it: {old.attention_layers}"
            )
    traded = sorted(set(old.attention_layers) - set(keep))
    config = _traded(old, traded, options, parent)
    if drawn.is_drawn(parent):
        drawn.take_along(parent, out)
    else:
        write(out, _tensors(config, Weights(parent), traded, seed, options))
    checkpoint.save_config(config, out)
    checkpoint.copy_side_files(parent, out)


def _traded(
    old: HybridConfig, layers: Sequence[int], options: Mamba2HybridConfig | MambaConfig | RemovedConfig, parent: Path
) -> HybridConfig:
    """The config of the hybrid in which `layers` have what the options say."""
    fields: dict[str, Any] = old.to_dict()
    form: dict[str, object] = {}
    mixer = REMOVED
    if not isinstance(options, RemovedConfig):
        mixer = "mamba"
        form = {
            "d_conv": options.d_conv,
            "mamba_activation": options.activation,
            "mamba_gate_bias": options.gate == "open",
            "mamba_rope": options.rope == "kept",
        }
    if isinstance(options, Mamba2HybridConfig):
        mixer, form["mamba_norm"], fields["chunk"] = "mamba2", options.norm, options.chunk
    elif isinstance(options, MambaConfig):
        form |= {"mamba_dt_bias": options.dt_bias, "mamba_sub_blocks": options.sub_block_order}
    for name, value in form.items():
        if not MAMBAS.keys().isdisjoint(old.mixers) and value != getattr(old, name):
            raise Unsupported(
                f"{parent}: its mamba layers have {name} {getattr(old, name)}, so {name} = {value} cannot be added"
            )
    for index in layers:
        fields["mixers"][index] = mixer
    fields |= form
    fields.pop("model_type")
    return HybridConfig(**fields)


def _tensors(
    config: HybridConfig,
    weights: Weights,
    traded: Sequence[int],
    seed: int,
    options: Mamba2HybridConfig | MambaConfig | RemovedConfig,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the hybrid: those of the parent, but for what layers lose, and then those that are new."""
    lost = tuple(f"model.layers.{index}.self_attn." for index in traded)
    if isinstance(options, RemovedConfig):
        lost += tuple(f"model.layers.{index}.input_layernorm." for index in traded)
    yield from kept(config, weights, lost)
    if not isinstance(options, RemovedConfig):
        for index in traded:
            yield from _trade(config, weights, index, seed, options).items()


def kept(config: HybridConfig, weights: Weights, lost: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose names do not begin as one of `lost`; a tied head is left out."""
    if config.tie_word_embeddings:
        lost += ("lm_head.",)
    for name in weights:
        if not name.startswith(lost) and not checkpoint.IGNORED.search(name):
            yield name, weights[name]


def _trade(
    config: HybridConfig,
    weights: Weights,
    index: int,
    seed: int,
    options: Mamba2HybridConfig | MambaConfig,
) -> dict[str, Tensor]:
    """The Mamba tensors that replace layer `index`'s attention. A scale of the queries goes on what sets theirs last:
    the weight of their norm if they have one, else their projection."""
    old, new = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mamba."
    had = {name.removeprefix(old): weights[name] for name in weights if name.startswith(old)}
    if options.q_scale == "attention":
        for name in ["q_norm.weight"] if config.qk_norm else had.keys() & {"q_proj.weight", "q_proj.bias"}:
            had[name] = had[name] / math.sqrt(config.head_dim)
    q, k, v, o = (had[f"{name}_proj.weight"] for name in "qkvo")
    with torch.device("meta"):
        mixer = MAMBAS[config.mixers[index]](config).to(torch.float32)
    mixer.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    mixer.initialise(generator)
    if options.init == "random":
        mixer.invent(generator)
    else:
        mixer.inherit(q, k, v, o)
        mixer.inherit_rest(had)
    if options.conv == "identity":
        mixer.pass_through()
    if options.skip == "none":
        mixer.drop_skip()
    return {new + name: tensor if name in EXACT else tensor.to(q.dtype) for name, tensor in mixer.state_dict().items()}
