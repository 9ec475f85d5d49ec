"""Models of mamba-ssm: its checkpoints, and its layers by our engine."""

import json

import pytest
import torch
import torch.nn.functional as F
from mambabench.backends import state as states
from mambabench.backends.native import export, read_config
from mambabench.harness.conformance import check_backend
from mambabench.harness.interfaces import MambabenchError, Unsupported
from mambabench.kernels.support import Support
from safetensors.torch import load_file


@pytest.fixture
def make(make_native):
    return make_native


def layer_by_hand(h, weights, ssm):
    """One Mamba-2 block of mamba-ssm on h [L, E], token by token."""
    heads, width, size, groups = weights["mixer.dt_bias"].numel(), ssm["headdim"], ssm["d_state"], ssm["ngroups"]
    inner, shared = heads * width, groups * size
    normed = F.rms_norm(h, h.shape[-1:], weights["norm.weight"], 1e-5)
    z, u, dt = (normed @ weights["mixer.in_proj.weight"].T).split((inner, inner + 2 * shared, heads), dim=-1)
    taps = weights["mixer.conv1d.weight"].shape[-1]
    padded = F.pad(u, (0, 0, taps - 1, 0))
    u = sum(padded[tap : tap + len(u)] * weights["mixer.conv1d.weight"][:, 0, tap] for tap in range(taps))
    u = F.silu(u + weights["mixer.conv1d.bias"])
    x, b, c = u.split((inner, shared, shared), dim=-1)
    x, b, c = x.view(-1, heads, width), b.view(-1, groups, size), c.view(-1, groups, size)
    dt = F.softplus(dt + weights["mixer.dt_bias"])
    state, out = h.new_zeros(heads, width, size), []
    for t in range(len(h)):
        for head in range(heads):
            group = head // (heads // groups)
            decay = torch.exp(-dt[t, head] * weights["mixer.A_log"][head].exp())
            state[head] = decay * state[head] + dt[t, head] * torch.outer(x[t, head], b[t, group])
            out.append(state[head] @ c[t, group] + weights["mixer.D"][head] * x[t, head])
    y = torch.stack(out).view(len(h), inner) * F.silu(z)
    y = F.rms_norm(y.view(len(h), groups, -1), (inner // groups,), None, 1e-5).flatten(1) * weights["mixer.norm.weight"]
    return h + y @ weights["mixer.out_proj.weight"].T


def logits_by_hand(ids, tensors, ssm):
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    h = tensors["backbone.embedding.weight"][ids]
    for layer in sorted({int(name.split(".")[2]) for name in tensors if ".layers." in name}):
        prefix = f"backbone.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        h = layer_by_hand(h, own, ssm)
    normed = F.rms_norm(h, h.shape[-1:], tensors["backbone.norm_f.weight"], 1e-5)
    return normed @ tensors["backbone.embedding.weight"].T


@pytest.mark.parametrize("changes", [{}, {"ngroups": 2}, {"headdim": 16, "d_state": 4, "d_conv": 3}])
def test_logits_are_those_of_the_recurrence_written_down(make, teacher_backend, tmp_path, changes):
    folder, tensors, ssm = make(**changes)
    teacher_backend.convert(folder, [], tmp_path / "ours", seed=0)
    ids = torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    wanted = torch.stack([logits_by_hand(row, tensors, ssm) for row in ids])
    model = teacher_backend.module(tmp_path / "ours").double()
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-9, atol=1e-9)
    stepper = teacher_backend.load(tmp_path / "ours", "cpu", "float64")
    state = stepper.open(2, 21, 5)
    said = [stepper.prefill(ids[:, :6], torch.tensor([6, 6], dtype=torch.int32), state).unsqueeze(1)]
    for first in range(6, 21, 5):
        start = torch.tensor([first, first], dtype=torch.int32)
        said.append(stepper.advance(ids[:, first : first + 5], start, state))
    torch.testing.assert_close(torch.cat(said, 1), wanted[:, 5:], rtol=1e-9, atol=1e-9)


def test_it_keeps_the_stepping_contract(make, teacher_backend, tmp_path):
    teacher_backend.convert(make()[0], [], tmp_path / "ours", seed=0)
    check_backend(teacher_backend, tmp_path / "ours", rounds=300)


@pytest.mark.parametrize("replay", [0, 17])
def test_it_keeps_the_contract_over_rings_of_what_goes_into_the_state(
    make, teacher_backend, tmp_path, monkeypatch, replay
):
    monkeypatch.setattr(states, "ring_supports", lambda *given: Support.yes())
    monkeypatch.setenv(states.VARIABLE, str(replay))
    teacher_backend.convert(make(ngroups=2)[0], [], tmp_path / "ours", seed=0)
    check_backend(teacher_backend, tmp_path / "ours", rounds=100)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_keep_it(make, teacher_backend, tmp_path):
    teacher_backend.convert(make(headdim=16, d_state=32)[0], [], tmp_path / "ours", seed=0)
    check_backend(teacher_backend, tmp_path / "ours", rounds=100, device="cuda:0", dtype="float32", tolerance=1e-4)


@pytest.mark.parametrize("pickled", [False, True])
def test_every_number_comes_back_as_it_was(make, teacher_backend, tmp_path, pickled):
    folder, tensors, _ = make(pickled=pickled)
    teacher_backend.convert(folder, [], tmp_path / "ours", seed=0)
    export(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert read_config(tmp_path / "back").to_dict() == read_config(folder).to_dict()
    assert teacher_backend.describe(folder)["parameters"] == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"layer": "Mamba1"}, "ssm_cfg.layer"), ({"rmsnorm": False}, "ssm_cfg.rmsnorm"), ({"depth": 1}, "ssm_cfg.depth")],
)
def test_what_is_not_served_is_refused_by_its_key(make, teacher_backend, tmp_path, changes, named):
    with pytest.raises(Unsupported, match=named):
        teacher_backend.convert(make(**changes)[0], [], tmp_path / "ours", seed=0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"n_layer": "4"}, "n_layer is '4'; it must be a whole number of at least 1"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, r"ssm_cfg\.headdim is 0; it must be a whole number"),
        ({"ssm_cfg": ["Mamba2"]}, "ssm_cfg is .*; it must be a table"),
    ],
)
def test_a_size_that_is_none_is_one_line_with_its_key(make, changes, line):
    folder = make()[0]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(MambabenchError, match=line):
        read_config(folder)


def test_hybrids_and_models_of_mamba_ssm_do_not_become_each_other(half, make, hybrid_backend, tmp_path):
    with pytest.raises(Unsupported, match="is no model of mamba-ssm"):
        export(half, tmp_path / "out")
    with pytest.raises(Unsupported, match="has no attention to trade"):
        hybrid_backend.convert(make()[0], [], tmp_path / "out", seed=0)
