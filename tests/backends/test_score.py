"""Scoring text in parallel."""

from pathlib import Path

import pytest
import torch
from mambabench.backends.hybrid import Mamba2HybridBackend
from mambabench.backends.stepper import HybridStepper


@pytest.fixture
def model(half: Path, hybrid_backend: Mamba2HybridBackend) -> HybridStepper:
    return hybrid_backend.load(half, "cpu", "float64")


def test_the_last_token_of_a_text_is_scored_but_not_run(model: HybridStepper, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(2 * (model.max_context + 1)).view(2, -1) * 7 % model.vocab_size
    wanted = model.model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    run = []
    straight = model.model.model.forward
    monkeypatch.setattr(
        model.model.model, "forward", lambda input_ids: run.append(input_ids.shape[1]) or straight(input_ids=input_ids)
    )
    scores = model.score(ids, torch.full((2,), ids.shape[1], dtype=torch.int32))
    assert run == [model.max_context]
    assert scores.logprob.shape == (2, model.max_context)
    assert float((scores.logprob - wanted).abs().max()) < 1e-10


def test_a_text_of_one_token_has_no_scores(model: HybridStepper) -> None:
    scores = model.score(torch.tensor([[3], [4]]), torch.ones(2, dtype=torch.int32))
    assert scores.logprob.shape == scores.greedy.shape == (2, 0)


def test_scores_that_are_asked_for_from_somewhere_on_are_those_of_the_whole_text(model: HybridStepper) -> None:
    ids = torch.arange(3 * 40).view(3, -1) * 11 % model.vocab_size
    lengths, begins = torch.tensor([40, 17, 1], dtype=torch.int32), torch.tensor([30, 1, 1], dtype=torch.int32)
    whole, part = model.score(ids, lengths), model.score(ids, lengths, begins)
    for row, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        asked = slice(begin - 1, max(length - 1, begin - 1))
        for left, right in zip(whole, part, strict=True):
            torch.testing.assert_close(left[row, asked], right[row, asked], rtol=0, atol=1e-10)
