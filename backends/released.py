"""The checkpoints of MambaInLlama (Mamba-1) and Mamba2InLlama: config, names and layouts, in both directions.

Such a folder has the teacher's config.json, a mamba_config.json, and under `model.layers.N.mamba` either the tensors of
a Mamba-2 layer, named and laid out as ours, or those of a Mamba-1 layer, whose input projections are separate tensors
and whose bias of dt belongs to `dt_proj`. The released Mamba-1 code adds that bias twice and pairs sub-blocks of heads
in an order of its own; models that were trained so are run so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from ..harness.interfaces import MambabenchError, Unsupported
from . import checkpoint
from .config import REMOVED, SLIDING, HybridConfig
from .weights import Weights, read_json, write

SETTINGS = "mamba_config.json"
PARTS = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
"""A Mamba-1 layer's input projections in the order in which their rows stand in ours."""
TAKEN = {
    "mamba": ("d_state", "d_conv", "expand", "repeat_kv_before_conv"),
    "mamba2": ("d_state", "d_conv", "expand", "ngroups", "chunk_size", "repeat_kv_before_conv"),
}
"""Keys of `ssm_cfg` that are known, by mixer."""
PLAIN = {"mamba_activation": "silu", "mamba_norm": "gated", "mamba_gate_bias": False, "mamba_rope": False}
PLAIN |= {"attention_bias": False, "attention_out_bias": False, "qk_norm": False, "mlp_bias": False}
"""What a released layer always is."""


def is_released(folder: Path) -> bool:
    """Whether a folder has the file that marks such a checkpoint."""
    return (folder / SETTINGS).is_file()


def read_config(folder: Path) -> HybridConfig:
    """The config of a released checkpoint. Raises MambabenchError or Unsupported, naming the file and the key."""
    path, teacher = folder / SETTINGS, checkpoint.read_config(folder)
    raw = read_json(path)
    ssm, kept = raw.get("ssm_cfg", {}), raw.get("attn_layers", [])
    if not isinstance(ssm, dict):
        raise MambabenchError(f"{path}: ssm_cfg is {ssm!r}; it must be an object")
    mixer = _mixer(ssm, Weights(folder))
    heads, width = teacher.num_attention_heads, teacher.head_dim
    size = min(16, width) if mixer == "mamba" else width
    wanted = {
        "d_model": teacher.hidden_size,
        "d_inner": heads * width,
        "d_xb": teacher.num_key_value_heads * width,
        "n_layer": teacher.num_hidden_layers,
        "intermediate_size": teacher.intermediate_size,
        "vocab_size": teacher.vocab_size,
        "rms_norm_eps": teacher.rms_norm_eps,
        "hidden_act": teacher.hidden_act,
    }
    of_ssm = {"expand": 1, "d_state": size, "ngroups": heads, "repeat_kv_before_conv": mixer == "mamba"}
    for given, expected, prefix in ((raw, wanted, ""), (ssm, of_ssm, "ssm_cfg.")):
        for name, value in expected.items():
            if given.get(name) not in (None, value):
                raise Unsupported(
                    f"{path}: {prefix}{name} is {given[name]!r}; a layer in the place of this attention has {value}"
                )
    # The released code, too, loads no file with another key of its own.
    for given, known, prefix in ((raw, (*wanted, "ssm_cfg", "attn_layers"), ""), (ssm, TAKEN[mixer], "ssm_cfg.")):
        for name in given:
            if name not in known:
                raise Unsupported(f"{path}: {prefix}{name} is not served; known are {', '.join(known)}")
    last = teacher.num_hidden_layers - 1
    if not isinstance(kept, list) or not all(type(index) is int and 0 <= index <= last for index in kept):
        raise MambabenchError(f"{path}: attn_layers is {kept}; it must be a list out of the layers 0 to {last}")
    taps = ssm.get("d_conv", 4)
    if type(taps) is not int or taps < 1:
        raise MambabenchError(f"{path}: ssm_cfg.d_conv is {taps!r}; it must be a whole number above 0")
    fields = teacher.to_dict()
    fields["mixers"] = ["attention" if index in kept else mixer for index in range(teacher.num_hidden_layers)]
    fields["d_conv"] = taps
    if mixer == "mamba":
        fields |= {"mamba_dt_bias": "twice", "mamba_sub_blocks": "released"}
    fields.pop("model_type")
    try:
        return HybridConfig(**fields)
    except Unsupported as error:
        raise Unsupported(f"{path}: {error}") from None


def check(folder: Path) -> HybridConfig:
    """Reads the config and holds the tensors against it; the first difference is one error."""
    config = read_config(folder)
    ours = checkpoint.skeleton(config).state_dict()
    shapes = {name: tuple(t.shape) for whole in ours for name, t in unfused(whole, ours[whole], config).items()}
    checkpoint.check_shapes(folder, shapes, config)
    return config


def write_fused(folder: Path, config: HybridConfig, out: Path) -> None:
    """Writes the tensors of a folder that `check` has passed in our layout, each number as it is."""
    weights = Weights(folder)
    write(out, fused({name: weights[name] for name in checkpoint.tensor_shapes(folder)}, config).items())


