"""A teacher without a past: of the shape that was asked for, quick to make, and enough for every stage."""

import json

import pytest
import torch
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, TeacherConfig
from mambabench.distillers.plugin import ProgressiveConfig
from mambabench.distillers.progressive import Progressive
from mambabench.distillers.random_configs import RandomTeacherConfig, RandomTokensConfig
from mambabench.distillers.random_teacher import RandomTeacher, RandomTokens
from mambabench.harness.documents import read_documents
from mambabench.harness.interfaces import Artifact, MambabenchError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 48, "vocabulary": 300}


@pytest.fixture
def make_teacher(make_job):
    def make(name="teacher", seed=0, data=None, device="cpu", **options) -> Artifact:
        backend = TeacherBackend(TeacherConfig())
        job = make_job(name, backend=backend, seed=seed, data=data or {}, device=device)
        RandomTeacher(RandomTeacherConfig(**options)).train(job)
        return Artifact("teacher", job.out, backend)

    return make


def test_it_has_the_shape_that_the_options_say(make_teacher):
    made = make_teacher(**SHAPE, head_dim=16, context=512, rope_theta=1e4, init=0.1)
    sizes = made.backend.describe(made.path)
    assert {name: sizes[name] for name in ("layers", "vocab_size", "max_context")} == {
        "layers": 2,
        "vocab_size": 300,
        "max_context": 512,
    }
    tensors = load_file(made.path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (32, 32)
    assert tensors["lm_head.weight"].shape == (300, 32)
    assert tensors["lm_head.weight"].float().std() == pytest.approx(0.1, rel=0.05)
    assert json.loads((made.path / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e4


def test_the_seed_decides_the_weights(make_teacher):
    one, again, other = (
        load_file(make_teacher(name, seed, **SHAPE).path / "model.safetensors")
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.gpu
def test_a_gpu_draws_the_weights_of_a_teacher_that_runs_there(make_teacher):
    made = make_teacher(device="cuda:0", **SHAPE, head_dim=16, init=0.1)
    tensors = load_file(made.path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["lm_head.weight"].float().std() == pytest.approx(0.1, rel=0.05)
    logits = made.backend.frozen(made.path, "cuda:0")(input_ids=torch.randint(300, (2, 20), device="cuda:0")).logits
    assert logits.isfinite().all()


def test_a_config_json_gives_what_the_options_leave_open(make_teacher, tmp_path):
    file = tmp_path / "config.json"
    shape = {"model_type": "mistral", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 48, "vocab_size": 400, "num_hidden_layers": 9, "sliding_window": 64}
    file.write_text(json.dumps(shape | {"bos_token_id": 399, "eos_token_id": [398, 397], "torch_dtype": "float16"}))
    for given, name in ((file, "file"), (tmp_path, "folder")):
        made = make_teacher(name, data={"it": given}, config="it", layers=2, tied=True, dtype="float32")
        config = json.loads((made.path / "config.json").read_text())
        assert config["layer_types"] == ["sliding_attention"] * 2
        assert config["tie_word_embeddings"]
        assert config["vocab_size"] == 400
        assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
        assert {tensor.dtype for tensor in load_file(made.path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2, "hidden": 32, "heads": 4}, "intermediate is not given; a shape needs layers, hidden, heads"),
        (SHAPE | {"layers": -1}, "layers is -1; it must not be below 0"),
        (SHAPE | {"init": 0.0}, "init is 0.0; it must be above 0"),
    ],
)
def test_a_shape_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RandomTeacherConfig(**options)


def test_a_vocabulary_too_small_for_bytes_is_refused(make_teacher):
    with pytest.raises(MambabenchError, match="vocabulary is 200; its tokenizer has 258 tokens"):
        make_teacher(**SHAPE | {"vocabulary": 200})


def test_a_file_that_is_no_config_is_refused(make_teacher, tmp_path):
    (tmp_path / "sizes.json").write_text('{"hidden_size": 8}')
    with pytest.raises(
        MambabenchError, match=r"sizes.json: not a config.json of transformers \(it has no model_type\)"
    ):
        make_teacher(data={"it": tmp_path / "sizes.json"}, config="it")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "foo"}, "Unrecognized model identifier: foo"),
        ({"model_type": "llama", "hidden_size": 9, "num_attention_heads": 2}, "hidden size .9. is not a multiple of"),
    ],
)
def test_a_shape_of_no_model_is_refused_in_a_line(make_teacher, tmp_path, fields, reason):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(MambabenchError, match=rf"random-teacher: no such model \(.*{reason}") as refused:
        make_teacher(data={"it": tmp_path}, config="it")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"heads": 3}, "hidden is 32, which 3 heads do not divide"), ({"kv_heads": 3}, "which 3 kv_heads do not divide")],
)
def test_heads_that_do_not_fit_are_refused_in_the_plan(options, reason):
    with pytest.raises(ValueError, match=reason):
        RandomTeacherConfig(**SHAPE | options)


@pytest.mark.parametrize("text", ["plain", " leading space\n\ttabs", "naïve 雪 🙂", ""])
def test_its_tokenizer_gives_back_every_text(make_teacher, text):
    made = make_teacher(**SHAPE)
    tokenizer = made.backend.tokenizer(made.path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_transformers_finds_the_same_model(make_teacher):
    made, ids = make_teacher(**SHAPE), torch.randint(300, (2, 20))
    theirs = LlamaForCausalLM.from_pretrained(made.path.parent / "scratch" / "teacher", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_random_tokens_fill_documents_to_the_last(make_job, make_teacher):
    made = make_teacher(**SHAPE)
    job = make_job("text", teacher=made)
    RandomTokens(RandomTokensConfig(documents=5, length=33, vocabulary=290)).write(job)
    documents = list(read_documents(job.out))
    assert [len(document.ids) for document in documents] == [33] * 5
    assert {document.ids[0] for document in documents} == {256}
    seen = {token for document in documents for token in document.ids}
    assert max(seen) < 290
    assert len(seen) > 80
    with pytest.raises(MambabenchError, match="vocabulary is 301; the teacher's has 300 tokens"):
        RandomTokens(RandomTokensConfig(documents=5, length=33, vocabulary=301)).write(job)


def test_a_hybrid_of_it_is_trained_on_random_tokens(make_job, make_teacher, tmp_path):
    made = make_teacher(**SHAPE)
    text = make_job("text", teacher=made)
    RandomTokens(RandomTokensConfig(documents=8, length=32)).write(text)
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8))
    backend.convert(made.path, [1], tmp_path / "half", seed=0)
    parent = Artifact("half", tmp_path / "half", backend)
    job = make_job("stage", data={"text": text.out}, teacher=made, parent=parent, backend=backend)
    Progressive(ProgressiveConfig(data="text", tokens=128, context=32, batch=2)).train(job)
    assert job.emit.facts["training_tokens"] == 128
    assert job.emit.facts["training_steps"] == 2
