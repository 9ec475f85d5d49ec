"""The model computes what a Llama computes, is blind to padding, and comes back from disk bit for bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mambabench import Unsupported
from mambabench.backends.checkpoint import load
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.model import HybridForCausalLM
from transformers import AutoModelForCausalLM, LlamaForCausalLM

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}


def some_ids(*shape: int, seed: int = 0, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_teacher_has_the_logits_that_transformers_gives_it(
    rope: str, tied: bool, make_llama: Callable[..., Path], teacher_backend: TeacherBackend
) -> None:
    folder = make_llama(
        rope_parameters=ROPES[rope], tie_word_embeddings=tied, attention_bias=not tied, mlp_bias=not tied
    )
    want = LlamaForCausalLM.from_pretrained(folder)(input_ids=some_ids(2, 90)).logits
    got = teacher_backend.module(folder)(input_ids=some_ids(2, 90)).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_real_teacher_has_its_reference_logits(shared: Path, teacher_backend: TeacherBackend, tmp_path: Path) -> None:
    folder = shared / "models" / "stories-260k"
    reference = np.load(folder / "reference_logits.npz")
    teacher_backend.convert(folder, range(5), tmp_path / "artifact", seed=0)
    ids = torch.from_numpy(reference["input_ids"])
    for path in (folder, tmp_path / "artifact"):
        with torch.no_grad():
            got = teacher_backend.module(path)(input_ids=ids).logits
        torch.testing.assert_close(got, torch.from_numpy(reference["logits"]), rtol=0, atol=1e-4)


def test_rope_that_depends_on_the_length_is_served_where_it_does_not(
    make_llama: Callable[..., Path], teacher_backend: TeacherBackend
) -> None:
    """Up to the original context, `dynamic` is the plain rotation; beyond it, every way to run the model refuses."""
    folder = make_llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, max_position_embeddings=32
    )
    module, ids = teacher_backend.module(folder), some_ids(2, 33)
    want = LlamaForCausalLM.from_pretrained(folder)(input_ids=ids[:, :32]).logits
    torch.testing.assert_close(module(input_ids=ids[:, :32]).logits, want, rtol=0, atol=1e-4)
    model = teacher_backend.load(folder, "cpu", "float32")
    model.open(1, 32, 5)
    lengths = torch.full((2,), 34, dtype=torch.int32)
    for call in (
        lambda: module(input_ids=ids),
        lambda: model.open(1, 33, 1),
        lambda: model.score(some_ids(2, 34), lengths),
    ):
        with pytest.raises(
            Unsupported, match="'dynamic' is served up to its original context of 32 tokens, not for 33"
        ):
            call()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(artifact: Path, side: str, hybrid_backend: Mamba2HybridBackend) -> None:
    model = hybrid_backend.module(artifact).double()
    ids, padding = some_ids(1, 11), some_ids(1, 6, seed=1)
    other = some_ids(1, 17, seed=2)
    rows = torch.cat((padding, ids) if side == "left" else (ids, padding), dim=1)
    mask = torch.ones(2, 17, dtype=torch.int64)
    part = slice(6, None) if side == "left" else slice(11)
    mask[0] = 0
    mask[0, part] = 1
    got = model(input_ids=torch.cat((rows, other)), attention_mask=mask).logits
    torch.testing.assert_close(got[0, part], model(input_ids=ids).logits[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], model(input_ids=other).logits[0], rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_mean_of_the_next_tokens_or_their_sum_over_a_count(
    half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    model, ids = hybrid_backend.module(half), some_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(input_ids=ids, labels=labels)
    logprobs = out.logits.log_softmax(-1)
    wanted = [-logprobs[row, t, ids[row, t + 1]] for row in range(2) for t in range(8) if labels[row, t + 1] >= 0]
    torch.testing.assert_close(out.loss, torch.stack(wanted).mean())
    summed = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(summed, torch.stack(wanted).sum() / 50)


def test_it_trains_under_autocast(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model, ids = hybrid_backend.module(half).train(), some_ids(2, 20)
    exact = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = hybrid_backend.module(half).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=some_ids(2, 20), labels=some_ids(2, 20)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_saved_model_comes_back_bit_for_bit(
    artifact: Path, hybrid_backend: Mamba2HybridBackend, tmp_path: Path
) -> None:
    model = hybrid_backend.module(artifact)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    hybrid_backend.save(model, tmp_path / "saved", like=artifact)
    for again in (hybrid_backend.module(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert isinstance(again, HybridForCausalLM)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(again(input_ids=some_ids(2, 9)).logits, model(input_ids=some_ids(2, 9)).logits)
    tokenizer = hybrid_backend.tokenizer(tmp_path / "saved")
    assert tokenizer.decode(tokenizer.encode("w3 w7", add_special_tokens=False)) == "w3 w7"


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_decays_and_skips_are_never_below_fp32(
    dtype: torch.dtype, exact: torch.dtype, half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    """Whichever way a model comes to a dtype."""
    config = AutoModelForCausalLM.from_pretrained(half).config
    original = hybrid_backend.module(half)
    models = {
        "loaded by us": load(half, dtype),
        "loaded by transformers": AutoModelForCausalLM.from_pretrained(half, dtype=dtype),
        "cast": hybrid_backend.module(half).to(dtype),
        "cast and moved": hybrid_backend.module(half).to("cpu", dtype),
        "in a module": torch.nn.ModuleList([hybrid_backend.module(half)]).to(dtype)[0],
        "made": AutoModelForCausalLM.from_config(config, dtype=dtype),
    }
    for way, model in models.items():
        for name, parameter in model.named_parameters():
            kept = name.endswith(("A_log", "D", "dt_bias"))
            assert parameter.dtype == (exact if kept else dtype), f"{way}: {name} is {parameter.dtype}"
            if kept and way != "made":
                assert torch.equal(parameter, original.get_parameter(name).to(exact)), f"{way}: {name} was rounded"
        assert model(input_ids=some_ids(2, 9)).logits.dtype == dtype, way


def test_transformers_generates_without_a_cache_and_is_refused_with_one(half: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(half)
    text = some_ids(1, 5)
    out = model.generate(text, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for position in range(5, 11):
        assert out[0, position] == model(input_ids=out[:, :position]).logits[0, -1].argmax()
    with pytest.raises(Unsupported, match="pass use_cache=False"):
        model(input_ids=text, use_cache=True)


def test_only_the_last_logits_are_made_on_request(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model = hybrid_backend.module(half)
    whole = model(input_ids=some_ids(2, 9)).logits
    torch.testing.assert_close(model(input_ids=some_ids(2, 9), logits_to_keep=2).logits, whole[:, -2:])
