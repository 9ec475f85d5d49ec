"""Reading and writing models as folders: every tensor accounted for, errors that name the file and the tensor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import GenerationConfig

from ..harness.interfaces import MambabenchError, Unsupported
from . import drawn
from .config import MODEL_TYPE, HybridConfig
from .families import FAMILIES, from_family
from .mamba import EXACT
from .model import HybridForCausalLM
from .weights import Weights, read_json, write

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that old Llama checkpoints carry and nobody reads."""


def read_config(folder: Path) -> HybridConfig:
    """The config of a checkpoint of ours, or of a teacher's folder as an all-attention model."""
    path = folder / "config.json"
    if not path.is_file():
        raise MambabenchError(f"{folder}: no config.json; a model is a transformers folder")
    raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or (family != MODEL_TYPE and family not in FAMILIES):
        raise Unsupported(f"{path}: model_type {family!r} is not served; known are {', '.join(FAMILIES)}")
    if raw.pop("quantization_config", None):
        raise Unsupported(f"{path}: quantization_config: quantised weights are not served, only floating-point ones")
    raw.pop("model_type")
    try:
        return HybridConfig(**raw) if family == MODEL_TYPE else from_family(raw, family)
    except Unsupported as error:
        raise Unsupported(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise MambabenchError(f"{path}: describes no model ({type(error).__name__}: {reason})") from None


def tensor_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors dtype name of every tensor that anybody reads, without loading any."""
    if drawn.is_drawn(folder):
        return drawn_shapes(read_config(folder))
    weights = Weights(folder)
    return {name: weights.shape(name) for name in weights if not IGNORED.search(name)}


def drawn_shapes(config: HybridConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """The same of a model whose weights are drawn where it is loaded."""
    state = skeleton(config).state_dict()
    return {
        name: (tuple(tensor.shape), "F32" if name.rpartition(".")[2] in EXACT else "BF16")
        for name, tensor in state.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


def skeleton(config: HybridConfig) -> HybridForCausalLM:
    """The model without storage."""
    with torch.device("meta"):
        return HybridForCausalLM(config)


def check(folder: Path, model: nn.Module, config: HybridConfig) -> None:
    """Compares the headers in `folder` with what `model` expects; the first difference is one error."""
    if drawn.is_drawn(folder):
        return
    check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, config)


def check_shapes(folder: Path, expected: Mapping[str, tuple[int, ...]], config: HybridConfig) -> None:
    """The same with the shapes that tensors should have, by name."""
    files, shapes = Weights(folder).files, tensor_shapes(folder)
    anywhere = f"{folder / 'model.safetensors'}"
    for name, shape in expected.items():
        if name not in files:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            raise MambabenchError(f"{anywhere}: tensor {name} {list(shape)} is missing")
        if shapes[name][0] != shape:
            raise MambabenchError(
                f"{files[name]}: tensor {name} has shape {list(shapes[name][0])}, config.json asks for {list(shape)}"
            )
    for name in shapes:
        if name not in expected:
            raise MambabenchError(
                f"{files[name]}: tensor {name} belongs to no part of the model that config.json describes"
            )


def load(folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu", copy: bool = True) -> HybridForCausalLM:
    """The model of a folder in `dtype`, every tensor read and moved once. Without `copy`, tensors that are wanted as
    they stand in a file are views of it, mapped into memory. Raises MambabenchError for any that is missing, left over
    or of another shape."""
    config = read_config(folder)
    model = skeleton(config)
    check(folder, model, config)
    tied = config.tie_word_embeddings
    wanted = model.state_dict()
    if drawn.is_drawn(folder):
        shapes = {name: t.shape for name, t in wanted.items() if not (tied and name == "lm_head.weight")}
        fill(model, drawn.tensors(shapes, folder, dtype, device))
        model.config.dtype = dtype
        return model.eval()
    weights, tensors = Weights(folder), {}
    for name in weights:
        if name not in wanted or (tied and name == "lm_head.weight"):
            continue
        kind = torch.float32 if dtype.itemsize < 4 and name.rpartition(".")[2] in EXACT else dtype
        tensors[name] = weights[name].to(device=device, dtype=kind, copy=copy)
    fill(model, tensors)
    model.config.dtype = dtype
    return model.eval()


def fill(model: HybridForCausalLM, tensors: dict[str, Tensor]) -> None:
    """Gives a skeleton its storage; a tied head becomes the embedding itself."""
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def save(model: HybridForCausalLM, out: Path, like: Path) -> None:
    """Writes config and weights as a transformers folder. A tied head is left out. A tensor with the very numbers that
    the folder `like` has for it is written as it stands there: what was not trained stays in 16 bits."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    before: Mapping[str, Tensor] = {} if drawn.is_drawn(like) else Weights(like)
    write(out, ((name, _as_before(tensor, before.get(name))) for name, tensor in tensors.items()))
    save_config(model.config, out)


def _as_before(tensor: Tensor, before: Tensor | None) -> Tensor:
    if before is None or before.shape != tensor.shape or before.dtype == tensor.dtype:
        return tensor
    return before if torch.equal(before.to(tensor.device, tensor.dtype), tensor) else tensor


def save_config(config: HybridConfig, out: Path) -> None:
    """Writes `config.json`, and generation settings that do not ask for a cache."""
    config.architectures = [HybridForCausalLM.__name__]
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)


def copy_side_files(source: Path, out: Path) -> None:
    """The tokenizer and what belongs to it."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
