"""Checkpoints of MambaInLlama and Mamba2InLlama come in and go out tensor for tensor, and run with their quirks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from mambabench import MambabenchError, Unsupported
from mambabench.backends import released
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig
from mambabench.harness.cli import cli
from mambabench.harness.conformance import check_backend
from safetensors.torch import load_file, save_file

INNER, SHARED, HIDDEN, HEADS, WIDTH = 64, 32, 64, 2, 32
MAMBA2 = {
    "in_proj.weight": (2 * INNER + 2 * SHARED + HEADS, HIDDEN),
    "conv1d.weight": (INNER + 2 * SHARED, 1, 4),
    "conv1d.bias": (INNER + 2 * SHARED,),
    "dt_bias": (HEADS,),
    "A_log": (HEADS,),
    "D": (HEADS,),
    "norm.weight": (INNER,),
    "out_proj.weight": (HIDDEN, INNER),
}
MAMBA = {
    "in_proj_x.weight": (SHARED, HIDDEN),
    "in_proj_z.weight": (INNER, HIDDEN),
    "B_proj.weight": (SHARED, HIDDEN),
    "C_proj.weight": (INNER, HIDDEN),
    "dt_proj_down.weight": (4, HIDDEN),
    "dt_proj.weight": (INNER, 4),
    "dt_proj.bias": (INNER,),
    "conv1d.weight": (INNER, 1, 4),
    "conv1d.bias": (INNER,),
    "A_log": (INNER, 16),
    "D": (INNER,),
    "out_proj.weight": (HIDDEN, INNER),
}
"""Names and shapes of a layer, for heads of 32 that share one KV head, so that sub-blocks of 16 are paired wrongly."""
KINDS = ["mamba", "mamba2"]

Make = Callable[..., Path]


@pytest.fixture
def make(make_llama: Make, tmp_path: Path) -> Make:
    """A released folder of four layers, of which 1 and 3 have attention; keywords change mamba_config.json."""

    def folder(kind: str, change: Callable[[dict], object] = lambda tensors: None, **settings: object) -> Path:
        out = make_llama(
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            head_dim=WIDTH,
            tie_word_embeddings=False,
        )
        torch.manual_seed(1)
        tensors = load_file(out / "model.safetensors")
        for layer in (0, 2):
            prefix = f"model.layers.{layer}"
            for name in [name for name in tensors if name.startswith(f"{prefix}.self_attn.")]:
                del tensors[name]
            for name, shape in (MAMBA2 if kind == "mamba2" else MAMBA).items():
                tensors[f"{prefix}.mamba.{name}"] = 0.3 * torch.randn(shape) - (2 if "dt" in name else 0)
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        ssm = {"expand": 1, "ngroups": HEADS, "d_state": WIDTH} if kind == "mamba2" else {"expand": 1}
        written = {"d_model": HIDDEN, "ssm_cfg": ssm, "rms_norm_eps": 1e-6, "vocab_size": None, "d_xb": SHARED}
        written |= {"intermediate_size": 48, "hidden_act": "silu", "n_layer": 4, "attn_layers": [1, 3]}
        (out / released.SETTINGS).write_text(json.dumps(written | settings))
        return out

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_in_and_goes_out_tensor_for_tensor(
    kind: str, make: Make, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    folder = make(kind)
    assert teacher_backend.describe(folder)["attention_layers"] == [1, 3]
    teacher_backend.convert(folder, range(4), tmp_path / "in", seed=0)
    assert teacher_backend.describe(tmp_path / "in")["mixers"] == [kind, "attention"] * 2
    released.export(tmp_path / "in", tmp_path / "out", teacher="its teacher")
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype
        assert torch.equal(tensor, new[name]), name
    settings = [json.loads((path / released.SETTINGS).read_text()) for path in (folder, tmp_path / "out")]
    for key in ("attn_layers", "d_model", "d_xb", "n_layer", "intermediate_size"):
        assert settings[0][key] == settings[1][key]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_name_or_path"] == "its teacher"
    teacher_backend.convert(tmp_path / "out", range(4), tmp_path / "again", seed=0)
    again, first = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "in"))
    assert again.keys() == first.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_it_may_be_a_file_of_pytorch_s_own(
    kind: str, make: Make, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    folder = make(kind)
    teacher_backend.convert(folder, range(4), tmp_path / "in", seed=0)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    teacher_backend.convert(folder, range(4), tmp_path / "pickled", seed=0)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "pickled"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_no_parent_before_it_is_taken(
    make: Make, teacher_backend: TeacherBackend, hybrid_backend: Mamba2HybridBackend, tmp_path: Path
) -> None:
    folder = make("mamba2")
    with pytest.raises(Unsupported, match=r'it has mamba_config\.json\) is taken whole, with use = "teacher"'):
        hybrid_backend.convert(folder, [3], tmp_path / "out", seed=0)
    teacher_backend.convert(folder, [], tmp_path / "in", seed=0)
    hybrid_backend.convert(tmp_path / "in", [3], tmp_path / "out", seed=0)
    assert hybrid_backend.describe(tmp_path / "out")["attention_layers"] == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_stepping_contract(kind: str, make: Make, teacher_backend: TeacherBackend, tmp_path: Path) -> None:
    teacher_backend.convert(make(kind), [1, 3], tmp_path / "in", seed=0)
    check_backend(teacher_backend, tmp_path / "in", rounds=40)


def loop(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The causal convolution and SiLU of [L, E]."""
    padded = F.pad(u.T, (3, 0)).unsqueeze(0)
    return F.silu(F.conv1d(padded, weight, bias, groups=u.shape[1])[0].T)


