"""The layers whose attention is worth most are found, and what finding them cost is said."""

import pytest
import torch
from mambabench.backends.hybrid import MambaBackend, RemovedBackend
from mambabench.backends.plugin import MambaConfig, RemovedConfig
from mambabench.distillers import kl_guided
from mambabench.distillers.kl_guided import KlGuided
from mambabench.distillers.losses import IGNORED, Divergence, shifted
from mambabench.distillers.plugin import KlGuidedConfig
from mambabench.distillers.windows import collate, read_windows
from mambabench.harness.interfaces import Artifact, MambabenchError
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def deep(teacher, hybrid, tmp_path_factory):
    """A teacher of four layers, of which only layer 2 has an attention that matters; and it without any attention."""
    folder, taken, none = (tmp_path_factory.mktemp(name) for name in ("llama", "deep", "none"))
    torch.manual_seed(0)
    words = teacher.backend.tokenizer(teacher.path)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for index in (0, 1, 3):
            model.model.layers[index].self_attn.o_proj.weight.mul_(1e-3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    teacher.backend.convert(folder, range(4), taken, 0)
    hybrid.backend.convert(taken, [], none, 0)
    return Artifact("deep", taken, teacher.backend), Artifact("none", none, hybrid.backend)


@pytest.fixture
def select(make_job, write_tiny, deep):
    def run(name, parent=None, model=None, device="cpu", **options):
        teacher, none = deep
        job = make_job(
            name,
            data={"text": write_tiny(documents=8)},
            models={"none": model or none},
            teacher=teacher,
            parent=parent or teacher,
            backend=teacher.backend,
            device=device,
        )
        config = KlGuidedConfig(**{"model": "none", "data": "text", "tokens": 300, "batch": 2, **options})
        return KlGuided(config).select(job), job

    return run


@pytest.fixture(params=["mamba2", "mamba"])
def none(request, deep, tmp_path):
    """The teacher with Mamba-2 or Mamba-1 in every layer."""
    if request.param == "mamba2":
        return deep[1]
    backend = MambaBackend(MambaConfig())
    backend.convert(deep[0].path, [], tmp_path / "mamba", 0)
    return Artifact("none", tmp_path / "mamba", backend)


@pytest.mark.parametrize("greedy", [False, True])
def test_the_layer_that_matters_is_kept_and_kept_alone(select, none, greedy):
    kept, job = select("job", model=none, share=0.25, greedy=greedy)
    assert kept == [2]
    facts = {(fact["name"], fact.get("arm", "")): fact["value"] for fact in job.emit.of("fact")}
    gains = [facts["kl_gain", f"layer {layer}"] for layer in range(4)]
    assert max(gains) == gains[2]
    assert facts["kl_none_restored", ""] - gains[2] == pytest.approx(facts["kl_chosen_restored", ""], abs=1e-9)
    assert facts["selection_wall", ""] > 0
    assert facts["selection_gpu", ""] == 0


@pytest.mark.gpu
def test_a_gpu_finds_the_same_layer_for_as_many_tokens(select, none):
    on_cpu, there = (select(device, model=none, device=device, share=0.25) for device in ("cpu", "cuda:0"))
    assert on_cpu[0] == there[0] == [2]
    told, facts = on_cpu[1].emit.facts, there[1].emit.facts
    assert facts["selection_tokens"] == told["selection_tokens"]
    assert facts["selection_gpu"] == facts["selection_wall"] > 0
    assert facts["kl_none_restored"] == pytest.approx(told["kl_none_restored"], rel=0.1)


def test_slices_of_positions_change_nothing(select, monkeypatch):
    whole = select("whole", share=0.5)[1].emit.facts
    monkeypatch.setattr(kl_guided, "SLICE", 7)
    parts = select("parts", share=0.5)[1].emit.facts
    assert parts["kl_chosen_restored"] == pytest.approx(whole["kl_chosen_restored"], rel=1e-9)


def test_the_divergence_is_the_mean_over_the_tokens_of_the_sample(select, deep):
    kept, job = select("job", share=1.0, tokens=10_000)
    assert kept == [0, 1, 2, 3]
    facts = job.emit.facts
    assert facts["kl_chosen_restored"] == pytest.approx(0, abs=1e-6)
    teacher, none = deep
    text = next(iter(job.data.values()))
    windows = read_windows(text, teacher.backend.tokenizer(teacher.path), 128)
    batch = collate([windows[row] for row in range(len(windows))])
    counted = shifted(batch["labels"]) != IGNORED
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        said, told = (m.backend.module(m.path)(**given).logits[counted] for m in (none, teacher))
    assert facts["kl_none_restored"] == pytest.approx(float(Divergence()(said, told).mean()), rel=1e-5)
    # the teacher and none restored, four layers one at a time; then the teacher and the choice
    assert facts["selection_tokens"] == int(windows.lengths.sum()) * (6 + 2)


def test_no_share_keeps_nothing_and_a_share_of_nothing_is_refused(select):
    assert select("none", share=0.0)[0] == []
    with pytest.raises(MambabenchError, match=r"kl-guided: a share of 0\.1 of 4 layers keeps none"):
        select("little", share=0.1)


def test_a_model_that_has_attention_left_cannot_be_restored(select, deep, hybrid, tmp_path):
    teacher, _ = deep
    hybrid.backend.convert(teacher.path, [1], tmp_path / "some", 0)
    some = Artifact("some", tmp_path / "some", hybrid.backend)
    with pytest.raises(MambabenchError, match="none has attention in layer 1; name a model that is all Mamba"):
        select("job", model=some, share=0.5)
    backend = RemovedBackend(RemovedConfig())
    backend.convert(teacher.path, [], tmp_path / "bare", 0)
    with pytest.raises(MambabenchError, match="none has nothing that attention could stand in for in layer 0"):
        select("bare", model=Artifact("bare", tmp_path / "bare", backend), share=0.5)
