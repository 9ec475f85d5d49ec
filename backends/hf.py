"""Any causal model of transformers as a row: its own forward, its own cache, its own `generate`.

Baselines that were trained from scratch come in by this door. Nothing of the stepping engine is used, so that such a
row is a peer and not our reading of it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..harness.answers import ends, make_answer
from ..harness.interfaces import Answer, Cost, Emit, Limits, MambabenchError, Prompt, Scores, Tokenizer, Unsupported
from . import checkpoint, drawn
from .config import MODEL_TYPE, HybridConfig
from .convert import link, link_weights
from .families import to_family
from .hybrid import BYTES, asked_dtype, read_tokenizer, torch_dtype
from .own_loop import OwnLoop
from .plugin import HfConfig
from .weights import read_json, shards

UNBOUNDED = 1 << 20
"""Context of a model whose config names none, as recurrent ones do."""
ATTENTION = re.compile(r"\.(\d+)\.(?:\w+\.)*?(?:\w*attn|\w*attention|mixer\.(?:q|qkv)_proj)\.")
"""In a tensor's name: the layer that has attention."""
NOT_TAKEN = re.compile(r"\.(bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|py)$|^artifact\.json$|^\.")


class HfBackend:
    """Folders that `AutoModelForCausalLM` loads from safetensors, without code of their own."""

    def __init__(self, config: HfConfig) -> None:
        self.config = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Takes the folder over by hard links, or our artifact of a Transformer. `keep` must be empty or name every
        layer with attention."""
        if _is_ours(parent):
            _export(parent, out)
            return
        described = self.describe(parent)
        if keep and sorted(keep) != described["attention_layers"] and sorted(keep) != list(range(described["layers"])):
            raise Unsupported(f"backend hf: takes a model as it is, so keep = {list(keep)} cannot be; leave it out")
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(parent.iterdir()):
            if path.is_file() and not NOT_TAKEN.search(path.name):
                link(path, out / path.name)

    def describe(self, artifact: Path) -> Mapping[str, Any]:
        """Sizes from the config and the tensors' headers. Layers with attention are those whose tensors say so."""
        config = _config(artifact)
        _check_files(artifact)
        shapes = checkpoint.tensor_shapes(artifact)
        if config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        numbers = {name: torch.Size(shape).numel() for name, (shape, _) in shapes.items()}
        return {
            "layers": config.num_hidden_layers,
            "attention_layers": sorted({int(found[1]) for name in shapes if (found := ATTENTION.search(name))}),
            "mixers": [config.model_type],
            "parameters": sum(numbers.values()),
            "weight_bytes": sum(numbers[name] * BYTES.get(kind, 4) for name, (_, kind) in shapes.items()),
            "vocab_size": config.vocab_size,
            "max_context": getattr(config, "max_position_embeddings", None) or UNBOUNDED,
        }

    def load(self, artifact: Path, device: str, dtype: str) -> HfStepper:
        """The model with its own loop, in `dtype`."""
        kind, context = torch_dtype(dtype, device), self.describe(artifact)["max_context"]
        model: Any = _load(artifact, kind, device)
        return HfStepper(model.to(device), self.tokenizer(artifact), context, self.config.cache)

    def module(self, artifact: Path) -> PreTrainedModel:
        """The model for training, fp32, on CPU."""
        return _load(artifact, torch.float32)

    def mapped(self, artifact: Path, device: str) -> PreTrainedModel:
        """The model for being asked by a training, on CPU: in bf16 for a GPU, with no larger copy on the way there."""
        return _load(artifact, asked_dtype(device))

    def save(self, module: nn.Module, out: Path, like: Path) -> None:
        """Writes a transformers model as safetensors."""
        if not isinstance(module, PreTrainedModel):
            raise MambabenchError(f"{type(module).__name__}: backend hf saves models of transformers only")
        module.save_pretrained(out)
        checkpoint.copy_side_files(like, out)

    def tokenizer(self, artifact: Path) -> Tokenizer:
        """The artifact's tokenizer."""
        return read_tokenizer(artifact, _config(artifact))


