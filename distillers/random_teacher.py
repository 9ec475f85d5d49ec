"""A teacher with random weights and a tokenizer of bytes, and text of random tokens, where only shapes matter.

Weights are drawn on the device in the dtype in which they are kept: 8 billion of them take seconds on a GPU.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ..harness.documents import leading_token
from ..harness.interfaces import Job, MambabenchError
from .random_configs import RandomTeacherConfig, RandomTokensConfig

BEGIN, END = "<s>", "</s>"
SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
}
"""Options, and what transformers calls them."""


class RandomTeacher:
    """The distiller `random-teacher`."""

    def __init__(self, config: RandomTeacherConfig) -> None:
        self.config = config

    def train(self, job: Job) -> None:
        if job.backend is None:
            raise MambabenchError("random-teacher: the teacher's backend is missing")
        given = job.data[self.config.config] if self.config.config else None
        tokenizer, shape = byte_tokenizer(), read_shape(self.config, given)
        config = _config(shape | {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
        if config.vocab_size < len(tokenizer):
            raise MambabenchError(
                f"random-teacher: vocabulary is {config.vocab_size}; its tokenizer has {len(tokenizer)} tokens"
            )
        folder = job.scratch / "teacher"
        if self.config.weights == "drawn":
            config.save_pretrained(folder)
            write_drawn(folder, job.seed, self.config.init)
        else:
            torch.manual_seed(job.seed)
            with torch.device(job.device):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.config.dtype))
            model.save_pretrained(folder, max_shard_size="5GB")
        tokenizer.save_pretrained(folder)
        job.backend.convert(parent=folder, keep=range(config.num_hidden_layers), out=job.out, seed=job.seed)
        job.emit("fact", name="parameters", value=job.backend.describe(job.out)["parameters"])


def write_drawn(folder: Path, seed: int, init: float) -> None:
    """Says that the weights of a folder are to be drawn by whoever loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "random.json").write_text(json.dumps({"seed": seed, "init": init}) + "\n", encoding="utf-8")


def read_shape(config: RandomTeacherConfig, file: Path | None) -> dict[str, Any]:
    """The fields of a transformers config: those of a file (or of config.json in a folder) under those of the options;
    without a file a Llama. Raises MambabenchError for a file that is none."""
    fields: dict[str, Any] = {"model_type": "llama"}
    if file is None:
        fields |= {"max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": False}
    else:
        file = file / "config.json" if file.is_dir() else file
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MambabenchError(f"{file}: not a config.json ({error})") from None
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise MambabenchError(f"{file}: not a config.json of transformers (it has no model_type)")
    fields |= {name: getattr(config, option) for option, name in SIZES.items() if getattr(config, option)}
    if config.rope_theta:
        rope = dict(fields.pop("rope_parameters", None) or {"rope_type": "default"})
        fields |= {"rope_parameters": rope | {"rope_theta": config.rope_theta}}
        fields.pop("rope_theta", None)
    if config.tied is not None:
        fields["tie_word_embeddings"] = config.tied
    for name in ("architectures", "transformers_version", "torch_dtype", "dtype", "pad_token_id"):
        fields.pop(name, None)
    return fields | {"initializer_range": config.init}


def _config(shape: Mapping[str, Any]) -> Any:
    """transformers' config of a shape. Raises MambabenchError for one that it knows no model of."""
    try:
        return AutoConfig.for_model(**shape)
    except (StrictDataclassError, ValueError) as error:
        # Its last line, without the list of all that it knows.
        reason = str(error).splitlines()[-1].partition(". ")[0].strip()
        raise MambabenchError(f"random-teacher: no such model ({reason})") from None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, one for the beginning and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: number for number, letter in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)


class RandomTokens:
    """The source `random-tokens`."""

    def __init__(self, config: RandomTokensConfig) -> None:
        self.config = config

    def write(self, job: Job) -> None:
        if job.teacher is None:
            raise MambabenchError("random-tokens: needs the teacher, whose vocabulary it draws from")
        config, teacher = self.config, job.teacher
        size = int(teacher.backend.describe(teacher.path)["vocab_size"])
        if config.vocabulary > size:
            raise MambabenchError(f"random-tokens: vocabulary is {config.vocabulary}; the teacher's has {size} tokens")
        lead = leading_token(teacher.backend.tokenizer(teacher.path))
        first = [] if lead is None else [lead]
        dice, below = random.Random(config.seed), range(config.vocabulary or size)
        with (job.out / "data.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(config.documents):
                ids = [*first, *dice.choices(below, k=config.length - len(first))]
                file.write(json.dumps({"ids": ids}) + "\n")
        job.emit("fact", name="tokens", value=config.documents * config.length, unit="tokens")
