"""A very small teacher, its language, and jobs that record what they emit."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, TeacherConfig
from mambabench.distillers.plugin import TinyConfig
from mambabench.distillers.tiny.language import tokenizer
from mambabench.distillers.tiny.source import Tiny
from mambabench.harness.interfaces import Artifact, Job
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Records:
    """Keeps what is emitted."""

    all: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, kind: str, /, **fields: Any) -> None:
        self.all.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for other, fields in self.all if other == kind]

    @property
    def facts(self) -> dict[str, Any]:
        return {fact["name"]: fact["value"] for fact in self.of("fact")}


@pytest.fixture
def make_job(tmp_path):
    def make(name: str = "job", **fields: Any) -> Job:
        given = {
            "seed": 0,
            "device": "cpu",
            "data": {},
            "models": {},
            "teacher": None,
            "parent": None,
            "backend": None,
            "scratch": tmp_path / name / "scratch",
            "out": tmp_path / name / "out",
            "emit": Records(),
        } | fields
        for folder in (given["scratch"], given["out"]):
            folder.mkdir(parents=True, exist_ok=True)
        return Job(**given)

    return make


@pytest.fixture
def write_tiny(make_job):
    def write(**options: Any) -> Path:
        job = make_job("-".join(map(str, options.values())) or "tiny")
        Tiny(TinyConfig(**options)).write(job)
        return job.out

    return write


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Artifact:
    """An untrained Llama over the tiny world."""
    folder, out = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("teacher")
    words = tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    backend = TeacherBackend(TeacherConfig())
    backend.convert(folder, range(2), out, 0)
    return Artifact("teacher", out, backend)


@pytest.fixture(scope="session")
def hybrid(teacher, tmp_path_factory) -> Artifact:
    """The teacher with a Mamba-2 mixer in its first layer."""
    out = tmp_path_factory.mktemp("hybrid")
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=16))
    backend.convert(teacher.path, [1], out, 0)
    return Artifact("half", out, backend)
