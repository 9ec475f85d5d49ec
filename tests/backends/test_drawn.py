"""Models without weights on disk: a shape, and random numbers where it is loaded."""

import dataclasses

import pytest
import torch
from mambabench.backends.hf import HfBackend
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend
from mambabench.backends.peer_mamba import MambaSsmBackend
from mambabench.backends.plugin import HfConfig, Mamba2HybridConfig, MambaConfig, MambaSsmConfig, ShrunkConfig
from mambabench.backends.shrunk import ShrunkBackend
from mambabench.decoders.standard import StandardDecoder
from mambabench.distillers.random_configs import RandomMambaConfig, RandomTeacherConfig
from mambabench.distillers.random_mamba import RandomMamba
from mambabench.distillers.random_teacher import RandomTeacher
from mambabench.harness.interfaces import Job, Limits, MambabenchError, Prompt, silent

SHAPE = RandomTeacherConfig(
    layers=4, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=300, context=128, weights="drawn"
)
MAMBA = RandomMambaConfig(layers=2, hidden=32, vocabulary=300, states=8, head_dim=16, weights="drawn")


@pytest.fixture
def make(tmp_path):
    def make(distiller, backend, name="drawn"):
        (tmp_path / f"{name}-scratch").mkdir()
        job = Job(
            seed=3, device="cpu", data={}, models={}, teacher=None, parent=None, backend=backend,
            scratch=tmp_path / f"{name}-scratch", out=tmp_path / name, emit=silent,
        )  # fmt: skip
        distiller.train(job)
        return tmp_path / name

    return make


def text_of(backend, folder):
    model = backend.load(folder, "cpu", "float32")
    return StandardDecoder().generate(model, [Prompt((5, 6, 7))], Limits(new_tokens=6), silent)[0].ids


@pytest.mark.parametrize("kind", ["mamba2", "mamba", "shrunk"])
def test_a_shape_is_converted_without_a_number_on_disk(make, teacher_backend, tmp_path, kind):
    teacher = make(RandomTeacher(SHAPE), teacher_backend)
    backend = {
        "mamba2": Mamba2HybridBackend(Mamba2HybridConfig()),
        "mamba": MambaBackend(MambaConfig()),
        "shrunk": ShrunkBackend(ShrunkConfig()),
    }[kind]
    backend.convert(teacher, [0, 3], tmp_path / "out", seed=0)
    assert not [path for folder in (teacher, tmp_path / "out") for path in folder.glob("*.safetensors")]
    model = backend.module(tmp_path / "out")
    described = backend.describe(tmp_path / "out")
    assert described["parameters"] == sum(p.numel() for p in model.parameters())
    assert described["attention_layers"] == ([0, 1] if kind == "shrunk" else [0, 3])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert text_of(backend, tmp_path / "out") == text_of(backend, tmp_path / "out")


def test_what_is_stored_of_the_same_options_has_the_same_sizes(make, teacher_backend):
    stored = make(RandomTeacher(dataclasses.replace(SHAPE, weights="stored")), teacher_backend, "stored")
    drawn = make(RandomTeacher(SHAPE), teacher_backend)
    assert teacher_backend.describe(stored) == teacher_backend.describe(drawn)
    for folder in (stored, drawn):
        weight = teacher_backend.module(folder).state_dict()["model.layers.1.mlp.up_proj.weight"]
        assert weight.std().item() == pytest.approx(SHAPE.init, rel=0.1)


def test_transformers_draws_its_own(make, teacher_backend, tmp_path):
    backend = HfBackend(HfConfig())
    backend.convert(make(RandomTeacher(SHAPE), teacher_backend), [], tmp_path / "peer", seed=0)
    assert len(text_of(backend, tmp_path / "peer")) == 6
    assert backend.describe(tmp_path / "peer")["attention_layers"] == [0, 1, 2, 3]


def test_models_of_mamba_ssm_are_drawn_too(make, teacher_backend, tmp_path):
    ours = make(RandomMamba(MAMBA), teacher_backend)
    assert len(text_of(teacher_backend, ours)) == 6
    peer = MambaSsmBackend(MambaSsmConfig())
    peer.convert(ours, [], tmp_path / "peer", seed=0)
    assert peer.describe(tmp_path / "peer")["parameters"] == teacher_backend.describe(ours)["parameters"]
    with pytest.raises(ValueError, match="goes with mamba2 layers"):
        dataclasses.replace(MAMBA, layer="mamba1")


def test_a_trained_one_has_its_weights(make, teacher_backend, tmp_path):
    drawn = make(RandomTeacher(SHAPE), teacher_backend)
    module = teacher_backend.module(drawn)
    teacher_backend.save(module, tmp_path / "saved", like=drawn)
    back = teacher_backend.module(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in module.state_dict().items())


def test_a_file_that_says_no_seed_is_one_line(make, teacher_backend):
    drawn = make(RandomTeacher(SHAPE), teacher_backend)
    (drawn / "random.json").write_text("{}")
    with pytest.raises(MambabenchError, match=r"random\.json: must have a whole number `seed`"):
        teacher_backend.load(drawn, "cpu", "float32")
