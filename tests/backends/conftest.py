"""A tiny random Llama with a tokenizer, and hybrids of it."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mambabench.backends import graphs
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, TeacherConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(58))]
NATIVE = {"d_model": 32, "n_layer": 3, "vocab_size": 61, "pad_vocab_size_multiple": 16, "tie_embeddings": True}
MIXER = {"layer": "Mamba2", "d_state": 12, "headdim": 8, "ngroups": 1}


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


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of ids of every start of a recorded call, by the stand-in."""
    found: list[torch.Size] = []

    def record(self, work, ids, start):
        self.count += 1
        # As with a graph: nothing runs yet, nobody's handle is held, and whoever has the memory later is served too.
        given = inspect.getclosurevars(work).nonlocals
        model, state, settle = given["self"], replace(given["state"]), given.get("settle")
        rows = ids.shape if settle is not None else ids.shape[:1]
        logits = torch.zeros(*rows, model.vocab_size, dtype=state.exact)

        def replay() -> None:
            found.append(ids.shape)
            ran = model._read(ids, start, state) if settle is None else model._run(ids, start, state, settle)
            logits.copy_(ran)

        return replay, logits

    monkeypatch.setattr(graphs.Recorder, "record", record)
    return found


@pytest.fixture
def make_native(llama: Path, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor], dict[str, object]]]:
    """make_native(**ssm_cfg): a folder in mamba-ssm's format with random weights, and a tokenizer."""

    def make(pickled=False, **changes):
        folder = tmp_path / "native"
        folder.mkdir()
        ssm = MIXER | changes
        (folder / "config.json").write_text(json.dumps({**NATIVE, "ssm_cfg": ssm}))
        width, inner, conv = NATIVE["d_model"], 2 * NATIVE["d_model"], ssm.get("d_conv", 4)
        heads, shared = inner // ssm["headdim"], ssm["ngroups"] * ssm["d_state"]
        torch.manual_seed(0)
        tensors = {
            "backbone.embedding.weight": torch.randn(64, width),
            "backbone.norm_f.weight": torch.rand(width) + 0.5,
        }
        for layer in range(NATIVE["n_layer"]):
            of = {
                "norm.weight": torch.rand(width) + 0.5,
                "mixer.in_proj.weight": torch.randn(2 * inner + 2 * shared + heads, width) / 4,
                "mixer.conv1d.weight": torch.randn(inner + 2 * shared, 1, conv) / 2,
                "mixer.conv1d.bias": torch.randn(inner + 2 * shared) / 4,
                "mixer.dt_bias": torch.randn(heads),
                "mixer.A_log": torch.rand(heads) * 2,
                "mixer.D": torch.randn(heads),
                "mixer.norm.weight": torch.rand(inner) + 0.5,
                "mixer.out_proj.weight": torch.randn(width, inner) / 4,
            }
            tensors |= {f"backbone.layers.{layer}.{name}": tensor for name, tensor in of.items()}
        if pickled:
            torch.save(
                {**tensors, "lm_head.weight": tensors["backbone.embedding.weight"]}, folder / "pytorch_model.bin"
            )
        else:
            save_file(tensors, folder / "model.safetensors")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((llama / name).read_bytes())
        return folder, tensors, ssm

    return make
