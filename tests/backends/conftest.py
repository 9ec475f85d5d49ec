"""A tiny random Llama with a tokenizer, and hybrids of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, TeacherConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(58))]


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random Llama: 4 layers x 32, 4 heads of 8, 2 KV heads, 61 tokens; keywords change its config."""

    def make(**changes: object) -> Path:
        folder = tmp_path_factory.mktemp("llama")
        torch.manual_seed(0)
        fields: dict[str, object] = {
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
        }
        LlamaForCausalLM(LlamaConfig(**(fields | changes))).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: Callable[..., Path]) -> Path:
    return make_llama()


@pytest.fixture(scope="session")
def teacher_backend() -> TeacherBackend:
    return TeacherBackend(TeacherConfig())


@pytest.fixture(scope="session")
def hybrid_backend() -> Mamba2HybridBackend:
    return Mamba2HybridBackend(Mamba2HybridConfig(chunk=8))


@pytest.fixture(scope="session")
def half(llama: Path, hybrid_backend: Mamba2HybridBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attention and two Mamba-2 layers."""
    out = tmp_path_factory.mktemp("half") / "artifact"
    hybrid_backend.convert(llama, [1, 3], out, seed=0)
    return out


@pytest.fixture(params=["teacher", "half", "pure"], scope="session")
def artifact(request: pytest.FixtureRequest, llama: Path, half: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind of artifact in turn."""
    if request.param == "half":
        return half
    out = tmp_path_factory.mktemp(request.param) / "artifact"
    if request.param == "teacher":
        TeacherBackend(TeacherConfig()).convert(llama, range(4), out, seed=0)
    else:
        Mamba2HybridBackend(Mamba2HybridConfig(chunk=8)).convert(half, [], out, seed=0)
    return out
