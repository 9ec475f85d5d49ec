"""The components of the example package, one by one."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mambabench import Limits, Prompt, Unsupported
from mambabench.harness.conformance import check_backend
from mambabench.harness.conformance_decoders import check_decoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 11


@pytest.fixture
def package(example: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The installed package's modules by name."""
    monkeypatch.syspath_prepend(example)
    return {name: importlib.import_module(f"mambabench_bigram.{name}") for name in ("plugin", "backend", "decoder")}


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))


def test_logits_depend_on_the_last_token_alone(package: dict[str, ModuleType], table: torch.Tensor) -> None:
    model = package["backend"].BigramStepper(table, None, 64)
    state = model.open(2, 16, 3)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 0]])
    assert torch.equal(model.prefill(prompts, torch.tensor([3, 2], dtype=torch.int32), state), table[[3, 5]])
    start = torch.tensor([3, 2], dtype=torch.int32)
    drafts = torch.tensor([[6, 7, 8], [9, 10, 0]])
    assert torch.equal(model.advance(drafts, start, state), table[drafts])
    assert torch.equal(model.advance(drafts[:, :1], start + 1, state), table[drafts[:, :1]])


def test_positions_outside_of_the_contract_are_refused(package: dict[str, ModuleType], table: torch.Tensor) -> None:
    model = package["backend"].BigramStepper(table, None, 64)
    state = model.open(1, 16, 2)
    model.prefill(torch.tensor([[1, 2, 3]]), torch.tensor([3], dtype=torch.int32), state)
    token = torch.tensor([[4]])
    with pytest.raises(ValueError, match="lies outside"):
        model.advance(token, torch.tensor([4], dtype=torch.int32), state)
    with pytest.raises(ValueError, match="lies outside"):
        model.advance(token, torch.tensor([2], dtype=torch.int32), state)
    with pytest.raises(ValueError, match="do not fit"):
        model.advance(torch.tensor([[4, 5, 6]]), torch.tensor([3], dtype=torch.int32), state)


def test_of_equal_logits_the_lowest_index_is_the_greedy_one(package: dict[str, ModuleType]) -> None:
    model = package["backend"].BigramStepper(torch.zeros(VOCABULARY, VOCABULARY), None, 64)
    scores = model.score(torch.tensor([[3, 0, 1]]), torch.tensor([3]))
    assert scores.greedy.tolist() == [[True, False]]
    assert scores.logprob.exp()[0].tolist() == pytest.approx([1 / VOCABULARY] * 2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with a tokenizer of letters, as a transformers folder."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"abcdefghijk"[i]: i for i in range(VOCABULARY)}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a").save_pretrained(folder)
    return folder


@pytest.fixture
def artifact(package: dict[str, ModuleType], teacher: Path, tmp_path: Path) -> Path:
    package["backend"].Bigram(package["plugin"].BigramConfig(batch=4)).convert(teacher, [], tmp_path / "bigram", 0)
    return tmp_path / "bigram"


def test_the_table_is_what_the_teacher_says_after_each_token(
    package: dict[str, ModuleType], artifact: Path, teacher: Path
) -> None:
    model = package["backend"].Bigram(package["plugin"].BigramConfig()).load(artifact, "cpu", "float32")
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(teacher)(torch.arange(VOCABULARY)[:, None]).logits[:, 0]
    torch.testing.assert_close(model.table, expected, atol=1e-5, rtol=0)
    assert model.tokenizer.decode([1, 2]) == "b c"


def test_the_backend_keeps_the_contract_of_backends(package: dict[str, ModuleType], artifact: Path) -> None:
    check_backend(package["backend"].Bigram(package["plugin"].BigramConfig()), artifact, rounds=200)


def test_an_artifact_describes_itself(package: dict[str, ModuleType], artifact: Path) -> None:
    sizes = package["backend"].Bigram(package["plugin"].BigramConfig()).describe(artifact)
    assert sizes["parameters"] == VOCABULARY**2
    assert (sizes["attention_layers"], sizes["vocab_size"], sizes["max_context"]) == ([], VOCABULARY, 64)


def test_what_it_cannot_do_is_unsupported_with_a_reason(package: dict[str, ModuleType], tmp_path: Path) -> None:
    backend = package["backend"].Bigram(package["plugin"].BigramConfig())
    with pytest.raises(Unsupported, match="keep = 0"):
        backend.convert(tmp_path, [1], tmp_path / "out", 0)
    with pytest.raises(Unsupported, match="not trained"):
        backend.module(tmp_path)
    with pytest.raises(Unsupported, match="not trained"):
        backend.save(torch.nn.Identity(), tmp_path, tmp_path)


def test_the_decoder_never_writes_an_n_gram_twice(package: dict[str, ModuleType], table: torch.Tensor) -> None:
    model = package["backend"].BigramStepper(table, Letters(), 256)
    decoder = package["decoder"].NoRepeat(package["plugin"].NoRepeatConfig(n=3))
    prompts = [Prompt((1, 2, 3)), Prompt((4,), 1)]
    answers = decoder.generate(model, prompts, Limits(new_tokens=100), lambda kind, /, **fields: None)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = prompt.ids + answer.ids
        grams = [text[i : i + 3] for i in range(len(text) - 2)]
        assert len(answer.ids) == 100
        assert len(set(grams)) == len(grams)


def test_the_decoder_keeps_the_contract_of_decoders(package: dict[str, ModuleType]) -> None:
    check_decoder(package["decoder"].NoRepeat(package["plugin"].NoRepeatConfig()), lossless=False)


class Letters:
    """A tokenizer of one letter a token."""

    bos_token_id = eos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + token) for token in ids)