class HfStepper(OwnLoop):
    """A model that scores and generates, and makes no steps."""

    refusal = "backend hf decodes with transformers' own generate: it makes no steps and rolls nothing back"

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, max_context: int, cache: str = "dynamic") -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.max_context, self.cache = max_context, cache
        self.device, self.dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        # What generation_config.json asks for (sampling, penalties, ends) would fill every gap of a request.
        model.generation_config = GenerationConfig(pad_token_id=0)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> list[Answer]:
        """Continues all prompts as one left-padded batch. Each step is a burst of one token a row.

        Above temperature 0 the random numbers are torch's, seeded by the limits' seed and the first prompt's sequence:
        the text depends on what else is in the batch.
        """
        if not prompts:
            return []
        self.check_request(prompts, limits)
        lengths = [len(prompt.ids) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -lengths[row] :] = torch.tensor(prompt.ids)
            mask[row, -lengths[row] :] = 1
        rows = _Rows(len(prompts), max(lengths), limits, self.tokenizer, emit)
        devices = [torch.device(self.device)] if self.device.startswith("cuda") else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed(prompts, limits))
            self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=_request(limits, self.cache),
                stopping_criteria=StoppingCriteriaList([rows]),
            )
        return [make_answer(new, limits, self.tokenizer) for new in rows.new]

    @torch.inference_mode()
    def score(self, ids: Tensor, lengths: Tensor) -> Scores:
        """`scored`."""
        kind = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        return self.scored(lambda part: self.model(input_ids=part, use_cache=False).logits, ids, kind)

    def cost(self, batch: int, context: int, steps: int) -> Cost:
        """`weights_cost`."""
        head: Any = self.model.get_output_embeddings()
        embedding: Any = self.model.get_input_embeddings()
        return self.weights_cost(self.model, embedding.weight, None if head is None else head.weight, batch * steps)


class _Rows(StoppingCriteria):
    """Watches the texts grow: emits a burst a row and step, and says which rows have ended."""

    def __init__(self, batch: int, width: int, limits: Limits, tokenizer: Tokenizer, emit: Emit) -> None:
        self.began = time.perf_counter()
        self.width, self.limits, self.tokenizer, self.emit = width, limits, tokenizer, emit
        self.new: list[list[int]] = [[] for _ in range(batch)]
        self.done = [False] * batch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """input_ids [B, width + new tokens] -> bool [B]."""
        last = input_ids[:, -1].tolist()
        at_s = time.perf_counter() - self.began
        for row, token in enumerate(last):
            if self.done[row]:
                continue
            self.new[row].append(token)
            self.emit("burst", row=row, burst=len(self.new[row]) - 1, at_s=at_s, tokens=1)
            full = len(self.new[row]) == self.limits.new_tokens
            self.done[row] = full or ends(self.new[row], self.limits, self.tokenizer)
        return torch.tensor(self.done, device=input_ids.device)


def _request(limits: Limits, cache: str) -> GenerationConfig:
    asked: dict[str, Any] = {"max_new_tokens": limits.new_tokens, "pad_token_id": 0, "do_sample": False}
    if limits.temperature > 0:
        filters = {"temperature": limits.temperature, "top_k": limits.top_k, "top_p": limits.top_p}
        asked |= {**filters, "do_sample": True}
    if cache != "dynamic":
        asked["cache_implementation"] = cache
    return GenerationConfig(**asked)


def _is_ours(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def _export(artifact: Path, out: Path) -> None:
    """Writes an all-attention artifact of ours, whose tensors have their family's names, as the family's folder."""
    config = checkpoint.read_config(artifact)
    if config.attention_layers != list(range(config.num_hidden_layers)):
        raise Unsupported(f"{artifact}: is no Transformer of transformers: layers {_others(config)} have no attention")
    out.mkdir(parents=True, exist_ok=True)
    if drawn.is_drawn(artifact):
        drawn.take_along(artifact, out)
    else:
        link_weights(artifact, out)
    (out / "config.json").write_text(json.dumps(to_family(config), indent=2) + "\n", encoding="utf-8")
    checkpoint.copy_side_files(artifact, out)


def _others(config: HybridConfig) -> list[int]:
    return [index for index in range(config.num_hidden_layers) if index not in config.attention_layers]


def _config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise MambabenchError(f"{folder}: no config.json; a model is a transformers folder")
    try:
        family = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        if family == MODEL_TYPE:
            raise Unsupported(f'{path}: a hybrid of this project has no cache for generate; use = "mamba2-hybrid"')
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MambabenchError(f"{path}: transformers knows no such model ({reason})") from None


def _check_files(folder: Path) -> None:
    """Raises MambabenchError for weights that are missing, or in files that might run code."""
    for path in () if drawn.is_drawn(folder) else shards(folder):
        if path.suffix != ".safetensors":
            raise MambabenchError(f"{path}: backend hf takes safetensors alone; save the model as such")


def _load(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Every tensor from safetensors, on CPU; a tensor that the folder lacks is an error, never a random one. Only a
    model of which all are to be drawn has random ones, on the device."""
    _check_files(folder)
    if drawn.is_drawn(folder):
        torch.manual_seed(drawn.spread(folder)[0])
        with torch.device(device):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(_config(folder), dtype=dtype)
        return made.eval()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MambabenchError(f"{folder}: transformers cannot load this model ({reason})") from None
    model: PreTrainedModel = loaded[0]
    for kind in ("missing", "mismatched"):
        wrong = sorted(map(str, loaded[1][f"{kind}_keys"]))
        if wrong:
            raise MambabenchError(f"{folder}: {kind} tensors: {wrong[0]}")
    return model.eval()
