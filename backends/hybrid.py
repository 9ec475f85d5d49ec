"""The built-in backends: `teacher` takes a Llama folder as it is, `mamba2-hybrid` and `mamba` trade attention."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..harness.interfaces import MambabenchError, Tokenizer, Unsupported
from ..kernels import support
from . import checkpoint, convert, native, released
from .families import FAMILIES, from_family
from .model import HybridForCausalLM
from .plugin import Mamba2HybridConfig, MambaConfig, RemovedConfig, TeacherConfig
from .stepper import HybridStepper

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


class TeacherBackend:
    """Llama folders, and every artifact of this room: loading, training, saving."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Takes the folder over, a released hybrid's too. `keep` must be empty, name every layer or those that have
        attention: nothing is changed."""
        sizes = self.describe(parent)
        layers = sizes["layers"]
        if keep and sorted(keep) not in (list(range(layers)), sizes["attention_layers"]):
            raise Unsupported(
                f"backend teacher: keeps attention in all {layers} layers, so keep = {list(keep)} cannot be"
            )
        convert.adopt(parent, out)

    def kernels(self) -> Mapping[str, Mapping[str, Any]]:
        """By which kernels operations ran in this process."""
        return support.record()

    def describe(self, artifact: Path) -> Mapping[str, Any]:
        """Sizes from the config and the tensors' headers. A tied head is counted once."""
        if native.is_native(artifact):
            config, shapes = native.read_config(artifact), native.shapes(artifact)
        else:
            reads = released if released.is_released(artifact) else checkpoint
            config, shapes = reads.read_config(artifact), checkpoint.tensor_shapes(artifact)
        if config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        numbers = {name: torch.Size(shape).numel() for name, (shape, _) in shapes.items()}
        return {
            "layers": config.num_hidden_layers,
            "attention_layers": config.attention_layers,
            "mixers": list(config.mixers),
            "parameters": sum(numbers.values()),
            "weight_bytes": sum(numbers[name] * BYTES.get(kind, 4) for name, (_, kind) in shapes.items()),
            "vocab_size": config.vocab_size,
            "max_context": config.max_position_embeddings,
        }

    def load(self, artifact: Path, device: str, dtype: str) -> HybridStepper:
        """The stepping engine over the artifact's weights in `dtype`."""
        model = checkpoint.load(artifact, torch_dtype(dtype, device), device)
        debug = bool(os.environ.get("MAMBABENCH_DEBUG"))
        return HybridStepper(model, self.tokenizer(artifact), debug)

    def module(self, artifact: Path) -> HybridForCausalLM:
        """The model for training, fp32, on CPU."""
        return checkpoint.load(artifact, torch.float32)

    def frozen(self, artifact: Path, device: str) -> HybridForCausalLM:
        """The model for being asked by a training: on a GPU in bf16, with no copy of it on the way there."""
        return checkpoint.load(artifact, asked_dtype(device), device).requires_grad_(False)

    def mapped(self, artifact: Path, device: str) -> HybridForCausalLM:
        """The same weights on CPU, views of the mapped files where those have them in the same precision: processes
        that take a part of each to a device of their own share them."""
        return checkpoint.load(artifact, asked_dtype(device), copy=False).requires_grad_(False)

    def save(self, module: nn.Module, out: Path, like: Path) -> None:
        """Writes a `HybridForCausalLM`, or a transformers Llama as an all-attention one."""
        if not isinstance(module, HybridForCausalLM):
            module = as_hybrid(module)
        checkpoint.save(module, out, like)
        checkpoint.copy_side_files(like, out)

    def tokenizer(self, artifact: Path) -> Tokenizer:
        """The artifact's tokenizer."""
        return read_tokenizer(artifact, checkpoint.read_config(artifact))


class Mamba2HybridBackend(TeacherBackend):
    """Hybrids of attention and Mamba-2."""

    def __init__(self, config: Mamba2HybridConfig) -> None:
        self.options = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Layers outside `keep` become Mamba-2, initialised from the parent's attention."""
        convert.convert(parent, keep, out, seed, self.options)


class RemovedBackend(TeacherBackend):
    """Attention taken away: what is left of a layer is its MLP."""

    def __init__(self, config: RemovedConfig) -> None:
        self.options = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Layers outside `keep` lose their attention and the norm before it."""
        convert.convert(parent, keep, out, seed, self.options)


class MambaBackend(TeacherBackend):
    """Hybrids of attention and Mamba-1, or Mamba-1 alone."""

    def __init__(self, config: MambaConfig) -> None:
        self.options = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Layers outside `keep` become Mamba-1, initialised from the parent's attention."""
        convert.convert(parent, keep, out, seed, self.options)


def asked_dtype(device: str) -> torch.dtype:
    """Of models that a training only asks."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def torch_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype of a name. Raises MambabenchError for one that is not served, and for a device that is not there."""
    if dtype not in DTYPES:
        raise MambabenchError(f"dtype {dtype!r} is not served; known are {', '.join(DTYPES)}")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise MambabenchError(f"device {device!r}: torch finds no such device here; cpu is always there")
    return DTYPES[dtype]


def read_tokenizer(folder: Path, config: Any) -> Tokenizer:
    """The tokenizer of a folder whose config has been read."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
        return tokenizer
    except Exception as error:  # Damaged files raise whatever transformers and tokenizers stumble over.
        why = str(error).partition("\n")[0]
        raise MambabenchError(f"{folder}: no tokenizer can be loaded ({type(error).__name__}: {why})") from None


def as_hybrid(module: nn.Module) -> HybridForCausalLM:
    """A transformers Llama as an all-attention model that shares its weights."""
    config: Any = getattr(module, "config", None)
    if config is None or config.model_type not in FAMILIES:
        raise MambabenchError(f"{type(module).__name__}: cannot be saved as a hybrid model")
    model = checkpoint.skeleton(from_family(config.to_dict(), config.model_type))
    checkpoint.fill(model, {name: tensor.detach() for name, tensor in module.state_dict().items()})
    return model
