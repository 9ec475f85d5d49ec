"""Sharing the beginnings of prompts changes what is run, not what comes out."""

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.interfaces import Limits, Prompt, silent
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites import prefixes
from mambabench.harness.suites.lm_eval_model import StepperLM
from mambabench.harness.suites.prefixes import LEAST, SharedPrefix

RNG = np.random.default_rng(0)
BEGIN = RNG.integers(1, 8, LEAST + 5).tolist()


def prompts(count):
    return [[*BEGIN, *RNG.integers(1, 8, 1 + 3 * at).tolist()] for at in range(count)]


def padded(texts):
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int64)
    return ids, torch.tensor([len(text) for text in texts], dtype=torch.int32)


def test_logits_and_state_are_those_of_whole_prompts_and_idle_rows_stay_as_they_are():
    model = MockStepper(seed=1)
    shared = SharedPrefix(model)
    state = model.open(5, 80, 4)
    before, _ = padded([[], [], [3, 1, 2], [], []])
    model.prefill(before, torch.tensor([0, 0, 3, 0, 0], dtype=torch.int32), state)
    ids, lengths = padded([*prompts(2), [], *prompts(2)])
    logits = shared.prefill(ids, lengths, state)
    for row in (0, 1, 3, 4):
        text = ids[row, : lengths[row]].tolist()
        np.testing.assert_array_equal(logits[row].numpy(), model.logits(text))
        assert state.texts[row] == text
    assert state.texts[2] == [3, 1, 2]
    assert shared.saved >= 3 * len(BEGIN)


@pytest.mark.parametrize("texts", [[[1, 2, 3]], [BEGIN, BEGIN[:-9]], [[*BEGIN, 1], BEGIN], [[1] * 9, [1] * 8]])
def test_every_row_keeps_a_token_of_its_own_to_run(texts):
    model = MockStepper(seed=1)
    logits = SharedPrefix(model).prefill(*padded(texts), model.open(len(texts), 80, 4))
    for row, text in enumerate(texts):
        np.testing.assert_array_equal(logits[row].numpy(), model.logits(text))


@pytest.mark.parametrize("decoder", [StandardDecoder(), SpeculativeDecoder(NgramDraft(), 3)])
def test_decoders_write_the_same_texts(decoder):
    model, shared = MockStepper(seed=1), SharedPrefix(MockStepper(seed=1))
    asked = [Prompt(tuple(text), number) for number, text in enumerate(prompts(4))]
    limits = Limits(new_tokens=12)
    wanted = decoder.generate(model, asked, limits, silent)
    assert decoder.generate(shared, asked, limits, silent) == wanted
    assert shared.saved


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 9, 1, 2), (17, 30, 40, 20)])
def test_likelihoods_behind_shared_contexts_are_those_of_whole_texts(batch, sizes, monkeypatch):
    model = MockStepper(seed=2)
    model.max_context = 200
    contexts = [RNG.integers(1, 8, size).tolist() for size in (60, 171, 150, 60)]
    requests = [(("", ""), context, RNG.integers(1, 8, size).tolist()) for context in contexts for size in sizes]
    lm = StepperLM(model, None, batch, 0, silent)
    scored = []
    score = model.score
    monkeypatch.setattr(model, "score", lambda ids, lengths: scored.append(len(ids)) or score(ids, lengths))
    found = lm._loglikelihood_tokens(requests)
    assert sum(scored) < len(requests)
    for (value, greedy), (_, context, continuation) in zip(found, requests, strict=True):
        text, begin = (context + continuation)[-201:], 0.0
        exact = True
        for place in range(len(text) - len(continuation), len(text)):
            logits = model.logits(text[:place])
            begin += logits[text[place]] - np.log(np.exp(logits).sum())
            exact &= int(logits.argmax()) == text[place]
        assert value == pytest.approx(begin, rel=1e-10)
        assert greedy == exact


def test_a_model_that_is_not_stepped_scores_whole_texts(monkeypatch):
    model, wanted = MockStepper(seed=2), MockStepper(seed=2)
    monkeypatch.setattr(model, "traits", frozenset({"generate"}))
    monkeypatch.setattr(model, "open", None)
    requests = [(("", ""), BEGIN * 2, [token]) for token in (1, 2, 3)]
    requests += [(("", ""), BEGIN * 3, [token, 1]) for token in (1, 2, 3)]
    found = StepperLM(model, None, 4, 0, silent)._loglikelihood_tokens(requests)
    other = StepperLM(wanted, None, 4, 0, silent)._loglikelihood_tokens(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in other], rel=1e-12)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in other]


def test_a_beginning_that_is_too_short_is_not_worth_a_call():
    model = MockStepper(seed=1)
    shared = SharedPrefix(model)
    texts = [[*BEGIN[: LEAST - 1], 1, 2], [*BEGIN[: LEAST - 1], 3, 4]]
    shared.prefill(*padded(texts), model.open(2, 80, 4))
    assert (model.calls, shared.saved) == (1, 0)
    assert prefixes.common(torch.tensor(texts), len(texts[0])) == LEAST - 1
