"""mamba-ssm's own models as a row: its format in and out, and a loop that is its own."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mambabench.backends.peer_mamba import MambaSsmBackend, MambaSsmStepper, build
from mambabench.backends.plugin import MambaSsmConfig
from mambabench.decoders.standard import StandardDecoder
from mambabench.distillers.random_configs import RandomMambaConfig
from mambabench.distillers.random_mamba import RandomMamba
from mambabench.harness.interfaces import Job, Limits, MambabenchError, Prompt, Unsupported, silent
from mambabench.harness.plugins import registry
from torch import nn

SIZES = {"layers": 2, "hidden": 32, "vocabulary": 300, "states": 8, "head_dim": 16}


@pytest.fixture
def peer():
    return MambaSsmBackend(MambaSsmConfig())


@pytest.fixture
def drawn(tmp_path):
    """drawn(backend, **sizes): a random model as an artifact of a backend."""

    def draw(backend, name="drawn", **sizes):
        (tmp_path / f"{name}-scratch").mkdir()
        job = Job(
            seed=0, device="cpu", data={}, models={}, teacher=None, parent=None, backend=backend,
            scratch=tmp_path / f"{name}-scratch", out=tmp_path / name, emit=silent,
        )  # fmt: skip
        RandomMamba(RandomMambaConfig(**(SIZES | sizes))).train(job)
        return tmp_path / name

    return draw


class Loop(nn.Module):
    """Stands for mamba-ssm's model: the next token is the last one's double, modulo the vocabulary."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(2, 11, bias=False)
        self.asked = []

    def generate(self, ids, max_length, **options):
        self.asked.append((max_length - ids.shape[1], options))
        while ids.shape[1] < max_length:
            ids = torch.cat([ids, ids[:, -1:] * 2 % 11], dim=1)
        return ids

    def forward(self, ids):
        return SimpleNamespace(logits=nn.functional.one_hot(ids * 2 % 11, 11).float())


@pytest.fixture
def stepper():
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids, skip_special_tokens=False: " ".join(map(str, ids)))
    return MambaSsmStepper(Loop(), tokenizer, "cpu", "float32")


def test_a_random_model_is_one_model_in_both_backends(drawn, peer, teacher_backend, tmp_path):
    ours = drawn(teacher_backend, dtype="float32")
    peer.convert(ours, [], tmp_path / "theirs", seed=0)
    sizes, own = (dict(of) for of in (peer.describe(tmp_path / "theirs"), teacher_backend.describe(ours)))
    assert (sizes.pop("mixers"), own.pop("mixers")) == (["Mamba2"], ["mamba2"] * 2)
    assert sizes == own
    teacher_backend.convert(tmp_path / "theirs", [], tmp_path / "back", seed=0)
    before, after = (teacher_backend.module(folder).state_dict() for folder in (ours, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert peer.tokenizer(tmp_path / "theirs").decode([70]) == teacher_backend.tokenizer(ours).decode([70])


def test_the_peer_takes_mamba_1_too_and_our_engine_says_who_does(drawn, peer, teacher_backend):
    sizes = peer.describe(drawn(peer, layer="mamba1"))
    assert (sizes["layers"], sizes["mixers"]) == (2, ["Mamba1"])
    with pytest.raises(Unsupported, match="backend mamba-ssm"):
        drawn(teacher_backend, "ours", layer="mamba1")


def test_it_needs_the_package_and_a_gpu(drawn, peer):
    assert registry().find("backend", "mamba-ssm").requires == ("mamba-ssm>=2.2",)
    folder = drawn(peer)
    with pytest.raises(Unsupported, match="CUDA devices alone"):
        peer.load(folder, "cpu", "float32")
    for refused in (lambda: peer.module(folder), lambda: peer.save(nn.Linear(1, 1), folder, folder)):
        with pytest.raises(Unsupported, match="trains nothing"):
            refused()


def test_every_tensor_is_given_to_mamba_ssm_s_model(drawn, peer, monkeypatch):
    given = {}

    class Model(nn.Module):
        def __init__(self, config, device, dtype):
            super().__init__()
            given.update(config=config, device=device, dtype=dtype)

        def load_state_dict(self, tensors):
            given["tensors"] = tensors

    for name, content in (
        ("mixer_seq_simple", {"MambaLMHeadModel": Model}),
        ("config_mamba", {"MambaConfig": lambda **raw: raw}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"mamba_ssm.models.{name}", module)
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.models", ModuleType("mamba_ssm.models"))
    build(drawn(peer), "cpu", torch.bfloat16)
    assert given["config"]["ssm_cfg"] == {"d_state": 8, "layer": "Mamba2", "headdim": 16}
    assert given["config"]["vocab_size"] == 304
    assert torch.equal(given["tensors"]["lm_head.weight"], given["tensors"]["backbone.embedding.weight"])
    assert given["tensors"]["backbone.layers.1.mixer.in_proj.weight"].shape == (2 * 64 + 2 * 8 + 4, 32)


def test_without_the_package_one_line_says_so(drawn, peer, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(Unsupported, match="backend mamba-ssm: cannot be imported here"):
        build(drawn(peer), "cpu", torch.float32)


def test_its_loop_is_timed_as_two_bursts_and_cut_at_the_end(stepper):
    records = []
    prompts = [Prompt((3, 1)), Prompt((4, 5))]
    limits = Limits(new_tokens=6, stop_tokens=(4,))
    answers = StandardDecoder().generate(stepper, prompts, limits, lambda kind, **of: records.append((kind, of)))
    assert [answer.ids for answer in answers] == [(2, 4), (10, 9, 7, 3, 6, 1)]
    assert [answer.finish for answer in answers] == ["stop", "length"]
    assert [(kind, of["row"], of["burst"], of["tokens"]) for kind, of in records] == [
        ("burst", 0, 0, 1), ("burst", 1, 0, 1), ("burst", 0, 1, 5), ("burst", 1, 1, 5),
    ]  # fmt: skip
    assert stepper.model.asked == [(1, {"top_k": 1, "cg": False}), (6, {"top_k": 1, "cg": False})]


def test_it_samples_with_its_own_filters(stepper):
    stepper.generate([Prompt((3,))], Limits(new_tokens=1, temperature=0.5, top_p=0.9), silent)
    assert stepper.model.asked == [(1, {"top_k": 0, "top_p": 0.9, "temperature": 0.5, "cg": False})]


def test_scores_are_its_forward_s(stepper):
    scores = stepper.score(torch.tensor([[3, 6, 1, 5]]), torch.tensor([4], dtype=torch.int32))
    assert scores.greedy.tolist() == [[True, True, False]]
    assert scores.gap.tolist() == [[0, 0, 1]]


def test_what_it_does_not_do_is_refused(stepper):
    with pytest.raises(Unsupported, match="prompts of one length"):
        stepper.generate([Prompt((1,)), Prompt((1, 2))], Limits(new_tokens=1), silent)
    with pytest.raises(MambabenchError, match="at least one token"):
        stepper.generate([Prompt(())], Limits(new_tokens=1), silent)
    with pytest.raises(Unsupported, match="rolls nothing back"):
        stepper.open(1, 1, 1)
