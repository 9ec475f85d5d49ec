"""Every option of new Mamba-2 layers means what it says, in each of the ways to run a layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mambabench import Unsupported
from mambabench.backends import released
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig
from mambabench.backends.rope import Rope, rotate
from mambabench.harness.conformance import check_backend
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

OPTIONS = [
    {"init": "random"},
    {"gate": "open"},
    {"conv": "identity"},
    {"activation": "none"},
    {"norm": "none"},
    {"rope": "kept"},
    {"q_scale": "attention"},
    {"skip": "none"},
    {"gate": "open", "conv": "identity", "activation": "none", "norm": "none", "rope": "kept", "q_scale": "attention"},
]
IDS = [
    "-".join(f"{name}-{value}" for name, value in options.items()) if len(options) < 3 else "all" for options in OPTIONS
]
LINEAR = {"gate": "open", "conv": "identity", "activation": "none", "norm": "none"}
"""Options with which a layer without decay is linear attention."""


@pytest.fixture
def made(llama: Path, tmp_path: Path) -> Callable[..., tuple[Mamba2HybridBackend, Path]]:
    """Two attention and two Mamba-2 layers with options."""

    def make(**options: str) -> tuple[Mamba2HybridBackend, Path]:
        backend, out = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, **options)), tmp_path / "artifact"
        backend.convert(llama, [1, 3], out, seed=0)
        return backend, out

    return make


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_every_option_keeps_the_stepping_contract(options: dict[str, str], made: Callable) -> None:
    check_backend(*made(**options), rounds=30)


@pytest.mark.gpu
def test_all_options_keep_the_stepping_contract_on_a_gpu(made: Callable) -> None:
    check_backend(*made(**OPTIONS[-1]), rounds=40, device="cuda:0")


def test_all_options_keep_the_stepping_contract_in_bf16(made: Callable) -> None:
    check_backend(*made(**OPTIONS[-1]), rounds=30, dtype="bfloat16", tolerance=0.02)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_no_option_lets_padding_in(options: dict[str, str], made: Callable) -> None:
    backend, artifact = made(**options)
    model = backend.module(artifact).double()
    ids = torch.arange(1, 12).unsqueeze(0)
    padded, mask = F.pad(ids, (5, 0), value=7), F.pad(torch.ones_like(ids), (5, 0))
    got = model(input_ids=padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rope", ["dropped", "kept"])
@pytest.mark.parametrize("q_scale", ["one", "attention"])
def test_a_layer_with_all_neutral_options_and_no_decay_is_linear_attention(
    rope: str, q_scale: str, llama: Path, made: Callable
) -> None:
    """(Q K^T / sqrt(d), masked) V W_O: what is missing of the attention is its softmax."""
    backend, artifact = made(rope=rope, q_scale=q_scale, **LINEAR)
    model = backend.module(artifact).double()
    mixer, attention = model.model.layers[0].mamba, LlamaForCausalLM.from_pretrained(llama).model.layers[0].self_attn
    attention, h = attention.double(), torch.randn(1, 7, 32, dtype=torch.float64)
    cos, sin = Rope(model.config)(torch.arange(7).unsqueeze(0), h)
    with torch.no_grad():
        mixer.dt_bias.fill_(torch.tensor(1.0, dtype=torch.float64).expm1().log())
        mixer.in_proj.weight[-4:] = 0
        mixer.A_log.fill_(-1e4)
        mixer.D.zero_()
        q, k = attention.q_proj(h).view(1, 7, 4, 8), attention.k_proj(h).view(1, 7, 2, 8)
        if rope == "kept":
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = attention.v_proj(h).view(7, 2, 8).repeat_interleave(2, dim=1)
        scores = torch.einsum("thn,shn->hts", q[0], k[0].repeat_interleave(2, dim=1)).tril()
        scores /= 8**0.5 if q_scale == "attention" else 1
        want = attention.o_proj(torch.einsum("hts,shp->thp", scores, v).flatten(1))
        got = mixer(h, cos, sin, None, None)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_without_a_skip_only_d_begins_elsewhere_and_the_model_can_be_exported(
    half: Path, made: Callable, tmp_path: Path
) -> None:
    _, artifact = made(skip="none")
    old, new = (load_file(path / "model.safetensors") for path in (half, artifact))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"model.layers.{index}.mamba.D" for index in (0, 2)}
    assert all(not new[name].any() for name in changed)
    released.export(artifact, tmp_path / "released")
    assert released.is_released(tmp_path / "released")


def test_random_initialisation_replaces_what_is_inherited_and_nothing_else(half: Path, made: Callable) -> None:
    _, artifact = made(init="random")
    old, new = (load_file(path / "model.safetensors") for path in (half, artifact))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    prefixes = [f"model.layers.{index}.mamba" for index in (0, 2)]
    assert changed == {f"{prefix}.{name}.weight" for prefix in prefixes for name in ("in_proj", "out_proj")}
    for prefix in prefixes:
        before, after = (t[f"{prefix}.in_proj.weight"].split((32, 64, 4)) for t in (old, new))
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[2], after[2])
        assert after[1].abs().max() <= 32**-0.5
        assert after[1].std() > 0.5 * 32**-0.5


def test_a_layer_cannot_join_layers_of_another_form(half: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"norm": "none"}, "its mamba layers have mamba_norm gated, so mamba_norm = none cannot be added"),
        ({"gate": "open"}, "its mamba layers have mamba_gate_bias False, so mamba_gate_bias = True cannot be added"),
    ):
        with pytest.raises(Unsupported, match=message):
            Mamba2HybridBackend(Mamba2HybridConfig(**options)).convert(half, [1], tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    "options",
    [{"dt_bias": "twice"}, {"sub_block_order": "released"}, {"dt_bias": "twice", "sub_block_order": "released"}],
)
def test_every_quirk_of_mamba1_keeps_the_stepping_contract(
    options: dict[str, str], make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    backend = MambaBackend(MambaConfig(**options))
    backend.convert(make_llama(head_dim=32), [1, 3], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=30)


def test_quirks_of_mamba1_are_in_the_model_and_change_no_weight(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    llama, tensors, logits = make_llama(head_dim=32), [], []
    for number, options in enumerate(({}, {"dt_bias": "twice"}, {"sub_block_order": "released"})):
        backend, out = MambaBackend(MambaConfig(**options)), tmp_path / str(number)
        backend.convert(llama, [1, 3], out, seed=0)
        tensors.append(load_file(out / "model.safetensors"))
        logits.append(backend.module(out)(input_ids=torch.arange(20).unsqueeze(0)).logits)
    for other in tensors[1:]:
        assert all(torch.equal(tensors[0][name], other[name]) for name in tensors[0])
    assert all((logits[0] - other).abs().max() > 1e-3 for other in logits[1:])