def released_mamba2(t: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    """The layer as its paper and code describe it, token by token (facts of the released implementation)."""
    z, xbc, dt = (h @ t["in_proj.weight"].T).split((INNER, INNER + 2 * SHARED, HEADS), dim=-1)
    x, b, c = loop(xbc, t["conv1d.weight"], t["conv1d.bias"]).split((SHARED, SHARED, INNER), dim=-1)
    x, b = (part.view(-1, 1, WIDTH).repeat_interleave(HEADS, dim=1) for part in (x, b))
    c, dt, a = c.view(-1, HEADS, WIDTH), F.softplus(dt + t["dt_bias"]), -t["A_log"].exp()
    state, rows = torch.zeros(HEADS, WIDTH, WIDTH, dtype=h.dtype), []
    for s in range(len(h)):
        step = dt[s, :, None, None]
        state = (step * a[:, None, None]).exp() * state + step * x[s, :, :, None] * b[s, :, None, :]
        rows.append((state * c[s, :, None, :]).sum(-1) + t["D"][:, None] * x[s])
    y = torch.stack(rows) * F.silu(z).view(-1, HEADS, WIDTH)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (y.flatten(1) * t["norm.weight"]) @ t["out_proj.weight"].T


def released_mamba(t: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    """The same of Mamba-1: the bias of dt twice, sub-block i of the heads reads sub-block i // 2 of the KV head."""
    x, z, b, c = (h @ t[f"{name}.weight"].T for name in ("in_proj_x", "in_proj_z", "B_proj", "C_proj"))
    x, b = (part.view(-1, SHARED // 16, 16).repeat_interleave(HEADS, dim=1) for part in (x, b))
    x, c = loop(x.flatten(1), t["conv1d.weight"], t["conv1d.bias"]), c.view(-1, INNER // 16, 16)
    b, c = (part.repeat_interleave(16, dim=1) for part in (b, c))
    dt = F.softplus(h @ t["dt_proj_down.weight"].T @ t["dt_proj.weight"].T + 2 * t["dt_proj.bias"])
    state, rows = torch.zeros(INNER, 16, dtype=h.dtype), []
    for s in range(len(h)):
        step = dt[s, :, None]
        state = (step * -t["A_log"].exp()).exp() * state + step * x[s, :, None] * b[s]
        rows.append((state * c[s]).sum(-1) + t["D"] * x[s])
    return (torch.stack(rows) * F.silu(z)) @ t["out_proj.weight"].T


LAYERS = {"mamba": released_mamba, "mamba2": released_mamba2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_the_released_layer_computes(
    kind: str, make: Make, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    folder = make(kind)
    teacher_backend.convert(folder, [], tmp_path / "in", seed=0)
    tensors, h = load_file(folder / "model.safetensors"), torch.randn(1, 9, HIDDEN, dtype=torch.float64)
    prefix = "model.layers.2.mamba."
    own = {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}
    model = teacher_backend.module(tmp_path / "in").double()
    cos, sin = model.model.rope(torch.arange(9).unsqueeze(0), h)
    with torch.no_grad():
        got = model.model.layers[2].mamba(h, cos, sin, None, None)[0]
    torch.testing.assert_close(got, LAYERS[kind](own, h[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_not_right_is_named(
    kind: str, make: Make, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    missing, left = "model.layers.2.mamba.conv1d.bias", "model.layers.1.mamba.D"
    for change, message in (
        (lambda t: t.pop(missing), rf"tensor {missing} \[\d+\] is missing"),
        (lambda t: t.update({left: torch.zeros(2)}), rf"tensor {left} belongs to no part of the model"),
    ):
        with pytest.raises(MambabenchError, match=message):
            teacher_backend.convert(make(kind, change), [], tmp_path / "in", seed=0)
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_xb": 64}, r"mamba_config\.json: d_xb is 64; a layer in the place of this attention has 32"),
        ({"n_layer": 5}, r"n_layer is 5; .* has 4"),
        ({"attn_layers": [4]}, r"attn_layers is \[4\]; it must be a list out of the layers 0 to 3"),
        ({"attn_layers": None}, r"mamba_config\.json: attn_layers is None; it must be a list"),
        ({"attn_layers": [[1]]}, r"mamba_config\.json: attn_layers is \[\[1\]\]; it must be a list"),
        ({"ssm_cfg": None}, r"mamba_config\.json: ssm_cfg is None; it must be an object"),
        (
            {"ssm_cfg": {"d_conv": "4"}},
            r"mamba_config\.json: ssm_cfg\.d_conv is '4'; it must be a whole number above 0",
        ),
        ({"d_model": "64"}, r"mamba_config\.json: d_model is '64'; .* has 64"),
        (
            {"attention_layers": [1]},
            r"mamba_config\.json: attention_layers is not served; known are d_model, .*, attn_l",
        ),
        ({"ssm_cfg": {"expand": 2, "ngroups": 2}}, r"ssm_cfg\.expand is 2; .* has 1"),
        ({"ssm_cfg": {"ngroups": 2, "repeat_kv_before_conv": True}}, r"repeat_kv_before_conv is True; .* has False"),
        ({"ssm_cfg": {"ngroups": 2, "D_has_hdim": True}}, r"ssm_cfg\.D_has_hdim is not served; known are d_state"),
    ],
)
def test_settings_that_are_not_served_are_named(
    settings: dict, message: str, make: Make, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    with pytest.raises(MambabenchError, match=message) as caught:
        teacher_backend.convert(make("mamba2", **settings), [], tmp_path / "in", seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{bad", "not JSON"), (b"[]", "not a JSON object"), (b'{"hidden_act": "\xe4"}', "not JSON")],
)
def test_settings_that_are_no_json_object_are_named(content: bytes, message: str, make: Make) -> None:
    folder = make("mamba2")
    (folder / released.SETTINGS).write_bytes(content)
    with pytest.raises(MambabenchError, match=rf"mamba_config\.json: {message}"):
        released.read_config(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "open"}, "mamba_gate_bias is True; released layers have False"),
        ({"norm": "none"}, "mamba_norm is none; released layers have gated"),
        ({"rope": "kept"}, "mamba_rope is True; released layers have False"),
        ({"activation": "none"}, "mamba_activation is none; released layers have silu"),
    ],
)
def test_what_the_format_cannot_say_is_not_exported(
    options: dict[str, str], message: str, llama: Path, tmp_path: Path
) -> None:
    Mamba2HybridBackend(Mamba2HybridConfig(**options)).convert(llama, [1], tmp_path / "model", seed=0)
    with pytest.raises(Unsupported, match=message):
        released.export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_mamba_layers_is_not_exported(
    llama: Path, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    teacher_backend.convert(llama, [], tmp_path / "teacher", seed=0)
    with pytest.raises(Unsupported, match="has no Mamba layers"):
        released.export(tmp_path / "teacher", tmp_path / "out")


def test_the_command_writes_a_new_folder_and_no_other(
    make: Make, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    teacher_backend.convert(make("mamba2"), [], tmp_path / "in", seed=0)
    runner = CliRunner()
    done = runner.invoke(cli, ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--teacher", "its teacher"])
    assert done.exit_code == 0, done.output
    assert released.read_config(tmp_path / "out").attention_layers == [1, 3]
    again = runner.invoke(cli, ["export", str(tmp_path / "in"), str(tmp_path / "out")])
    assert isinstance(again.exception, MambabenchError)
    assert "exists already; name a new folder" in str(again.exception)
