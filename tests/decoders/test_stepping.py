"""Drafts that are models, on real steppers: hybrids of random weights, in float64."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.plugin import TeacherConfig
from mambabench.backends.stepper import HybridStepper
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import LayersConfig, ModelConfig
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.stepping import LayersDraft, ModelDraft, spread
from mambabench.harness.conformance_decoders import (
    answer_with_records,
    check_answers,
    check_decoder,
    check_records,
    distribution_p,
)
from mambabench.harness.interfaces import Artifact, Limits, MambabenchError, Prompt, Unsupported
from mambabench.harness.mockmodel import MockStepper

from .hybrids import LETTERS, hybrid


def drafting_model(stepper, name: str = "small") -> ModelDraft:
    draft = ModelDraft(ModelConfig(model=name))
    backend = SimpleNamespace(load=lambda path, device, dtype: stepper)
    draft.bind({name: Artifact(name, Path(), backend)})
    return draft


TARGETS = {mixers: hybrid(mixers) for mixers in ("aa", "a2a2", "2121", "a--2")}
SMALL = hybrid("2a", seed=1)
prompt_lists = st.lists(st.lists(st.integers(1, len(LETTERS)), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["a2a2", "2121"]), prompt_lists, st.integers(1, 5), st.integers(1, 14), st.sampled_from([0.0, 0.8])
)
def test_the_text_is_the_same_whatever_takes_tokens_back(mixers, prompts, k, new_tokens, temperature):
    target, limits = TARGETS[mixers], Limits(new_tokens=new_tokens, temperature=temperature, seed=k)
    asked = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    draft = LayersDraft(LayersConfig(count=2))
    ways = (SpeculativeDecoder(draft, k, rollback=rollback) for rollback in ("replay", "snapshot"))
    one, two = (answer_with_records(way, target, asked, limits) for way in ways)
    assert one[0] == two[0]
    assert [r for r in one[1] if r["kind"] == "round"] == [r for r in two[1] if r["kind"] == "round"]


def test_a_backend_without_snapshots_is_unsupported():
    decoder = SpeculativeDecoder(drafting_model(SMALL), 2, rollback="snapshot")
    with pytest.raises(Unsupported, match="rollback = 'snapshot' needs a backend that keeps snapshots"):
        answer_with_records(decoder, MockStepper(), [Prompt((1,))], Limits(new_tokens=3))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(list(TARGETS)),
    st.sampled_from(["layers", "model", "itself"]),
    prompt_lists,
    st.integers(1, 5),
    st.integers(1, 14),
    st.sampled_from([(), (0, 3)]),
    st.sampled_from([1, 3]),
    st.sampled_from([0, 2]),
)
def test_greedy_text_with_a_model_as_a_draft_is_the_standard_text(
    mixers, kind, prompts, k, new_tokens, stops, look, window
):
    target = TARGETS[mixers]
    draft = LayersDraft(LayersConfig(count=2)) if kind == "layers" else drafting_model(SMALL)
    if kind == "itself":
        draft = drafting_model(target)
    limits = Limits(new_tokens=new_tokens, stop_tokens=stops)
    requests = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    wanted, _ = answer_with_records(StandardDecoder(), target, requests, limits)
    decoder = SpeculativeDecoder(draft, k, look=look, window=window)
    answers, records = answer_with_records(decoder, target, requests, limits)
    assert answers == wanted
    check_records(records, answers)
    if kind == "itself":
        assert all(r["accepted"] == r["drafted"] for r in records if r["kind"] == "round")


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(["layers", "model"]),
    prompt_lists,
    st.integers(2, 5),
    st.sampled_from([(0, 1.0), (4, 1.0), (0, 0.8)]),
    st.sampled_from([1, 4]),
    st.booleans(),
)
def test_sampled_text_depends_neither_on_k_nor_on_the_batch(kind, prompts, k, filters, look, adapt):
    target = TARGETS["a2a2"]
    draft = LayersDraft(LayersConfig()) if kind == "layers" else drafting_model(SMALL)
    limits = Limits(
        new_tokens=12,
        temperature=1.1,
        top_k=filters[0],
        top_p=filters[1],
        seed=k,
        stop_tokens=(2,),
        stop_strings=("ab",),
    )
    requests = [Prompt(tuple(ids), 5 * row) for row, ids in enumerate(prompts)]
    wanted = [
        answer_with_records(SpeculativeDecoder(draft, 1), target, [request], limits)[0][0] for request in requests
    ]
    decoder = SpeculativeDecoder(draft, k, look=look, window=2 * adapt)
    answers, records = answer_with_records(decoder, target, requests, limits)
    assert answers == wanted
    check_records(records, answers)


@settings(deadline=None, max_examples=15)
@given(
    prompt_lists, st.integers(1, 5), st.sampled_from([0.0, 0.8]), st.booleans(), st.sampled_from(["layers", "ngram"])
)
def test_what_a_draft_follows_with_is_what_it_puts_into_a_round(prompts, k, temperature, steady, kind):
    """By the contract that all drafts have, the text is the same."""
    own = LayersDraft(LayersConfig()) if kind == "layers" else NgramDraft()

    class Plain:
        open, follow = own.open, own.follow

    limits = Limits(new_tokens=12, temperature=temperature, seed=k, stop_tokens=(2,))
    asked = [Prompt(tuple(ids), 5 * row) for row, ids in enumerate(prompts)]
    ways = (SpeculativeDecoder(draft, k, steady=steady) for draft in (own, Plain()))
    one, two = (answer_with_records(way, TARGETS["a2a2"], asked, limits) for way in ways)
    assert one[0] == two[0]
    assert [r for r in one[1] if r["kind"] == "round"] == [r for r in two[1] if r["kind"] == "round"]


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(list(TARGETS)), prompt_lists, st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_a_model_that_picks_runs_what_it_picked(mixers, prompts, count, seed, recorded):
    """Whether or not its call is one of those that may be recorded."""
    target, dice = TARGETS[mixers], torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(ids) for ids in prompts], dtype=torch.int32)
    padded = torch.tensor([ids + [0] * (int(lengths.max()) - len(ids)) for ids in prompts])
    ids = torch.randint(target.vocab_size, (count, len(prompts)), generator=dice).T
    last = torch.randint(-2, 3, (len(prompts), target.vocab_size), generator=dice).double()
    picked = torch.cat([ids[:, :-1], last.argmax(1, keepdim=True)], dim=1)

    def run(ids, last=None):
        state = target.open(len(prompts), 10, 5)
        target.prefill(padded, lengths, state)
        if recorded:
            state.graphs = SimpleNamespace(run=lambda work, ids, start, settle: work(ids.clone(), start))
        return target.advance(ids, lengths, state, last=last)

    wanted = run(picked)
    assert torch.equal(run(ids, last), wanted)
    assert torch.equal(ids, picked)


def test_the_draft_of_a_toy_model_conforms_and_keeps_the_stepping_contract():
    class Small(MockStepper):
        """Another model with the vocabulary of any toy model that it is given."""

        def __init__(self, letters):
            super().__init__(seed=99, letters=letters, habit=0.5)

    class Fitting(ModelDraft):
        def model(self, target):
            return Small(target.tokenizer.letters)

    draft = Fitting(ModelConfig(model="small"))
    check_decoder(SpeculativeDecoder(draft, 3, look=2))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("filters", [(0, 1.0), (3, 0.8)])
def test_sampled_text_has_the_distribution_of_the_target(k, steady, filters):
    model = MockStepper(seed=1, letters="abc", habit=0.3, sharpness=2.0)
    draft = drafting_model(MockStepper(seed=8, letters="abc", habit=0.6, sharpness=3.0))
    limits = Limits(new_tokens=3, temperature=0.8, seed=k, top_k=filters[0], top_p=filters[1])
    prompts = [Prompt((1, 2), row) for row in range(3000)]
    decoder = SpeculativeDecoder(draft, k, steady=steady, look=2)
    answers, records = answer_with_records(decoder, model, prompts, limits)
    check_answers(answers, prompts, limits, model)
    rounds = [r for r in records if r["kind"] == "round"]
    assert any(r["accepted"] for r in rounds)
    assert any(r["accepted"] < r["drafted"] for r in rounds)
    assert distribution_p(model, (1, 2), limits, [answer.ids for answer in answers]) > 1e-4


def test_a_draft_of_all_layers_is_always_right_and_has_no_weights_of_its_own():
    target = hybrid("a2a")
    shrunk = target.shrunk([0, 1, 2])
    theirs = {p.data_ptr() for p in target.model.parameters()}
    assert {p.data_ptr() for p in shrunk.model.parameters()} == theirs
    decoder = SpeculativeDecoder(LayersDraft(LayersConfig(layers=(0, 1, 2))), 3)
    _, records = answer_with_records(decoder, target, [Prompt((1, 2, 3))], Limits(new_tokens=12))
    rounds = [r for r in records if r["kind"] == "round"]
    assert [(r["drafted"], r["accepted"]) for r in rounds] == [(3, 3)] * 3


def test_a_shrunk_model_is_that_of_its_layers_and_leaves_the_whole_one_as_it_was():
    target = hybrid("a2a2")
    ids, lengths = torch.tensor([[1, 2, 3, 4]]), torch.tensor([4])
    before = target.score(ids, lengths).logprob
    shrunk = target.shrunk([0, 3])
    alone = HybridForCausalLM(shrunk.config).double()
    alone.load_state_dict(shrunk.model.state_dict())
    assert alone.config.mixers == ["attention", "mamba2"]
    torch.testing.assert_close(
        shrunk.score(ids, lengths).logprob, HybridStepper(alone, None).score(ids, lengths).logprob
    )
    assert torch.equal(target.score(ids, lengths).logprob, before)
    assert target.layers == 4


@pytest.mark.parametrize(("layers", "count", "chosen"), [(32, 2, (0, 31)), (5, 3, (0, 2, 4)), (4, 4, (0, 1, 2, 3))])
def test_layers_are_spread_from_the_first_to_the_last(layers, count, chosen):
    assert spread(layers, count) == chosen


def test_drafts_that_cannot_be_are_refused():
    target, one = TARGETS["aa"], [Prompt((1,))]

    def run(draft, target=target):
        return answer_with_records(SpeculativeDecoder(draft, 2), target, one, Limits(new_tokens=4))

    with pytest.raises(Unsupported, match="has 5 tokens and the target 9"):
        run(drafting_model(hybrid("a", letters="abcd")))
    with pytest.raises(Unsupported, match="writes token 1 as 'h' and the target as 'a'"):
        run(drafting_model(hybrid("a", letters=LETTERS[::-1])))
    with pytest.raises(Unsupported, match="trait `shrinks`"):
        run(LayersDraft(LayersConfig()), MockStepper())
    with pytest.raises(Unsupported, match="draft layers: 5 layers of a model of 4"):
        run(LayersDraft(LayersConfig(count=5)), TARGETS["a2a2"])
    with pytest.raises(Unsupported, match=r"no layer 7 in a model of 4"):
        run(LayersDraft(LayersConfig(layers=(0, 7))), TARGETS["a2a2"])
    with pytest.raises(MambabenchError, match="which model 'absent' is"):
        run(ModelDraft(ModelConfig(model="absent")))


def test_real_text_is_the_same_with_layers_of_a_trained_model_as_the_draft(shared, tmp_path):
    backend = TeacherBackend(TeacherConfig())
    backend.convert(shared / "models" / "stories-260k", [], tmp_path / "teacher", seed=0)
    target = backend.load(tmp_path / "teacher", "cpu", "float64")
    texts = ("Once upon a time", "Lily and Tom", "The dog ran")
    prompts = [Prompt(tuple(target.tokenizer.encode(text)), row) for row, text in enumerate(texts)]
    limits = Limits(new_tokens=48, stop_strings=("park",))
    wanted, _ = answer_with_records(StandardDecoder(), target, prompts, limits)
    decoder = SpeculativeDecoder(LayersDraft(LayersConfig(layers=(0, 1, 3, 4))), 3, look=3)
    answers, records = answer_with_records(decoder, target, prompts, limits)
    assert answers == wanted
    assert any(answer.finish == "stop" for answer in answers)
    accepted = [r["accepted"] for r in records if r["kind"] == "round"]
    assert sum(accepted) > len(accepted) / 2, "most of a trained model's layers say what all of them say"