def export(artifact: Path, out: Path, teacher: str = "") -> None:
    """Writes an artifact of ours as a released checkpoint. `teacher`: the name or folder of the Transformer that the
    released code loads first. Raises Unsupported where the format has no place for what the model is."""
    config = checkpoint.read_config(artifact)
    settings = _settings(config, artifact)
    checkpoint.check(artifact, checkpoint.skeleton(config), config)
    weights = Weights(artifact)
    named = ((name, weights[name]) for name in checkpoint.tensor_shapes(artifact))
    write(out, (part for name, tensor in named for part in unfused(name, tensor, config).items()))
    family = "mistral" if SLIDING in (config.layer_types or ()) else "llama"
    theirs = CONFIG_MAPPING[family]().to_dict()
    shared: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key in theirs}
    rope = dict(shared.pop("rope_parameters") or {})
    shared["rope_theta"] = rope.pop("rope_theta", 10000.0)
    shared["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    for key in ("layer_types", "transformers_version"):
        shared.pop(key, None)
    shared |= {"model_type": family, "architectures": [f"{family.title()}ForCausalLM"], "_name_or_path": teacher}
    for name, content in (("config.json", shared), (SETTINGS, settings)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    checkpoint.copy_side_files(artifact, out)


def unfused(name: str, tensor: Tensor, config: HybridConfig) -> dict[str, Tensor]:
    """One tensor of ours as the tensors that a released checkpoint has for it; only Mamba-1 layers differ."""
    prefix, mixer, last = name.partition(".mamba.")
    if not mixer or "mamba" not in config.mixers:
        return {name: tensor}
    if last == "in_proj.weight":
        inner, shared = _sizes(config)
        rank = tensor.shape[0] - 2 * (inner + shared)
        parts = tensor.split((inner, shared, shared, inner, rank))
        return {f"{prefix}.mamba.{part}.weight": rows.clone() for part, rows in zip(PARTS, parts, strict=True)}
    if last == "dt_bias":
        return {f"{prefix}.mamba.dt_proj.bias": tensor if config.mamba_dt_bias == "twice" else tensor / 2}
    return {name: tensor}


def fused(tensors: Mapping[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """The tensors of a released checkpoint under our names and in our layout."""
    if "mamba" not in config.mixers:
        return dict(tensors)
    ours = dict(tensors)
    for index in (index for index, mixer in enumerate(config.mixers) if mixer == "mamba"):
        prefix = f"model.layers.{index}.mamba"
        ours[f"{prefix}.in_proj.weight"] = torch.cat([ours.pop(f"{prefix}.{part}.weight") for part in PARTS])
        ours[f"{prefix}.dt_bias"] = ours.pop(f"{prefix}.dt_proj.bias")
    return ours


def _sizes(config: HybridConfig) -> tuple[int, int]:
    """Channels of z and C, and of x and B."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _mixer(ssm: Mapping[str, Any], names: Iterable[str]) -> str:
    """By the tensors; by the config where there are none of either kind."""
    for name in names:
        if name.endswith(".mamba.in_proj_x.weight"):
            return "mamba"
        if name.endswith(".mamba.in_proj.weight"):
            return "mamba2"
    return "mamba2" if "ngroups" in ssm else "mamba"


def _settings(config: HybridConfig, artifact: Path) -> dict[str, Any]:
    """The mamba_config.json of a model; Unsupported if the format cannot say what it is."""
    kinds = {mixer for mixer in config.mixers if mixer != "attention"}
    if REMOVED in kinds:
        raise Unsupported(f"{artifact}: has layers without a mixer; the format has a Mamba mixer in their place")
    if len(kinds) != 1:
        raise Unsupported(
            f"{artifact}: has {' and '.join(sorted(kinds)) or 'no Mamba'} layers; the format has one kind"
        )
    (mixer,) = kinds
    for name, value in PLAIN.items():
        if getattr(config, name) != value and not (mixer == "mamba" and name == "mamba_norm"):
            raise Unsupported(f"{artifact}: {name} is {getattr(config, name)}; released layers have {value}")
    inner, shared = _sizes(config)
    ssm: dict[str, Any] = {"expand": 1, "d_conv": config.d_conv}
    if mixer == "mamba2":
        ssm |= {"ngroups": config.num_attention_heads, "d_state": config.head_dim}
    else:
        ssm["d_state"] = config.d_state
        if config.mamba_sub_blocks != "released" and inner != shared:
            raise Unsupported(
                f"{artifact}: sub_block_order is {config.mamba_sub_blocks}; "
                "released layers have another where heads share keys"
            )
    settings = {
        "d_model": config.hidden_size,
        "ssm_cfg": ssm,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "d_inner": inner,
        "d_xb": shared,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "n_layer": config.num_hidden_layers,
        "attn_layers": config.attention_layers,
    }
    if mixer == "mamba":
        del settings["d_inner"]
    return settings
