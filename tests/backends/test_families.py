"""Each family of teachers gives the logits and the text that transformers' own model gives, and goes into a hybrid."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mambabench import Unsupported
from mambabench.backends import checkpoint
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig, TeacherConfig
from mambabench.backends.weights import Weights
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.conformance import check_backend
from mambabench.harness.interfaces import Limits, Prompt, silent
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from .test_model import ROPES, some_ids

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral": (MistralConfig, {"sliding_window": 7, "head_dim": 12}),
    "mistral-full": (MistralConfig, {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "qwen2-window": (Qwen2Config, WINDOW),
    "qwen3": (Qwen3Config, {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6}),
    "qwen3-window": (Qwen3Config, WINDOW | {"attention_bias": True, "head_dim": 16}),
}
SCALED = {
    **ROPES,
    "llama3-steep": ROPES["llama3"] | {"factor": 32.0, "high_freq_factor": 2.0},
    "yarn-factor": ROPES["yarn"] | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": ROPES["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0},
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Make:
    """Writes a random model of a family; every bias and norm is random too. The tokenizer is that of `llama`."""

    def build(family: str, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp(family)
        kind, fields = FAMILIES[family]
        torch.manual_seed(1)
        common = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        model = AutoModelForCausalLM.from_config(kind(**(common | fields | changes)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((llama / name).read_bytes())
        return folder

    return build


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' model in fp64, without the places where it goes down to fp32: norms, and angles of rotation."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(
                x, m.weight.shape, m.weight, m.variance_epsilon
            )

    def rotary(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * model.model.rotary_emb.inv_freq.double()
        turned = torch.cat((angles, angles), dim=-1)
        factor = model.model.rotary_emb.attention_scaling
        return turned.cos() * factor, turned.sin() * factor

    frequencies = model.model.rotary_emb.inv_freq
    model.model.rotary_emb.inv_freq = frequencies.float()
    model.model.rotary_emb.forward = rotary
    return model


def theirs(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("rope", SCALED)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, rope: str, make: Make, teacher_backend: TeacherBackend) -> None:
    folder = make(family, rope_parameters=SCALED[rope], tie_word_embeddings=len(family) % 2 == 0)
    ids = some_ids(2, 48)
    with torch.no_grad():
        want = theirs(folder)(input_ids=ids).logits
        got = teacher_backend.module(folder)(input_ids=ids).logits
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_they_are_equal_to_nine_digits(family: str, make: Make, teacher_backend: TeacherBackend) -> None:
    folder = make(family, rope_parameters=ROPES["default"])
    ids = some_ids(2, 60)
    with torch.no_grad():
        want = exact(theirs(folder))(input_ids=ids).logits
        got = teacher_backend.module(folder).double()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers_token_for_token(
    family: str, make: Make, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    """Beyond the sliding windows, from an artifact, prompts of different lengths in one batch."""
    folder = make(family, rope_parameters=SCALED["yarn"])
    teacher_backend.convert(folder, [], tmp_path / "artifact", seed=0)
    model = teacher_backend.load(tmp_path / "artifact", "cpu", "float64")
    prompts = [Prompt(tuple(some_ids(length, seed=length).tolist()), length) for length in (3, 11, 6)]
    answers = StandardDecoder().generate(model, prompts, Limits(new_tokens=24), silent)
    reference = exact(theirs(folder))
    for prompt, answer in zip(prompts, answers, strict=True):
        text = list(prompt.ids)
        for _ in answer.ids:
            with torch.no_grad():
                text.append(int(reference(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert list(answer.ids) == text[len(prompt.ids) :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mistral", "qwen3-window"])
def test_padding_changes_nothing_behind_a_window(
    family: str, side: str, make: Make, teacher_backend: TeacherBackend
) -> None:
    model = teacher_backend.module(make(family)).double()
    ids, padding = some_ids(1, 17), some_ids(1, 6, seed=1)
    mask, part = torch.zeros(1, 23, dtype=torch.int64), slice(6, None) if side == "left" else slice(17)
    mask[:, part] = 1
    rows = torch.cat((padding, ids) if side == "left" else (ids, padding), dim=1)
    got = model(input_ids=rows, attention_mask=mask).logits
    torch.testing.assert_close(got[:, part], model(input_ids=ids).logits, rtol=1e-9, atol=1e-9)


HYBRIDS: dict[str, tuple[str, Any, list[int], int]] = {
    "mistral": ("mistral", TeacherBackend(TeacherConfig()), [0, 1, 2], 60),
    "mistral-mamba2": ("mistral", Mamba2HybridBackend(Mamba2HybridConfig(chunk=8)), [1], 200),
    "qwen2-mamba": ("qwen2-window", MambaBackend(MambaConfig()), [0, 2], 60),
    "qwen3-mamba2": ("qwen3-window", Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, rope="kept")), [2], 200),
    "qwen3-mamba": ("qwen3-window", MambaBackend(MambaConfig()), [2], 60),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_stepping_is_full_recomputation(name: str, make: Make, tmp_path: Path) -> None:
    """Windows of 5 and 7 tokens under a context of 40, so that rollbacks reach over them; biases, norms of heads."""
    family, backend, keep, rounds = HYBRIDS[name]
    backend.convert(make(family), keep, tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=rounds)


@pytest.mark.gpu
@pytest.mark.parametrize("name", HYBRIDS)
def test_stepping_is_full_recomputation_on_a_gpu(name: str, make: Make, tmp_path: Path) -> None:
    family, backend, keep, _ = HYBRIDS[name]
    backend.convert(make(family), keep, tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=40, device="cuda:0")


@pytest.mark.parametrize("family", ["mistral", "qwen3-window"])
def test_packed_documents_see_nothing_of_each_other_behind_a_window(
    family: str, make: Make, teacher_backend: TeacherBackend
) -> None:
    model, lengths = teacher_backend.module(make(family)).double(), (9, 14, 3)
    documents = [some_ids(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = model(input_ids=torch.cat(documents, dim=1), position_ids=positions).logits
    apart = torch.cat([model(input_ids=document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)


def test_a_hybrid_keeps_the_windows_of_the_layers_that_keep_attention(make: Make, tmp_path: Path) -> None:
    backend = Mamba2HybridBackend(Mamba2HybridConfig())
    backend.convert(make("qwen2-window"), [0, 2], tmp_path / "artifact", seed=0)
    config = backend.module(tmp_path / "artifact").config
    assert config.layer_types == ["full_attention", "linear_attention", "sliding_attention"]
    assert config.windows == [0, 0, 5]
    described = backend.describe(tmp_path / "artifact")
    assert described["attention_layers"] == [0, 2]


def test_biases_and_norms_go_along(make: Make, tmp_path: Path) -> None:
    """V, K and Q's biases lie where x, B and C's rows lie; K and Q's norms become B and C's."""
    folder = make("qwen3-window")
    Mamba2HybridBackend(Mamba2HybridConfig()).convert(folder, [1, 2], tmp_path / "artifact", seed=0)
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "artifact"))
    attention, mamba = "model.layers.0.self_attn", "model.layers.0.mamba"
    z, x, b, c, dt = new[f"{mamba}.in_proj.bias"].split((64, 32, 32, 64, 4))
    for part, name in ((x, "v"), (b, "k"), (c, "q")):
        assert torch.equal(part, old[f"{attention}.{name}_proj.bias"])
    assert not z.any()
    assert not dt.any()
    assert torch.equal(new[f"{mamba}.out_proj.bias"], old[f"{attention}.o_proj.bias"])
    assert torch.equal(new[f"{mamba}.b_norm.weight"], old[f"{attention}.k_norm.weight"])
    assert torch.equal(new[f"{mamba}.c_norm.weight"], old[f"{attention}.q_norm.weight"])


def test_what_enters_the_convolution_is_what_attention_would_have_read(make: Make, tmp_path: Path) -> None:
    folder = make("qwen3")
    backend = Mamba2HybridBackend(Mamba2HybridConfig())
    backend.convert(folder, [1], tmp_path / "artifact", seed=0)
    mixer = backend.module(tmp_path / "artifact").model.layers[0].mamba
    attention = theirs(folder).model.layers[0].self_attn
    h = torch.randn(2, 5, 32)
    with torch.no_grad():
        x, b, c = mixer._parts(mixer._split(mixer.in_proj(h))[1])[0].split((18, 18, 18), dim=-1)
        heads = (2, 5, -1, 6)
        torch.testing.assert_close(x, attention.v_proj(h))
        torch.testing.assert_close(b.view(heads), attention.k_norm(attention.k_proj(h).view(heads)))
        torch.testing.assert_close(c.view(heads), attention.q_norm(attention.q_proj(h).view(heads)))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_scale_of_the_queries_reaches_them(family: str, make: Make, tmp_path: Path) -> None:
    """Behind a norm, a smaller projection would be no smaller query."""
    queries = []
    for scale in ("one", "attention"):
        backend = Mamba2HybridBackend(Mamba2HybridConfig(q_scale=scale))
        backend.convert(make(family), [1, 2], tmp_path / scale, seed=0)
        mixer = backend.module(tmp_path / scale).model.layers[0].mamba
        with torch.no_grad():
            queries.append(mixer._parts(mixer._split(mixer.in_proj(torch.ones(1, 3, 32)))[1])[0][..., -mixer.inner :])
    torch.testing.assert_close(queries[0], queries[1] * mixer.width**0.5)


CONFIGS = {
    "mistral": {"num_hidden_layers": 2, "hidden_size": 64, "rope_theta": 1e6},
    "llama": {"rope_scaling": {"type": "linear", "factor": 4.0}, "num_key_value_heads": 4},
    "llama-3.1": {"rope_theta": 500000.0, "rope_scaling": ROPES["llama3"], "eos_token_id": [5, 6]},
    "qwen2": {
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
}

SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_old_or_with_keys_left_out_means_what_transformers_reads_in_it(name: str, tmp_path: Path) -> None:
    """As `config.json` was before head_dim, rope_parameters and layer_types."""
    raw = {"model_type": name.partition("-")[0], **CONFIGS[name]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, reference = checkpoint.read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    for field in SHARED:
        assert getattr(ours, field) == getattr(reference, field), field
    width = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    assert ours.head_dim == width
    assert ours.windows == ([4096, 4096] if name == "mistral" else [0] * ours.num_hidden_layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "gemma2"}', "model_type 'gemma2' is not served; known are llama, mistral, qwen2, qwen3$"),
        ('{"num_hidden_layers": 2}', "model_type None is not served; known are llama"),
        (
            '{"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, '
            '"partial_rotary_factor": 0.5}}',
            "partial_rotary_factor 0.5 is not served, only whole heads",
        ),
        (
            '{"model_type": "mambabench_hybrid", "mixers": ["attention"], "layer_types": ["sliding_attention"]}',
            "layer_types: 'sliding_attention' without a sliding_window",
        ),
        ('{"model_type": "llama", "rope_parameters": [1]}', r"config\.json: rope_parameters: \[1\] is not an object"),
        (
            '{"model_type": "llama", "rope_scaling": {"type": ["yarn"]}}',
            r"rope_type \['yarn'\] is not served; known are",
        ),
        (
            '{"model_type": "llama", "rope_scaling": {"type": "longrope"}}',
            "rope_type 'longrope' is not served; known are",
        ),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}',
            r"config\.json: quantization_config: quantised weights are not served",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    text: str, message: str, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Unsupported, match=message):
        teacher_backend.describe(tmp_path)


@pytest.mark.parametrize("value", [0, -1.0, "4", None, True])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("rope_theta", {}),
        ("factor", {"rope_type": "linear"}),
        ("factor", {"rope_type": "dynamic"}),
        ("low_freq_factor", ROPES["llama3"]),
    ],
)
def test_a_number_of_rope_that_is_none_is_named(
    name: str, others: dict, value: object, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    rope = {"rope_type": "default"} | others | {name: value}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_parameters": rope}))
    with pytest.raises(
        Unsupported, match=rf"config\.json: rope_parameters: {name} is {value!r}; it must be a number ab"
    ):
        teacher_backend.describe(tmp_path)


def test_the_base_of_rope_is_named_where_configs_of_old_have_it(
    teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": "1e4"}))
    with pytest.raises(
        Unsupported, match=r"config\.json: rope_parameters: rope_theta is '1e4'; it must be a number ab"
    ):
        teacher_backend.describe(tmp_path)


def test_loading_holds_one_tensor_beside_the_model(
    make: Make, teacher_backend: TeacherBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor that a file gives is gone before the one after the next is read, and the model takes the moved ones
    over without a copy."""
    alive: list[weakref.ref] = []
    taken: dict[str, int] = {}
    read, fill = Weights.__getitem__, checkpoint.fill

    def watched(weights: Weights, name: str) -> torch.Tensor:
        tensor = read(weights, name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        assert sum(1 for of in alive if of() is not None) <= 2
        return tensor

    def noted(model: Any, tensors: dict) -> None:
        taken.update((name, tensor.data_ptr()) for name, tensor in tensors.items())
        fill(model, tensors)

    monkeypatch.setattr(Weights, "__getitem__", watched)
    monkeypatch.setattr(checkpoint, "fill", noted)
    model = checkpoint.load(make("mistral", tie_word_embeddings=True), torch.bfloat16)
    assert len(alive) == len(taken)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == taken
