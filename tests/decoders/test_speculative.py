import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import SpeculativeConfig
from mambabench.decoders.sampling import probabilities
from mambabench.decoders.speculative import SpeculativeDecoder, speculative
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness import metrics
from mambabench.harness.conformance_decoders import (
    answer_with_records,
    check_answers,
    check_decoder,
    check_records,
    distribution_p,
)
from mambabench.harness.interfaces import Limits, Prompt, Unsupported
from mambabench.harness.mockmodel import MockStepper
from mambabench.kernels.rounds import DRAFT, draw, streams, uniform

prompt_lists = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=9), min_size=1, max_size=4)


class ScriptedDraft:
    """Drafts what the target would emit, wrong from a scripted place on; rows and rounds take turns in the script."""

    def __init__(self, script: Sequence[tuple[int, int]]) -> None:
        self.script = script

    def open(self, target, prompts, limits, k):
        self.turn, self.limits, self.target, self.k, self.prompts = 0, limits, target, k, prompts
        return

    def propose(self, state, texts):
        ids = torch.full((len(texts), self.k), -1)
        real = torch.zeros(len(texts), dtype=torch.int32)
        for row, text in enumerate(texts):
            count, right = self.script[self.turn % len(self.script)]
            self.turn += 1
            real[row] = min(count, self.k)
            grown = list(text)
            for place in range(self.k):
                token = int(self.target.logits(grown).argmax())
                grown.append(token if place < right else (token + 1) % self.target.vocab_size)
            ids[row] = torch.tensor(grown[len(text) :])
        return ids, real, None


class SamplingDraft:
    """Draws from another toy model, through the same filters; short rows have fewer real drafts."""

    def __init__(self, model: MockStepper, short: bool = False) -> None:
        self.model, self.short = model, short

    def open(self, target, prompts, limits, k):
        self.limits, self.k = dataclasses.replace(limits, temperature=limits.temperature or 1.0), k
        return torch.tensor([prompt.sequence for prompt in prompts])

    def propose(self, state, texts):
        grown = [list(text) for text in texts]
        position = torch.tensor([len(text) for text in texts])
        q = []
        for place in range(self.k):
            logits = torch.stack([torch.from_numpy(self.model.logits(text)) for text in grown])
            q.append(probabilities(logits, self.limits))
            tokens = draw(q[-1], uniform(streams(self.limits.seed, state), position + place, DRAFT))
            for text, token in zip(grown, tokens.tolist(), strict=True):
                text.append(token)
        real = torch.tensor([len(text) % (self.k + 1) if self.short else self.k for text in texts], dtype=torch.int32)
        return torch.tensor([text[-self.k :] for text in grown]), real, torch.stack(q, dim=1)


drafts = st.one_of(
    st.builds(NgramDraft),
    st.builds(ScriptedDraft, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=7)),
    st.builds(SamplingDraft, st.builds(MockStepper, st.integers(5, 9)), st.booleans()),
)
limit_sets = st.fixed_dictionaries(
    {
        "new_tokens": st.integers(1, 14),
        "stop_tokens": st.sampled_from([(), (0,), (0, 3, 5)]),
        "stop_strings": st.sampled_from([(), ("ab",), ("a", "gf", "dcd")]),
        "seed": st.integers(0, 5),
    }
)


@settings(deadline=None, max_examples=150)
@given(prompt_lists, drafts, st.integers(1, 6), limit_sets, st.integers(0, 20), st.sampled_from([0, 3]))
def test_greedy_speculative_text_is_the_standard_text(prompts, draft, k, limits, seed, levels):
    model = MockStepper(seed=seed, levels=levels)
    limits = Limits(**limits)
    requests = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    wanted, _ = answer_with_records(StandardDecoder(), model, requests, limits)
    answers, records = answer_with_records(SpeculativeDecoder(draft, k), model, requests, limits)
    assert answers == wanted
    check_answers(answers, requests, limits, model)
    check_records(records, answers)
    accepted = [r["accepted"] for r in records if r["kind"] == "round"]
    assert all(r["drafted"] <= k for r in records if r["kind"] == "round")
    if accepted:
        assert 1 <= metrics.mean_accepted_length(accepted) <= k + 1


