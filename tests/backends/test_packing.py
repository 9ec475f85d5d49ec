"""Documents that share a row are as if each had a row of its own, forward and backward, in every mixer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.backends.checkpoint import load
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig


@pytest.fixture(scope="module")
def make_mixed(
    make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., HybridForCausalLM]:
    """All three mixers in four layers, in fp64; keywords change the teacher's config."""
    made: dict[str, HybridForCausalLM] = {}

    def make(**changes: object) -> HybridForCausalLM:
        name = str(sorted(changes.items()))
        if name not in made:
            one, two = (tmp_path_factory.mktemp("packing") / "artifact" for _ in range(2))
            Mamba2HybridBackend(Mamba2HybridConfig(chunk=8)).convert(make_llama(**changes), [1, 3], one, seed=0)
            MambaBackend(MambaConfig()).convert(one, [3], two, seed=0)
            made[name] = load(two, torch.float64)
        return made[name]

    return make


def batch(rows: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
    """Packed ids, their positions, and the documents alone. Shorter rows end with one more document."""
    length = max(map(sum, rows))
    sizes = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    ids = torch.randint(0, 61, (len(rows), length), generator=torch.Generator().manual_seed(seed))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes])
    return ids, positions, [list(row.split(size)) for row, size in zip(ids, sizes, strict=True)]


rows = st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=4), min_size=1, max_size=3)


@given(rows, st.integers(0, 100), st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_packed_documents_have_the_logits_that_they_have_alone(
    make_mixed: Callable[..., HybridForCausalLM], rows: list[list[int]], seed: int, kv_heads: int
) -> None:
    model = make_mixed(num_key_value_heads=kv_heads)
    ids, positions, documents = batch(rows, seed)
    with torch.no_grad():
        got = model(input_ids=ids, position_ids=positions).logits
        for row, parts in zip(got, documents, strict=True):
            want = torch.cat([model(input_ids=part.unsqueeze(0)).logits[0] for part in parts])
            torch.testing.assert_close(row, want, rtol=1e-9, atol=1e-9)


def test_packed_documents_have_the_gradients_that_they_have_alone(
    make_mixed: Callable[..., HybridForCausalLM],
) -> None:
    model = make_mixed()
    ids, positions, documents = batch([[5, 1, 17, 2], [25]])
    gradients = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            model(input_ids=ids, position_ids=positions).logits.sin().sum().backward()
        else:
            for part in (part for parts in documents for part in parts):
                model(input_ids=part.unsqueeze(0)).logits.sin().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-8)


def test_packing_and_padding_go_together(make_mixed: Callable[..., HybridForCausalLM]) -> None:
    model = make_mixed()
    ids, positions, documents = batch([[5, 9], [3, 11]])
    padding, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 18, dtype=torch.int64)
    for left in (True, False):
        whole, places = (torch.cat((padding, t) if left else (t, padding), dim=1) for t in (ids, positions))
        real = slice(4, None) if left else slice(14)
        mask[:] = 0
        mask[:, real] = 1
        got = model(input_ids=whole, position_ids=places, attention_mask=mask).logits[:, real]
        for row, parts in zip(got, documents, strict=True):
            want = torch.cat([model(input_ids=part.unsqueeze(0)).logits[0] for part in parts])
            torch.testing.assert_close(row, want, rtol=1e-9, atol=1e-9)


def test_padding_between_documents_keeps_them_apart(make_mixed: Callable[..., HybridForCausalLM]) -> None:
    model = make_mixed()
    ids, positions, (documents,) = batch([[5, 1, 9]])
    real = torch.tensor([0, 1, 2, 3, 4, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18])
    whole, places, mask = (torch.zeros(1, 20, dtype=torch.int64) for _ in range(3))
    whole[:, real], places[:, real], mask[:, real] = ids, positions, 1
    got = model(input_ids=whole, position_ids=places, attention_mask=mask).logits[0, real]
    want = torch.cat([model(input_ids=part.unsqueeze(0)).logits[0] for part in documents])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_sliding_window_stays_in_its_document(
    make_llama: Callable[..., Path], make_mixed: Callable[..., HybridForCausalLM]
) -> None:
    model = make_mixed()
    model.model.layers[3].mixer.window = 4
    try:
        ids, positions, documents = batch([[6, 9]])
        got = model(input_ids=ids, position_ids=positions).logits[0]
        want = torch.cat([model(input_ids=part.unsqueeze(0)).logits[0] for part in documents[0]])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    finally:
        model.model.layers[3].mixer.window = 0


def test_gradient_checkpointing_keeps_documents_apart(make_mixed: Callable[..., HybridForCausalLM]) -> None:
    model = make_mixed().train()
    ids, positions, _ = batch([[5, 9]])
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    model.gradient_checkpointing_disable()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_one_row_of_trl_s_collator_is_taken_as_documents(make_mixed: Callable[..., HybridForCausalLM]) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    texts = [[5, 9, 3], [7, 8, 9, 10, 2], [4]]
    collated = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": t} for t in texts])
    assert collated["input_ids"].shape == (1, 9)
    model = make_mixed()
    collated.pop("labels")
    got = model(**collated).logits[0]
    want = torch.cat([model(input_ids=torch.tensor([t])).logits[0] for t in texts])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
