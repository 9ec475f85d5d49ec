"""Backend `removed`: a layer without attention is its MLP alone, in every way to run it."""

from pathlib import Path

import pytest
import torch
from mambabench import MambabenchError, Unsupported
from mambabench.backends import released
from mambabench.backends.hybrid import Mamba2HybridBackend, RemovedBackend, TeacherBackend
from mambabench.backends.plugin import RemovedConfig
from mambabench.distillers.mixers import choose_trained
from mambabench.harness.conformance import check_backend
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BF16 = 0.02


@pytest.fixture(scope="module")
def backend() -> RemovedBackend:
    return RemovedBackend(RemovedConfig())


@pytest.fixture(scope="module")
def some(llama: Path, backend: RemovedBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention in layers 1 and 3, nothing in 0 and 2."""
    out = tmp_path_factory.mktemp("removed") / "artifact"
    backend.convert(llama, [1, 3], out, seed=0)
    return out


def test_what_is_left_is_the_teacher_whose_attention_adds_nothing(
    llama: Path, some: Path, teacher_backend: TeacherBackend, backend: RemovedBackend
) -> None:
    teacher, ids = teacher_backend.module(llama).double(), torch.randint(61, (2, 30))
    assert not torch.allclose(teacher(input_ids=ids).logits, backend.module(some).double()(input_ids=ids).logits)
    for layer in (0, 2):
        teacher.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    got = backend.module(some).double()(input_ids=ids).logits
    torch.testing.assert_close(got, teacher(input_ids=ids).logits, rtol=1e-12, atol=1e-12)


def test_only_the_attention_and_its_norm_are_gone(llama: Path, some: Path, backend: RemovedBackend) -> None:
    old, new = (load_file(path / "model.safetensors") for path in (llama, some))
    gone = tuple(f"model.layers.{layer}.{part}." for layer in (0, 2) for part in ("self_attn", "input_layernorm"))
    assert set(new) == {name for name in old if not name.startswith(gone)}
    assert all(torch.equal(old[name], new[name]) for name in new)
    described = backend.describe(some)
    assert described["mixers"] == ["none", "attention", "none", "attention"]
    assert described["attention_layers"] == [1, 3]
    assert described["parameters"] == sum(tensor.numel() for tensor in new.values())
    loaded = AutoModelForCausalLM.from_pretrained(some)
    ids = torch.randint(61, (1, 9))
    torch.testing.assert_close(loaded(input_ids=ids).logits, backend.module(some)(input_ids=ids).logits)


@pytest.mark.parametrize("keep", [[1, 3], []], ids=["half", "none left"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("bfloat16", BF16)])
def test_it_keeps_the_stepping_contract(
    keep: list[int], dtype: str, tolerance: float, llama: Path, backend: RemovedBackend, tmp_path: Path
) -> None:
    backend.convert(llama, keep, tmp_path / "artifact", seed=0)
    check_backend("removed", tmp_path / "artifact", rounds=60, dtype=dtype, tolerance=tolerance)


def test_a_hybrid_can_lose_the_attention_that_it_kept(half: Path, backend: RemovedBackend, tmp_path: Path) -> None:
    backend.convert(half, [3], tmp_path / "artifact", seed=0)
    assert backend.describe(tmp_path / "artifact")["mixers"] == ["mamba2", "none", "mamba2", "attention"]
    check_backend(backend, tmp_path / "artifact", rounds=60)


def test_what_is_left_can_be_traded_for_mamba(some: Path, hybrid_backend: Mamba2HybridBackend, tmp_path: Path) -> None:
    hybrid_backend.convert(some, [], tmp_path / "artifact", seed=0)
    assert hybrid_backend.describe(tmp_path / "artifact")["mixers"] == ["none", "mamba2", "none", "mamba2"]


def test_it_has_no_place_in_the_released_format(some: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="has layers without a mixer; the format has a Mamba mixer in their place"):
        released.export(some, tmp_path / "out")


def test_there_are_no_mixers_to_train_in_it(some: Path, backend: RemovedBackend) -> None:
    module = backend.module(some)
    with pytest.raises(MambabenchError, match="bare has no Mamba mixers, so there is nothing to train"):
        choose_trained(module, ("mixers",), "bare")
    module(input_ids=torch.randint(61, (1, 9)), labels=torch.randint(61, (1, 9))).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.gpu
def test_it_keeps_the_stepping_contract_on_a_gpu(some: Path, backend: RemovedBackend) -> None:
    check_backend(backend, some, rounds=40, device="cuda:0")
