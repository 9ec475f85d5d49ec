"""Trains a small Llama from scratch, so that a plan needs no teacher from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..harness.interfaces import Job, MambabenchError
from . import training
from .losses import cross_entropy, shifted
from .plugin import TrainTeacherConfig
from .processes import rank
from .windows import read_windows


class CrossEntropyTrainer(training.SummedLossTrainer):
    """Cross entropy on the labels."""

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        positions = inputs.get("position_ids")
        logits = model(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False).logits
        return {"ce": cross_entropy(logits, shifted(inputs["labels"]))}


class TrainTeacher:
    """The distiller `train-teacher`."""

    def __init__(self, config: TrainTeacherConfig) -> None:
        self.config = config

    def train(self, job: Job) -> None:
        if job.backend is None:
            raise MambabenchError("train-teacher: the teacher's backend is missing")
        config = self.config
        tokenizer: Any = AutoTokenizer.from_pretrained(_tokenizer_folder(job.data[config.data], config.data))
        windows = read_windows(job.data[config.data], tokenizer, config.context, job.cache)
        torch.manual_seed(job.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                max_position_embeddings=config.context,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                initializer_range=config.init,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        attend_to_likeness(model, config.heads, config.kv_heads)
        recipe = training.Recipe(
            tokens=config.tokens,
            batch=config.batch,
            lr=config.lr,
            warmup=config.warmup,
            clip=config.clip,
            weight_decay=config.weight_decay,
        )
        trainer = CrossEntropyTrainer(job, model, windows, recipe, {"ce": 1.0}, recipe.steps(windows))
        training.report(trainer, job, training.run(trainer, job))
        if rank():
            return
        folder = job.scratch / "teacher"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        job.backend.convert(parent=folder, keep=range(config.layers), out=job.out, seed=job.seed)


@torch.no_grad()
def attend_to_likeness(model: LlamaForCausalLM, heads: int, shared: int) -> None:
    """Begins every head with keys that equal its queries and an output that undoes its values.

    Equal tokens then attend to each other and pass themselves on, from which looking up grows several times sooner
    than from independent weights; the idea is that of mimetic initialisation (Trockman, Kolter 2023,
    arXiv 2305.09828), which also starts from W_Q W_K^T near a multiple of the identity.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        queries = attention.q_proj.weight.unflatten(0, (shared, heads // shared, -1))
        attention.k_proj.weight.copy_(queries[:, 0].flatten(0, 1))
        values = attention.v_proj.weight.unflatten(0, (shared, 1, -1)).expand(-1, heads // shared, -1, -1)
        attention.o_proj.weight.copy_(values.flatten(0, 2).T)


def _tokenizer_folder(data: Path, name: str) -> Path:
    folder = data / "tokenizer"
    if not folder.is_dir():
        raise MambabenchError(
            f"train-teacher: the data {name!r} brings no tokenizer ({folder} is missing); "
            "use a source with a language of its own, such as builtin:tiny/train"
        )
    return folder
