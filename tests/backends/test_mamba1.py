"""Mamba-1 layers: how they begin, that they step, train, save and pad like the others, alone and beside them."""

from pathlib import Path

import pytest
import torch
from mambabench import Unsupported
from mambabench.backends.checkpoint import read_config
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend
from mambabench.backends.mamba1 import Mamba1
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.conformance import check_backend
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

BF16 = 0.02


@pytest.fixture(scope="module")
def backend() -> MambaBackend:
    return MambaBackend(MambaConfig())


@pytest.fixture(scope="module")
def mamba_half(llama: Path, backend: MambaBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attention and two Mamba-1 layers."""
    out = tmp_path_factory.mktemp("mamba-half") / "artifact"
    backend.convert(llama, [1, 3], out, seed=0)
    return out


@pytest.fixture(scope="module")
def mixed(half: Path, backend: MambaBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mamba-2, Mamba-1, Mamba-2, attention."""
    out = tmp_path_factory.mktemp("mixed") / "artifact"
    backend.convert(half, [3], out, seed=0)
    return out


@pytest.fixture(scope="module")
def pure(mamba_half: Path, backend: MambaBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mamba-1 alone, made in two steps."""
    out = tmp_path_factory.mktemp("pure-mamba") / "artifact"
    backend.convert(mamba_half, [], out, seed=0)
    return out


@pytest.fixture(params=["mamba_half", "mixed", "pure"])
def artifact(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def test_mixers_are_those_that_were_asked_for(mixed: Path, pure: Path, backend: MambaBackend) -> None:
    assert backend.describe(mixed)["mixers"] == ["mamba2", "mamba", "mamba2", "attention"]
    assert backend.describe(pure)["mixers"] == ["mamba"] * 4


def test_projections_are_inherited_and_the_rest_is_s4d(llama: Path, mamba_half: Path) -> None:
    old, new = load_file(llama / "model.safetensors"), load_file(mamba_half / "model.safetensors")
    for index in (0, 2):
        layer = {n.rpartition("mamba.")[2]: t for n, t in new.items() if f".{index}.mamba." in n}
        z, x, b, c, low = layer["in_proj.weight"].split((32, 16, 16, 32, 2))
        for part, name in ((x, "v"), (b, "k"), (c, "q")):
            assert torch.equal(part, old[f"model.layers.{index}.self_attn.{name}_proj.weight"])
        assert torch.equal(layer["out_proj.weight"], old[f"model.layers.{index}.self_attn.o_proj.weight"])
        assert max(z.abs().max(), low.abs().max()) <= 32**-0.5
        assert layer["dt_proj.weight"].shape == (32, 2)
        assert layer["dt_proj.weight"].abs().max() <= 2**-0.5
        assert torch.equal(layer["A_log"], torch.arange(1, 9).double().log().float().expand(32, 8))
        assert torch.equal(layer["D"], torch.ones(32))
        dts = torch.nn.functional.softplus(layer["dt_bias"])
        assert ((dts > 0.99e-3) & (dts < 0.101)).all()


@pytest.mark.parametrize("width", [8, 32])
def test_a_layer_without_decay_and_gate_is_linear_attention(width: int, make_llama, tmp_path: Path) -> None:
    """Summed over a head's sub-blocks, scores and values included, which is what pairs them with the teacher's."""
    folder = make_llama(head_dim=width)
    backend = MambaBackend(MambaConfig(conv="identity", activation="none"))
    backend.convert(folder, [], tmp_path / "pure", seed=0)
    mixer = backend.module(tmp_path / "pure").model.layers[0].mamba
    attention = LlamaForCausalLM.from_pretrained(folder).model.layers[0].self_attn
    size = min(16, width)
    h = torch.randn(1, 7, 32)
    with torch.no_grad():
        mixer.dt_bias.fill_(0.541324854612918)
        mixer.dt_proj.weight.zero_()
        mixer.A_log.fill_(-1e4)
        mixer.D.zero_()
        scanned: list[torch.Tensor] = []
        mixer._gated = lambda y, z: scanned.append(y) or z
        mixer(h, None, None, None, None)
        q = attention.q_proj(h).view(7, 4, -1, size)
        k, v = (p(h).view(7, 2, -1, size).repeat_interleave(2, dim=1) for p in (attention.k_proj, attention.v_proj))
        scores = torch.einsum("thbn,shbn->hbts", q, k).tril()
        want = torch.einsum("hbts,shbp->thbp", scores, v)
    torch.testing.assert_close(scanned[0][0], want.reshape(7, -1), rtol=1e-4, atol=1e-5)


def test_released_layers_pair_sub_blocks_in_their_own_order_and_add_the_bias_twice(make_llama) -> None:
    """Sub-block i of all heads reads sub-block i // 2 of all KV heads, as the released code repeats them."""
    config = read_config(make_llama(head_dim=32))
    config.mamba_sub_blocks, config.mamba_dt_bias = "released", "twice"
    mixer = Mamba1(config)
    mixer.initialise()
    t = torch.arange(2 * 32).float().view(1, 1, -1)
    assert torch.equal(mixer._repeat(t).view(-1, 16), t.view(-1, 16).repeat_interleave(2, dim=0))
    h = torch.randn(1, 9, 32)
    released = mixer(h, None, None, None, None)
    mixer.twice = False
    mixer.dt_bias.data.mul_(2)
    torch.testing.assert_close(mixer(h, None, None, None, None), released)


def test_a_hybrid_of_all_three_mixers_keeps_the_stepping_contract_for_a_thousand_rounds(mixed: Path) -> None:
    check_backend("mamba", mixed, rounds=1000)


def test_a_hybrid_with_mamba1_keeps_the_stepping_contract_for_a_thousand_rounds(mamba_half: Path) -> None:
    check_backend("mamba", mamba_half, rounds=1000, seed=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", BF16)])
def test_lower_precision_keeps_it_within_rounding(dtype: str, tolerance: float, artifact: Path) -> None:
    check_backend("mamba", artifact, rounds=25, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("options", [{"d_conv": 1}, {"d_conv": 3, "rope": "kept", "gate": "open"}])
def test_any_form_keeps_the_stepping_contract(kv_heads: int, options: dict, make_llama, tmp_path: Path) -> None:
    backend = MambaBackend(MambaConfig(**options))
    backend.convert(make_llama(num_key_value_heads=kv_heads, head_dim=32), [2], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=15, seed=4)


def test_shapes_need_not_depend_on_data(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        HybridStepper, "_check", lambda self, count, start, state, settle: (state.capacity, state.steps, False)
    )
    check_backend("mamba", mixed, rounds=40, seed=3)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_a_gpu_keeps_the_stepping_contract(dtype: str, tolerance: float, mixed: Path) -> None:
    check_backend("mamba", mixed, rounds=60, device="cuda:0", dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(artifact: Path, side: str, backend: MambaBackend) -> None:
    model = backend.module(artifact).double()
    ids, padding, other = some_ids(1, 11), some_ids(1, 6, seed=1), some_ids(1, 17, seed=2)
    rows = torch.cat((padding, ids) if side == "left" else (ids, padding), dim=1)
    mask = torch.ones(2, 17, dtype=torch.int64)
    part = slice(6, None) if side == "left" else slice(11)
    mask[0] = 0
    mask[0, part] = 1
    got = model(input_ids=torch.cat((rows, other)), attention_mask=mask).logits
    torch.testing.assert_close(got[0, part], model(input_ids=ids).logits[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], model(input_ids=other).logits[0], rtol=1e-9, atol=1e-9)


def test_it_trains_under_autocast(mixed: Path, backend: MambaBackend) -> None:
    model, ids = backend.module(mixed).train(), some_ids(2, 20)
    exact = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient(artifact: Path, backend: MambaBackend) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = backend.module(artifact).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=some_ids(2, 40), labels=some_ids(2, 40)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_saved_model_comes_back_bit_for_bit(artifact: Path, backend: MambaBackend, tmp_path: Path) -> None:
    model = backend.module(artifact)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    backend.save(model, tmp_path / "saved", like=artifact)
    for again in (backend.module(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert torch.equal(again(input_ids=some_ids(2, 9)).logits, model(input_ids=some_ids(2, 9)).logits)


def test_decays_are_never_below_fp32(mixed: Path, backend: MambaBackend) -> None:
    for model in (backend.module(mixed).bfloat16(), AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.bfloat16)):
        for name, parameter in model.named_parameters():
            kept = name.endswith(("A_log", "D", "dt_bias"))
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert model(input_ids=some_ids(2, 9)).logits.dtype == torch.bfloat16


def test_states_that_do_not_divide_a_head_are_refused(make_llama, backend: MambaBackend, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="head_dim: mamba layers have 16 states, which do not divide 24"):
        backend.convert(make_llama(head_dim=24), [1], tmp_path / "artifact", seed=0)


def test_an_old_form_of_layer_is_not_mixed_with_another(half: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="its mamba layers have d_conv 4, so d_conv = 3 cannot be added"):
        MambaBackend(MambaConfig(d_conv=3)).convert(half, [3], tmp_path / "artifact", seed=0)
    Mamba2HybridBackend(Mamba2HybridConfig()).convert(half, [3], tmp_path / "artifact", seed=0)


@pytest.mark.parametrize(("batch", "context", "steps"), [(1, 1, 1), (3, 17, 5)])
def test_what_is_held_is_what_open_takes(batch: int, context: int, steps: int, mixed: Path, backend) -> None:
    model = backend.load(mixed, "cpu", "float32")
    state, cost = model.open(batch, context, steps), model.cost(batch, context, steps)
    layers = [sum(tensor.nbytes for tensor in layer.tensors()) for layer in state.layers]
    assert (cost.held_state_bytes, cost.held_kv_bytes) == (sum(layers[:3]), layers[3])
