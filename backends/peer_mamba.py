"""mamba-ssm's own models with its own `generate`, graphs and all: a peer for models of the same shape.

Nothing of our engine is used. Its states are in the model's precision, as it has them. The package is imported only
where a model is loaded, and it runs on CUDA devices alone.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.answers import ends, make_answer
from ..harness.interfaces import Answer, Cost, Emit, Limits, MambabenchError, Prompt, Scores, Tokenizer, Unsupported
from . import checkpoint, drawn, native
from .config import HybridConfig
from .convert import link
from .hybrid import BYTES, read_tokenizer, torch_dtype
from .native import UNBOUNDED
from .own_loop import OwnLoop
from .plugin import MambaSsmConfig
from .weights import Weights, shards

HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"


class MambaSsmBackend:
    """Folders in mamba-ssm's format, and our artifacts of such models."""

    def __init__(self, config: MambaSsmConfig) -> None:
        self.config = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Takes such a folder over by hard links, and writes our artifact of one as such a folder."""
        if not native.is_native(parent):
            native.export(parent, out)
            return
        native.read_raw(parent)
        out.mkdir(parents=True, exist_ok=True)
        weights = [parent / drawn.FILE] if drawn.is_drawn(parent) else shards(parent)
        for path in (parent / "config.json", *weights):
            link(path, out / path.name)
        checkpoint.copy_side_files(parent, out)

    def describe(self, artifact: Path) -> Mapping[str, Any]:
        """Sizes from the config and the tensors' headers. Layers with attention are those that the config names."""
        if not native.is_native(artifact):
            raise MambabenchError(f"{artifact / 'config.json'}: is none of mamba-ssm's (it has no d_model and n_layer)")
        raw = native.read_raw(artifact)
        shapes = native.shapes(artifact) if drawn.is_drawn(artifact) else checkpoint.tensor_shapes(artifact)
        if raw.get("tie_embeddings", True):
            shapes.pop(HEAD, None)
        numbers = {name: torch.Size(shape).numel() for name, (shape, _) in shapes.items()}
        return {
            "layers": int(raw["n_layer"]),
            "attention_layers": list(raw.get("attn_layer_idx") or []),
            "mixers": [str((raw.get("ssm_cfg") or {}).get("layer", "Mamba1"))],
            "parameters": sum(numbers.values()),
            "weight_bytes": sum(numbers[name] * BYTES.get(kind, 4) for name, (_, kind) in shapes.items()),
            "vocab_size": raw["vocab_size"],
            "max_context": UNBOUNDED,
        }

    def load(self, artifact: Path, device: str, dtype: str) -> MambaSsmStepper:
        """The model with its own loop, in `dtype`."""
        kind = torch_dtype(dtype, device)
        if device == "cpu":
            raise Unsupported("backend mamba-ssm: its kernels run on CUDA devices alone")
        return MambaSsmStepper(build(artifact, device, kind), self.tokenizer(artifact), device, dtype)

    def module(self, artifact: Path) -> nn.Module:
        """Raises Unsupported: it is there to be measured."""
        raise Unsupported("backend mamba-ssm: trains nothing; the same model trains with backend teacher")

    def save(self, module: nn.Module, out: Path, like: Path) -> None:
        """Raises Unsupported."""
        raise Unsupported("backend mamba-ssm: trains nothing, so there is nothing to save")

    def tokenizer(self, artifact: Path) -> Tokenizer:
        """That of the folder."""
        # Any config that is known: transformers would ask the folder's for its family.
        return read_tokenizer(artifact, HybridConfig())


def build(folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """mamba-ssm's model with every tensor of a folder in its format, or with the weights that it draws itself."""
    try:
        models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        configs = importlib.import_module("mamba_ssm.models.config_mamba")
    except ImportError as error:
        raise Unsupported(f"backend mamba-ssm: cannot be imported here ({error})") from None
    raw, tensors = native.read_raw(folder), dict[str, Tensor]()
    if drawn.is_drawn(folder):
        torch.manual_seed(drawn.spread(folder)[0])
    else:
        weights = Weights(folder)
        tensors = {name: weights[name] for name in weights}
        if raw.get("tie_embeddings", True):
            tensors.setdefault(HEAD, tensors[EMBEDDING])
    try:
        model: nn.Module = models.MambaLMHeadModel(configs.MambaConfig(**raw), device=device, dtype=dtype)
        if tensors:
            model.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MambabenchError(f"{folder}: mamba-ssm cannot make this model ({reason})") from None
    return model.eval().requires_grad_(False)


class MambaSsmStepper(OwnLoop):
    """A model that scores and generates, and makes no steps."""

    refusal = "backend mamba-ssm decodes with its own generate: it makes no steps and rolls nothing back"
    max_context = UNBOUNDED

    def __init__(self, model: Any, tokenizer: Tokenizer, device: str, dtype: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size: int = model.lm_head.weight.shape[0]
        self.device, self.dtype = device, dtype

    def generate(self, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> list[Answer]:
        """Continues all prompts, which must be of one length, as one batch.

        Its loop runs ahead of the device and tells of no token before the last, and looking on would slow it down. So
        it is asked twice: for one token, which is the first burst, and for all of them, which are the second. It looks
        for no end of text: what stands behind one is cut off afterwards.
        """
        if not prompts:
            return []
        self.check_request(prompts, limits)
        if len({len(prompt.ids) for prompt in prompts}) > 1:
            raise Unsupported("backend mamba-ssm: its generate takes prompts of one length at a time")
        ids = torch.tensor([prompt.ids for prompt in prompts], device=self.device)
        seed = self.seed(prompts, limits)
        first_s, new = self._timed(ids, 1, limits, seed)
        rows = range(len(prompts))
        for row in rows:
            emit("burst", row=row, burst=0, at_s=first_s, tokens=1)
        if limits.new_tokens > 1:
            all_s, new = self._timed(ids, limits.new_tokens, limits, seed)
            for row in rows:
                emit("burst", row=row, burst=1, at_s=all_s, tokens=limits.new_tokens - 1)
        return [make_answer(self._until_end(row, limits), limits, self.tokenizer) for row in new.tolist()]

    def _timed(self, ids: Tensor, count: int, limits: Limits, seed: int) -> tuple[float, Tensor]:
        """Seconds, and the new tokens int64 [B, count]."""
        filters: dict[str, Any] = {"top_k": 1}
        if limits.temperature > 0:
            top_p = limits.top_p if limits.top_p < 1 else 0.0
            filters = {"top_k": limits.top_k, "top_p": top_p, "temperature": limits.temperature}
        on_gpu = self.device.startswith("cuda")
        with torch.random.fork_rng([torch.device(self.device)] if on_gpu else []):
            torch.manual_seed(seed)
            began = time.perf_counter()
            whole = self.model.generate(ids, max_length=ids.shape[1] + count, cg=on_gpu, **filters)
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - began, whole[:, ids.shape[1] :]

    def _until_end(self, new: list[int], limits: Limits) -> list[int]:
        found = (count for count in range(1, len(new)) if ends(new[:count], limits, self.tokenizer))
        return new[: next(found, len(new))]

    @torch.inference_mode()
    def score(self, ids: Tensor, lengths: Tensor) -> Scores:
        """`scored`."""
        return self.scored(lambda part: self.model(part).logits, ids, torch.float32)

    def cost(self, batch: int, context: int, steps: int) -> Cost:
        """`weights_cost`."""
        embedding = self.model.backbone.embedding.weight
        return self.weights_cost(self.model, embedding, self.model.lm_head.weight, batch * steps)