@settings(deadline=None)
@given(prompt_lists, st.integers(1, 5), limit_sets, st.sampled_from([(0, 1.0), (3, 0.7)]))
def test_sampled_text_with_a_deterministic_draft_is_the_standard_text(prompts, k, limits, filters):
    model = MockStepper(seed=k)
    limits = Limits(**limits, temperature=0.7, top_k=filters[0], top_p=filters[1])
    requests = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    wanted, _ = answer_with_records(StandardDecoder(), model, requests, limits)
    answers, _ = answer_with_records(SpeculativeDecoder(NgramDraft(), k), model, requests, limits)
    assert answers == wanted


@settings(deadline=None, max_examples=40)
@given(prompt_lists, st.integers(1, 4), limit_sets, st.booleans())
def test_sampled_text_with_a_sampling_draft_does_not_depend_on_the_batch(prompts, k, limits, short):
    model, draft = MockStepper(seed=1), SamplingDraft(MockStepper(seed=2), short)
    limits = Limits(**limits, temperature=1.1)
    requests = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    decoder = SpeculativeDecoder(draft, k)
    together, records = answer_with_records(decoder, model, requests, limits)
    check_records(records, together)
    assert together == [answer_with_records(decoder, model, [request], limits)[0][0] for request in requests]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("draft_seed", [1, 8])
def test_sampled_text_with_a_sampling_draft_has_the_distribution_of_the_target(k, short, draft_seed):
    model = MockStepper(seed=1, letters="abc", habit=0.3, sharpness=2.0)
    draft = SamplingDraft(MockStepper(seed=draft_seed, letters="abc", habit=0.6, sharpness=3.0), short)
    limits = Limits(new_tokens=3, temperature=0.8, seed=k)
    prompts = [Prompt((1, 2), row) for row in range(3000)]
    answers, records = answer_with_records(SpeculativeDecoder(draft, k), model, prompts, limits)
    rounds = [r for r in records if r["kind"] == "round"]
    assert any(r["accepted"] for r in rounds)
    assert any(r["accepted"] < r["drafted"] for r in rounds)
    assert distribution_p(model, (1, 2), limits, [answer.ids for answer in answers]) > 1e-4


def test_a_draft_that_equals_the_target_is_always_accepted():
    model = MockStepper(seed=3)
    decoder = SpeculativeDecoder(SamplingDraft(model), 3)
    limits = Limits(new_tokens=9, temperature=0.9, top_k=4, top_p=0.8)
    prompts = [Prompt((1, 2), row) for row in range(50)]
    _, records = answer_with_records(decoder, model, prompts, limits)
    rounds = [r for r in records if r["kind"] == "round"]
    assert {(r["drafted"], r["accepted"]) for r in rounds} == {(3, 3)}


def test_filters_hold_for_sampling_drafts():
    model = MockStepper(seed=4, habit=0.2)
    decoder = SpeculativeDecoder(SamplingDraft(MockStepper(seed=5)), 3)
    limits = Limits(new_tokens=6, temperature=1.5, top_k=2)
    answers, _ = answer_with_records(decoder, model, [Prompt((1,), row) for row in range(60)], limits)
    for answer in answers:
        for place, token in enumerate(answer.ids):
            assert token in model.logits([1, *answer.ids[:place]]).argsort()[-2:]


def test_the_decoder_of_the_default_options_conforms():
    check_decoder(speculative(SpeculativeConfig()))


def test_a_model_that_cannot_roll_back_is_unsupported():
    class Forward(MockStepper):
        traits = frozenset()

    with pytest.raises(Unsupported, match="rollback"):
        answer_with_records(SpeculativeDecoder(NgramDraft(), 2), Forward(), [Prompt((1,))], Limits(new_tokens=1))
