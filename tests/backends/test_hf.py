"""A model of transformers is a row as it is: its own logits, its own text, and no step of ours."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambabench import MambabenchError, Unsupported
from mambabench.backends.hf import HfBackend
from mambabench.backends.plugin import HfConfig
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import NgramConfig
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.conformance_decoders import answer_with_records, check_records
from mambabench.harness.interfaces import Limits, Prompt, silent
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconMambaConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
)

from .test_model import some_ids

SMALL = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.3}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, **SMALL
    ),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL),
    "falcon-mamba": lambda: FalconMambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4, tie_word_embeddings=False, **SMALL
    ),
    "mamba2": lambda: Mamba2Config(
        hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, **SMALL
    ),
    "bamba": lambda: BambaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=8,
        **SMALL,
    ),
}
ATTENTION = {"llama": [0, 1], "gpt2": [0, 1], "falcon-mamba": [], "mamba2": [], "bamba": [1]}
RECURRENT = ("falcon-mamba", "mamba2", "bamba")
PROMPTS = [Prompt(tuple(some_ids(length, seed=length).tolist()), length) for length in (5, 2, 9)]


@pytest.fixture(scope="module")
def backend() -> HfBackend:
    return HfBackend(HfConfig())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Path]:
    """A small random model of each kind, with settings of generation that nobody asked for."""
    made = {}
    for name, config in MODELS.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config()).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(llama / file, folder / file)
        settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": list(range(61))}
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param in RECURRENT and importlib.util.find_spec("mamba_ssm"):
        pytest.skip("beside mamba-ssm, transformers runs this family on a GPU only")
    return str(request.param)


@pytest.fixture
def artifact(name: str, folders: dict[str, Path], backend: HfBackend, tmp_path: Path) -> Path:
    backend.convert(folders[name], [], tmp_path / "artifact", seed=0)
    return tmp_path / "artifact"


def test_a_model_that_gpus_share_comes_in_half_the_precision_on_the_cpu(artifact: Path, backend: HfBackend) -> None:
    exact = dict(backend.module(artifact).named_parameters())
    for device, dtype in (("cuda:0", torch.bfloat16), ("cpu", torch.float32)):
        for name, weight in backend.mapped(artifact, device).named_parameters():
            assert (weight.device.type, torch.equal(weight, exact[name].to(weight.dtype))) == ("cpu", True), name
            assert weight.dtype == dtype, name


def test_a_folder_is_taken_without_a_copy_and_described(
    name: str, artifact: Path, folders: dict[str, Path], backend: HfBackend
) -> None:
    assert (artifact / "model.safetensors").samefile(folders[name] / "model.safetensors")
    described, model = backend.describe(artifact), backend.module(artifact)
    assert described["attention_layers"] == ATTENTION[name]
    assert described["parameters"] == sum(p.numel() for p in model.parameters())
    assert described["vocab_size"] == 61
    assert described["max_context"] == {"gpt2": 64, "falcon-mamba": 1 << 20, "mamba2": 1 << 20}.get(
        name, model.config.max_position_embeddings if name in ("llama", "bamba") else 0
    )


def test_scores_are_those_of_the_model(artifact: Path, backend: HfBackend) -> None:
    """In two groups of rows, padding at the right."""
    model, ids = backend.load(artifact, "cpu", "float32"), some_ids(3, 13)
    lengths = torch.tensor([13, 4, 9], dtype=torch.int32)
    scores = model.score(ids, lengths)
    reference = AutoModelForCausalLM.from_pretrained(artifact)
    for row, length in enumerate(lengths.tolist()):
        with torch.no_grad():
            logits = reference(ids[row : row + 1, : length - 1]).logits[0]
        want = logits.log_softmax(-1).gather(-1, ids[row, 1:length, None])[:, 0]
        torch.testing.assert_close(scores.logprob[row, : length - 1], want, rtol=0, atol=1e-4)
        assert torch.equal(scores.greedy[row, : length - 1], logits.argmax(-1) == ids[row, 1:length])


def test_a_ragged_batch_writes_what_the_model_writes_alone(artifact: Path, backend: HfBackend) -> None:
    model = backend.load(artifact, "cpu", "float64")
    limits = Limits(new_tokens=12)
    answers, records = answer_with_records(StandardDecoder(), model, PROMPTS, limits)
    check_records(records, answers)
    reference = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float64)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = list(prompt.ids)
        for _ in range(12):
            with torch.no_grad():
                text.append(int(reference(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert list(answer.ids) == text[len(prompt.ids) :]
        assert answer.finish == "length"


def test_texts_end_where_the_limits_say(folders: dict[str, Path], backend: HfBackend) -> None:
    model = backend.load(folders["llama"], "cpu", "float32")
    free = [answer.ids for answer in model.generate(PROMPTS, Limits(new_tokens=10), silent)]
    stop = free[0][4]
    answers, records = answer_with_records(
        StandardDecoder(), model, PROMPTS, Limits(new_tokens=10, stop_tokens=(stop,))
    )
    check_records(records, answers)
    for answer, ids in zip(answers, free, strict=True):
        cut = ids.index(stop) + 1 if stop in ids else 10
        assert answer.ids == ids[:cut]
        assert answer.finish == ("stop" if stop in ids else "length")


def test_sampling_depends_on_the_seed_and_leaves_torch_alone(folders: dict[str, Path], backend: HfBackend) -> None:
    model = backend.load(folders["llama"], "cpu", "float32")

    def sampled(seed: int, **changes: float) -> list[tuple[int, ...]]:
        limits = Limits(new_tokens=16, seed=seed, **{"temperature": 1.0, **changes})
        return [answer.ids for answer in model.generate(PROMPTS, limits, silent)]

    before = torch.random.get_rng_state()
    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    greedy = [answer.ids for answer in model.generate(PROMPTS, Limits(new_tokens=16), silent)]
    assert sampled(0, top_k=1) == greedy
    assert sampled(0, top_p=1e-6) == greedy


def test_a_prompt_that_is_asked_again_under_another_number_draws_another_text(
    folders: dict[str, Path], backend: HfBackend
) -> None:
    model, limits = backend.load(folders["llama"], "cpu", "float32"), Limits(new_tokens=16, temperature=1.0)
    one, other = (model.generate([Prompt((3, 4), sequence)], limits, silent)[0].ids for sequence in (0, 1))
    assert one != other


@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_all_weights_but_an_embedding_that_is_no_head(
    name: str, folders: dict[str, Path], backend: HfBackend
) -> None:
    model = backend.load(folders[name], "cpu", "float32")
    cost, whole = model.cost(2, 8, 1), 4 * backend.describe(folders[name])["parameters"]
    table = 0 if model.model.config.tie_word_embeddings else 4 * 61 * 32
    assert (cost.weight_bytes, cost.held_weight_bytes) == (whole - table, whole)
    assert cost.flops == 2 * 2 * (whole - table) // 4


def test_what_needs_steps_is_unsupported_and_says_why(folders: dict[str, Path], backend: HfBackend) -> None:
    model = backend.load(folders["llama"], "cpu", "float32")
    with pytest.raises(Unsupported, match=r"needs a backend that can roll back \(trait `rollback`\)"):
        SpeculativeDecoder(NgramDraft(NgramConfig()), 4).generate(model, PROMPTS, Limits(new_tokens=4), silent)
    ids, lengths = some_ids(1, 3), torch.tensor([3])
    for call in (
        lambda: model.open(1, 8, 1),
        lambda: model.prefill(ids, lengths, None),
        lambda: model.advance(ids, lengths, None),
        lambda: model.take(None, lengths),
    ):
        with pytest.raises(Unsupported, match="it makes no steps and rolls nothing back"):
            call()


def test_a_trained_model_comes_back(artifact: Path, backend: HfBackend, tmp_path: Path) -> None:
    model, ids = backend.module(artifact), some_ids(2, 7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        want = model.eval()(input_ids=ids).logits
    backend.save(model, tmp_path / "saved", like=artifact)
    with torch.no_grad():
        torch.testing.assert_close(backend.module(tmp_path / "saved")(input_ids=ids).logits, want)
    assert backend.tokenizer(tmp_path / "saved").decode([5, 6]) == "w2 w3"


def test_a_tensor_that_is_missing_is_never_random(folders: dict[str, Path], backend: HfBackend, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(folders["gpt2"], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MambabenchError, match=r"missing tensors: transformer\.h\.1\.mlp\.c_fc\.weight"):
        backend.load(folder, "cpu", "float32")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"model_type": "nobody"}', MambabenchError, r"config\.json: transformers knows no such model"),
        ("[", MambabenchError, r"config\.json: transformers knows no such model"),
        ('{"model_type": "mambabench_hybrid"}', Unsupported, 'has no cache for generate; use = "mamba2-hybrid"'),
    ],
)
def test_a_folder_that_is_none_is_one_line(
    text: str, error: type[Exception], message: str, backend: HfBackend, tmp_path: Path
) -> None:
    with pytest.raises(MambabenchError, match=r"no config\.json"):
        backend.describe(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message) as caught:
        backend.describe(tmp_path)
    assert "\n" not in str(caught.value)


def test_layers_cannot_be_chosen(folders: dict[str, Path], backend: HfBackend, tmp_path: Path) -> None:
    backend.convert(folders["bamba"], [1], tmp_path / "same", seed=0)
    with pytest.raises(Unsupported, match=r"takes a model as it is, so keep = \[0\] cannot be"):
        backend.convert(folders["llama"], [0], tmp_path / "half", seed=0)


def test_weights_that_are_no_safetensors_are_refused_at_once(
    folders: dict[str, Path], backend: HfBackend, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folders["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(MambabenchError, match=r"pytorch_model\.bin: backend hf takes safetensors alone"):
        backend.convert(folder, [], tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_teacher_of_ours_is_the_transformer_that_it_was(llama, teacher_backend, tmp_path, cache):
    backend = HfBackend(HfConfig(cache=cache))
    teacher_backend.convert(llama, [], tmp_path / "ours", seed=0)
    backend.convert(tmp_path / "ours", [], tmp_path / "theirs", seed=0)
    ids = some_ids(2, 12)
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    torch.testing.assert_close(backend.module(tmp_path / "theirs")(ids).logits, theirs(ids).logits)
    prompts = [Prompt(tuple(row)) for row in ids.tolist()]
    limits = Limits(new_tokens=9)
    answers = StandardDecoder().generate(backend.load(tmp_path / "theirs", "cpu", "float64"), prompts, limits, silent)
    own = StandardDecoder().generate(teacher_backend.load(tmp_path / "ours", "cpu", "float64"), prompts, limits, silent)
    assert [answer.ids for answer in answers] == [answer.ids for answer in own]


def test_a_hybrid_of_ours_is_no_transformer(half, tmp_path):
    with pytest.raises(Unsupported, match=r"layers \[0, 2\] have no attention"):
        HfBackend(HfConfig()).convert(half, [], tmp_path / "theirs", seed=0)
