"""Reading and writing checkpoint folders: every tensor accounted for, errors that name the file and the tensor.

Headers are read without weights, so that a folder is refused before anything is loaded or copied.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ..harness.interfaces import MambabenchError, Unsupported
from .config import MODEL_TYPE, HybridConfig
from .families import FAMILIES, from_family
from .mamba import EXACT
from .model import HybridForCausalLM

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
    raw = _read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or (family != MODEL_TYPE and family not in FAMILIES):
        raise Unsupported(f"{path}: model_type {family!r} is not served; known are {', '.join(FAMILIES)}")
    raw.pop("model_type")
    try:
        return HybridConfig(**raw) if family == MODEL_TYPE else from_family(raw, family)
    except Unsupported as error:
        raise Unsupported(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise MambabenchError(f"{path}: describes no model ({type(error).__name__}: {reason})") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the headers of `model.safetensors` or of the shards in its index."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise MambabenchError(f"{index}: has no weight_map")
        names = sorted(set(listed.values()))
    elif single.is_file():
        names = [single.name]
    else:
        raise MambabenchError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    found: dict[str, Path] = {}
    for name in names:
        with _open(folder / name) as file:
            found.update(dict.fromkeys(file.keys(), folder / name))
    return found


def tensor_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors dtype name of every tensor, without loading any."""
    shapes = {}
    for path, names in _by_file(tensor_files(folder)).items():
        with _open(path) as file:
            for name in names:
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape()), str(part.get_dtype())
    return shapes


def skeleton(config: HybridConfig) -> HybridForCausalLM:
    """The model without storage."""
    with torch.device("meta"):
        return HybridForCausalLM(config)


def check(folder: Path, model: nn.Module, config: HybridConfig) -> None:
    """Compares the headers in `folder` with what `model` expects; the first difference is one error."""
    check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, config)


def check_shapes(folder: Path, expected: Mapping[str, tuple[int, ...]], config: HybridConfig) -> None:
    """The same with the shapes that tensors should have, by name."""
    files, shapes = tensor_files(folder), tensor_shapes(folder)
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
    for name in files:
        if name not in expected and not IGNORED.search(name):
            raise MambabenchError(
                f"{files[name]}: tensor {name} belongs to no part of the model that config.json describes"
            )


def read_tensors(folder: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor named in `wanted`, in memory of its own, one at a time."""
    files = {name: path for name, path in tensor_files(folder).items() if name in wanted}
    for path, names in _by_file(files).items():
        with _open(path) as file:
            for name in names:
                yield name, file.get_tensor(name)


def load(folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> HybridForCausalLM:
    """The model of a folder in `dtype`, every tensor read and moved once. Raises MambabenchError for any that is
    missing, left over or of another shape."""
    config = read_config(folder)
    model = skeleton(config)
    check(folder, model, config)
    tied = config.tie_word_embeddings
    tensors = {}
    for name, tensor in read_tensors(folder, model.state_dict()):
        if tied and name == "lm_head.weight":
            continue
        kind = torch.float32 if dtype.itemsize < 4 and name.rpartition(".")[2] in EXACT else dtype
        tensors[name] = tensor.to(device=device, dtype=kind, copy=True)
    fill(model, tensors)
    model.config.dtype = dtype
    return model.eval()


def fill(model: HybridForCausalLM, tensors: dict[str, Tensor]) -> None:
    """Gives a skeleton its storage; a tied head becomes the embedding itself."""
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def save(model: HybridForCausalLM, out: Path) -> None:
    """Writes config and weights as a transformers folder. A tied head is left out."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    save_config(model.config, out)


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MambabenchError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise MambabenchError(f"{path}: not a JSON object")
    return raw


def _by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    grouped: dict[Path, list[str]] = {}
    for name, path in files.items():
        grouped.setdefault(path, []).append(name)
    return grouped


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise MambabenchError(f"{path}: the file is missing, but the index names it") from None
    except SafetensorError as error:
        raise MambabenchError(f"{path}: not a whole safetensors file ({error})") from None
