"""The checkpoints of mamba-ssm (`state-spaces/mamba2-…`): config and names, in both directions.

Such a folder has a config.json of mamba-ssm's own, which no library of models reads, and its weights. What is served
are models of Mamba-2 layers alone, as the released ones are: a gated norm behind the scan, no MLP, no attention. Their
residual stream is in fp32 there, and in the model's precision here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..harness.interfaces import MambabenchError, Unsupported
from . import checkpoint, drawn
from .config import HybridConfig
from .weights import Weights, read_json, write

LAYER = "Mamba2"
UNBOUNDED = 1 << 20
"""Context of a model that has no positions."""
EPS = 1e-5
"""Of both norms."""
NAMES = (
    (re.compile(r"^backbone\.embedding\."), "model.embed_tokens."),
    (re.compile(r"^backbone\.layers\.(\d+)\.norm\."), r"model.layers.\1.input_layernorm."),
    (re.compile(r"^backbone\.layers\.(\d+)\.mixer\."), r"model.layers.\1.mamba."),
    (re.compile(r"^backbone\.norm_f\."), "model.norm."),
    (re.compile(r"^lm_head\."), "lm_head."),
)
"""Theirs, and what they are here."""
BACK = (
    (re.compile(r"^model\.embed_tokens\."), "backbone.embedding."),
    (re.compile(r"^model\.layers\.(\d+)\.input_layernorm\."), r"backbone.layers.\1.norm."),
    (re.compile(r"^model\.layers\.(\d+)\.mamba\."), r"backbone.layers.\1.mixer."),
    (re.compile(r"^model\.norm\."), "backbone.norm_f."),
    (re.compile(r"^lm_head\."), "lm_head."),
)
ALWAYS = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}
"""What the models that are served have."""
OF_LAYERS: dict[str, Any] = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
OF_LAYERS |= {"bias": False, "conv_bias": True, "activation": "swish"}
"""The same of `ssm_cfg`."""
SIZES = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1}
"""Sizes in `ssm_cfg`, and what they are if not given."""
DRAWN = ("chunk_size", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init")
"""What says nothing of a model that is there."""


def is_native(folder: Path) -> bool:
    """Whether a folder's config.json is one of mamba-ssm's."""
    path = folder / "config.json"
    return path.is_file() and {"d_model", "n_layer"} <= read_json(path).keys() and "model_type" not in read_json(path)


def read_raw(folder: Path) -> dict[str, Any]:
    """mamba-ssm's config.json with the vocabulary as large as the weights have it."""
    path = folder / "config.json"
    raw = read_json(path)
    try:
        pad = int(raw.get("pad_vocab_size_multiple", 8))
        return raw | {"vocab_size": -(-int(raw.get("vocab_size", 50277)) // pad) * pad}
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise MambabenchError(f"{path}: describes no model ({type(error).__name__}: {error})") from None


def read_config(folder: Path) -> HybridConfig:
    """The config of such a folder. Raises Unsupported, naming the key, for what is not served, and MambabenchError for
    what describes no model."""
    path, raw = folder / "config.json", read_raw(folder)
    if not isinstance(raw.get("ssm_cfg") or {}, dict):
        raise MambabenchError(f"{path}: ssm_cfg is {raw['ssm_cfg']!r}; it must be a table of the layers' options")
    ssm = dict(raw.get("ssm_cfg") or {})
    if ssm.pop("layer", "Mamba1") != LAYER:
        raise Unsupported(f"{path}: ssm_cfg.layer is not {LAYER}; other layers run with backend mamba-ssm alone")
    for given, wanted, prefix in ((raw, ALWAYS, ""), (ssm, OF_LAYERS, "ssm_cfg.")):
        for name, value in wanted.items():
            if given.get(name, value) not in (value, "silu" if value == "swish" else value):
                raise Unsupported(f"{path}: {prefix}{name} is {given[name]}; only {value} is served")
    for name in ssm:
        if name not in (*OF_LAYERS, *SIZES, *DRAWN):
            raise Unsupported(f"{path}: ssm_cfg.{name} is not served; known are {', '.join(SIZES)}")
    size = {name: _whole(path, f"ssm_cfg.{name}", ssm.get(name, default)) for name, default in SIZES.items()}
    hidden, layers = (_whole(path, name, raw[name]) for name in ("d_model", "n_layer"))
    inner = size["expand"] * hidden
    if inner % size["headdim"]:
        raise Unsupported(f"{path}: ssm_cfg.headdim is {size['headdim']}, which does not divide {inner} channels")
    heads = inner // size["headdim"]
    return HybridConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=0,
        num_attention_heads=heads,
        head_dim=size["headdim"],
        max_position_embeddings=UNBOUNDED,
        rms_norm_eps=EPS,
        mamba_norm_eps=EPS,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=bool(raw.get("tie_embeddings", True)),
        mixers=["mamba2"] * layers,
        d_conv=size["d_conv"],
        mamba_heads=heads,
        mamba_head_dim=size["headdim"],
        mamba_states=size["d_state"],
        mamba_groups=size["ngroups"],
    )


def _whole(path: Path, name: str, value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise MambabenchError(f"{path}: {name} is {value!r}; it must be a whole number of at least 1")
    return value


def raw_of(config: HybridConfig, where: Path) -> dict[str, Any]:
    """mamba-ssm's config of a model of ours. Raises Unsupported where the format cannot say what it is."""
    shape = config.mamba2
    expand = shape.inner // config.hidden_size
    whole = set(config.mixers) == {"mamba2"} and config.mamba_heads and not config.intermediate_size
    if not whole or expand * config.hidden_size != shape.inner or config.mamba_norm != "gated":
        raise Unsupported(
            f"{where}: is no model of mamba-ssm, which has Mamba-2 layers of its own sizes and nothing else"
        )
    ssm = {"layer": LAYER, "d_state": shape.states, "headdim": shape.width, "ngroups": config.mamba_groups}
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm | {"d_conv": config.d_conv, "expand": expand},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """`checkpoint.tensor_shapes` under our names."""
    if drawn.is_drawn(folder):
        return checkpoint.drawn_shapes(read_config(folder))
    return {renamed(name): shape for name, shape in checkpoint.tensor_shapes(folder).items()}


def adopt(folder: Path, out: Path) -> None:
    """Writes such a folder as an artifact of ours, each number as it is."""
    config = read_config(folder)
    if drawn.is_drawn(folder):
        drawn.take_along(folder, out)
    else:
        theirs = {renamed(name, BACK): t for name, t in checkpoint.skeleton(config).state_dict().items()}
        checkpoint.check_shapes(folder, {name: tuple(t.shape) for name, t in theirs.items()}, config)
        write(out, _tensors(Weights(folder), config.tie_word_embeddings, NAMES))
    checkpoint.save_config(config, out)
    checkpoint.copy_side_files(folder, out)


def export(artifact: Path, out: Path) -> None:
    """Writes an artifact of ours as such a folder, in safetensors."""
    config = checkpoint.read_config(artifact)
    raw = raw_of(config, artifact)
    if drawn.is_drawn(artifact):
        drawn.take_along(artifact, out)
    else:
        write(out, _tensors(Weights(artifact), config.tie_word_embeddings, BACK))
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    checkpoint.copy_side_files(artifact, out)


def renamed(name: str, names: tuple[tuple[re.Pattern[str], str], ...] = NAMES) -> str:
    """A tensor's name on the other side; one that is not known stays as it is."""
    for pattern, new in names:
        if pattern.search(name):
            return pattern.sub(new, name)
    return name


def _tensors(
    weights: Mapping[str, Tensor], tied: bool, names: tuple[tuple[re.Pattern[str], str], ...]
) -> Iterator[tuple[str, Tensor]]:
    """Under their other names; a tied head is left out."""
    for name in weights:
        if not (tied and name == "lm_head.weight"):
            yield renamed(name, names), weights[name]
