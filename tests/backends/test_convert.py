"""A hybrid begins as its parent with some attention traded, and nothing is guessed about a folder that is not whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambabench import MambabenchError, Unsupported
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the Llama with tensors or config changed."""

    def make(change: Callable[[dict], object] = lambda tensors: None, **config: object) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(llama, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | config))
        return folder

    return make


def test_projections_are_inherited_and_the_rest_is_the_parent_s(
    llama: Path, half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    old, new = load_file(llama / "model.safetensors"), load_file(half / "model.safetensors")
    for index in (0, 2):
        z, x, b, c, dt = new[f"model.layers.{index}.mamba.in_proj.weight"].split((32, 16, 16, 32, 4))
        for part, name in ((x, "v"), (b, "k"), (c, "q")):
            assert torch.equal(part, old[f"model.layers.{index}.self_attn.{name}_proj.weight"])
        out = new[f"model.layers.{index}.mamba.out_proj.weight"]
        assert torch.equal(out, old[f"model.layers.{index}.self_attn.o_proj.weight"])
        assert max(z.abs().max(), dt.abs().max()) <= 32**-0.5
        dts = torch.nn.functional.softplus(new[f"model.layers.{index}.mamba.dt_bias"])
        assert (dts > 0.99e-3).all()
        assert (dts < 0.101).all()
        decays = new[f"model.layers.{index}.mamba.A_log"].exp()
        assert (decays >= 1).all()
        assert (decays <= 16).all()
    same = [name for name in old if ".0.self_attn." not in name and ".2.self_attn." not in name]
    assert all(torch.equal(old[name], new[name]) for name in same)
    assert len(new) == len(same) + 2 * 8
    described = hybrid_backend.describe(half)
    assert described["attention_layers"] == [1, 3]
    assert described["parameters"] == sum(p.numel() for p in hybrid_backend.module(half).parameters())
    assert described["weight_bytes"] == 4 * described["parameters"]


def test_new_weights_depend_on_the_seed_and_the_layer_alone(
    llama: Path, half: Path, hybrid_backend: Mamba2HybridBackend, tmp_path: Path
) -> None:
    for name, keep, seed in (("again", [1, 3], 0), ("more", [], 0), ("other", [1, 3], 1)):
        hybrid_backend.convert(llama, keep, tmp_path / name, seed)
    name = "model.layers.2.mamba.in_proj.weight"
    first, again, more, other = (
        load_file(path / "model.safetensors")[name]
        for path in (half, tmp_path / "again", tmp_path / "more", tmp_path / "other")
    )
    assert torch.equal(first, again)
    assert torch.equal(first, more)
    assert not torch.equal(first, other)


def test_a_student_is_a_parent_too(half: Path, hybrid_backend: Mamba2HybridBackend, tmp_path: Path) -> None:
    hybrid_backend.convert(half, [3], tmp_path / "quarter", seed=5)
    old, new = (load_file(path / "model.safetensors") for path in (half, tmp_path / "quarter"))
    assert hybrid_backend.describe(tmp_path / "quarter")["attention_layers"] == [3]
    assert all(torch.equal(old[name], new[name]) for name in old if ".1.self_attn." not in name)
    with pytest.raises(Unsupported, match=r"layer 0 cannot keep attention, it has none; layers with it: \[1, 3\]"):
        hybrid_backend.convert(half, [0], tmp_path / "wrong", seed=0)


def test_a_layer_without_decay_and_gate_is_linear_attention(
    llama: Path, hybrid_backend: Mamba2HybridBackend, tmp_path: Path
) -> None:
    """With open gate, identity convolution, dt = 1 and no decay, y = (Q K^T masked) V: the copied rows are aligned."""
    hybrid_backend.convert(llama, [], tmp_path / "pure", seed=0)
    mixer = hybrid_backend.module(tmp_path / "pure").model.layers[0].mamba
    attention = LlamaForCausalLM.from_pretrained(llama).model.layers[0].self_attn
    h = torch.randn(1, 7, 32)
    with torch.no_grad():
        mixer.conv1d.weight.zero_()
        mixer.conv1d.weight[:, 0, -1] = 1
        mixer.conv1d.bias.zero_()
        mixer.dt_bias.fill_(0.541324854612918)
        mixer.in_proj.weight[-4:] = 0
        mixer.A_log.fill_(-1e4)
        mixer.D.zero_()
        scanned: list[torch.Tensor] = []
        mixer._gated = lambda y, z: scanned.append(y) or z
        mixer(h, None, None, None, None)
        silu = torch.nn.functional.silu
        q = silu(attention.q_proj(h)).view(7, 4, 8)
        k, v = (silu(p(h)).view(7, 2, 8).repeat_interleave(2, dim=1) for p in (attention.k_proj, attention.v_proj))
        scores = torch.einsum("thn,shn->hts", q, k).tril()
        want = torch.einsum("hts,shp->thp", scores, v)
    torch.testing.assert_close(scanned[0][0], want, rtol=1e-4, atol=1e-5)


def test_a_teacher_s_weights_are_not_copied(llama: Path, teacher_backend: TeacherBackend, tmp_path: Path) -> None:
    teacher_backend.convert(llama, [], tmp_path / "teacher", seed=0)
    one, two = llama / "model.safetensors", tmp_path / "teacher" / "model.safetensors"
    assert one.samefile(two)
    with pytest.raises(Unsupported, match="keeps attention in all 4 layers"):
        teacher_backend.convert(llama, [0, 2], tmp_path / "wrong", seed=0)


def test_a_folder_of_symbolic_links_is_taken_whole(
    llama: Path, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    """As a hub cache has them: snapshots of relative links to blobs."""
    blobs, snapshot, out = tmp_path / "blobs", tmp_path / "snapshots" / "main", tmp_path / "far" / "from" / "there"
    shutil.copytree(llama, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../..") / "blobs" / blob.name)
    teacher_backend.convert(snapshot, [], out, seed=0)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "model.safetensors").samefile(blobs / "model.safetensors")
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(teacher_backend.module(out)(ids).logits, teacher_backend.module(llama)(ids).logits)


def test_a_sharded_folder_is_read_whole(llama: Path, teacher_backend: TeacherBackend, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    shutil.copyfile(llama / "tokenizer.json", tmp_path / "sharded" / "tokenizer.json")
    teacher_backend.convert(tmp_path / "sharded", [], tmp_path / "artifact", seed=0)
    ids = torch.arange(20).unsqueeze(0)
    whole, sharded = (teacher_backend.module(path)(input_ids=ids).logits for path in (llama, tmp_path / "artifact"))
    assert torch.equal(whole, sharded)
    missing = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[0]
    missing.unlink()
    with pytest.raises(MambabenchError, match=f"{missing.name}: the file is missing, but the index names it"):
        teacher_backend.convert(tmp_path / "sharded", [], tmp_path / "again", seed=0)


NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"model\.safetensors: tensor {NAME} \[48, 32\] is missing"),
        (
            lambda t: t.update({NAME: torch.zeros(48, 31)}),
            rf"model\.safetensors: tensor {NAME} has shape \[48, 31\], config\.json asks for \[48, 32\]",
        ),
        (
            lambda t: t.update({"model.layers.4.extra": torch.zeros(1)}),
            r"model\.safetensors: tensor model\.layers\.4\.extra belongs to no part of the model",
        ),
    ],
    ids=["missing", "shape", "left over"],
)
def test_a_tensor_that_is_not_right_is_named(
    change: Callable[[dict], object],
    message: str,
    broken: Callable[..., Path],
    teacher_backend: TeacherBackend,
    hybrid_backend: Mamba2HybridBackend,
    tmp_path: Path,
) -> None:
    folder = broken(change)
    for action in (
        lambda: teacher_backend.convert(folder, [], tmp_path / "one", seed=0),
        lambda: hybrid_backend.convert(folder, [1], tmp_path / "two", seed=0),
        lambda: teacher_backend.load(folder, "cpu", "float32"),
    ):
        with pytest.raises(MambabenchError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()


def test_other_families_are_refused_by_name(
    broken: Callable[..., Path], hybrid_backend: Mamba2HybridBackend, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=r"config\.json: model_type 'gpt2' is not served; known are llama"):
        hybrid_backend.convert(broken(model_type="gpt2"), [], tmp_path / "out", seed=0)


def test_a_folder_without_a_model_says_so(teacher_backend: TeacherBackend, tmp_path: Path) -> None:
    with pytest.raises(MambabenchError, match=r"no config\.json; a model is a transformers folder"):
        teacher_backend.describe(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MambabenchError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        teacher_backend.describe(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(MambabenchError, match=r"model\.safetensors: not a whole safetensors file"):
        teacher_backend.describe(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: not JSON"),
        ("[]", r"config\.json: not a JSON object"),
        (
            '{"model_type": "llama", "hidden_size": "wide"}',
            r"config\.json: describes no model .*'hidden_size' expected int, got str",
        ),
        ('{"model_type": "llama", "hidden_act": "gelu"}', r"config\.json: hidden_act: 'gelu' is not served"),
        ('{"model_type": "mambabench_hybrid", "mixers": ["rwkv"]}', r"no mixer is called 'rwkv'; known are attention"),
        ('{"model_type": "llama", "num_key_value_heads": 3}', r"3 does not divide num_attention_heads = 32"),
    ],
)
def test_a_config_that_is_not_right_is_one_line(
    text: str, message: str, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MambabenchError, match=message) as caught:
        teacher_backend.describe(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_llama_of_transformers_is_saved_as_a_model_of_ours(
    llama: Path, teacher_backend: TeacherBackend, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    teacher_backend.save(model, tmp_path / "saved", like=llama)
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(teacher_backend.module(tmp_path / "saved")(input_ids=ids).logits, model(ids).logits)
