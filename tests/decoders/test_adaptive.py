import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.decoders.adaptive import Chooser, CostTable, cost
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.play import Rounds
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.texts import Texts
from mambabench.harness.conformance_decoders import answer_with_records, check_decoder, check_records
from mambabench.harness.interfaces import Limits, Prompt, silent
from mambabench.harness.mockmodel import MockStepper


def settled(chance, costs, rounds=200):
    """The K that is chosen where exactly this share of drafts stands at each position."""
    chooser = Chooser(costs, window=10)
    for number in range(rounds):
        place = (number % 10 + 0.5) / 10
        stood = next((count for count in range(chooser.k) if place > chance ** (count + 1)), chooser.k)
        chooser.next([[stood]])
    return chooser


@pytest.mark.parametrize(
    ("chance", "costs", "best"),
    [
        (0.95, [1.1, 1.2, 1.3, 1.4, 1.5, 1.6], 6),
        (0.05, [1.1, 1.2, 1.3, 1.4, 1.5, 1.6], 1),
        (0.95, [1.0, 2.0, 3.0, 4.0], 1),
        (0.95, [1.1, 1.2, 9.0, 9.1], 2),
    ],
)
def test_the_k_of_the_least_time_per_token_is_chosen(chance, costs, best):
    assert settled(chance, costs).k == best


def test_expected_tokens_are_those_that_came():
    chooser = Chooser([1.0, 1.1, 1.2], window=1000)
    accepted = [3, 1, 0, 2, 3, 3, 0, 1] * 125
    chooser.next([[count] for count in accepted])
    assert chooser.tokens(3) == pytest.approx(1 + sum(accepted) / len(accepted), rel=0.01)


def test_the_prediction_stands_beside_the_measurement():
    facts = []
    chooser = settled(0.5, [1.0, 1.1, 1.2])
    chooser.report(lambda kind, /, **fields: facts.append((fields["name"], fields["value"])))
    told = dict(facts)
    assert [told[f"cost of a round, K = {k}"] for k in (1, 2, 3)] == [1.0, 1.1, 1.2]
    predicted, measured = (told[f"adaptive K, {kind} tokens of a round"] for kind in ("predicted", "measured"))
    assert predicted == pytest.approx(measured, rel=0.1)
    assert told["adaptive K, predicted time per token"] == pytest.approx(
        told["adaptive K, predicted time of a round"] / predicted
    )


def test_a_request_of_one_window_has_nothing_to_compare():
    facts = []
    chooser = Chooser([1.0], window=10)
    chooser.next([[1]])
    chooser.report(lambda kind, /, **fields: facts.append(fields["name"]))
    assert facts == ["cost of a round, K = 1"]


def test_costs_are_measured_once_for_a_kind_of_request_of_a_model():
    played = []

    def seconds(k, count):
        played.append(k)
        return k / 8

    costs, model, limits = CostTable(), MockStepper(), Limits(new_tokens=1)
    first = costs.of(model, 2, 9, limits, 3, seconds)
    assert first == [1 / 8, 2 / 8, 3 / 8]
    assert set(played) == {1, 2, 3}
    count = len(played)
    assert costs.of(model, 2, 15, limits, 3, seconds) == first
    assert len(played) == count
    filtered = [Limits(new_tokens=1, temperature=1.0, **filters) for filters in ({}, {"top_k": 9}, {"top_p": 0.9})]
    others = [(model, 1, 9, limits), (model, 2, 900, limits), *((model, 2, 9, each) for each in filtered)]
    for number, other in enumerate([*others, (MockStepper(), 2, 9, limits)], 2):
        costs.of(*other, 3, seconds)
        assert len(played) == number * count


@pytest.mark.parametrize(
    ("device", "round_s", "in_a_row"), [("cpu", 1e-4, 1), ("cuda:0", 1e-4, 64), ("cuda:0", 5e-3, 4), ("cuda:0", 1.0, 1)]
)
def test_a_sample_of_costs_has_as_many_rounds_as_fit(device, round_s, in_a_row):
    asked = []

    def seconds(k, count):
        asked.append(count)
        return round_s

    assert cost(SimpleNamespace(device=device), 1, seconds) == round_s
    assert asked[-5:] == [in_a_row] * 5


@pytest.mark.parametrize("limits", [Limits(new_tokens=1), Limits(new_tokens=9, stop_tokens=tuple(range(8)))])
def test_nothing_is_measured_for_texts_that_end_with_their_first_token(limits):
    model = MockStepper()
    requests = [Prompt((1, 2, 1)), Prompt((3,))]
    answers, records = answer_with_records(SpeculativeDecoder(NgramDraft(), 3, window=2), model, requests, limits)
    assert answers == StandardDecoder().generate(model, requests, limits, silent)
    assert [record["kind"] for record in records] == ["burst", "burst"]


def test_costs_are_told_of_the_texts_that_are_asked_about(monkeypatch):
    """Whatever the decoder has answered or measured before."""
    monkeypatch.setattr(Rounds, "seconds", lambda rounds, k, count: k * rounds.longest / 8)
    decoder, model, limits = SpeculativeDecoder(NgramDraft(), 2, window=2), MockStepper(), Limits(new_tokens=9)
    for length in (3, 2, 40):
        prompts = [Prompt((1, 2) * (length // 2) + (1,) * (length % 2))]
        decoder.generate(model, prompts, limits, silent)
        assert decoder.costs(model, prompts, limits) == {1: length / 8, 2: length / 4}


@pytest.mark.parametrize(("window", "known"), [(0, [3]), (2, [1, 2, 3])])
def test_costs_are_told_of_every_k_that_may_be_chosen_and_change_no_text(window, known):
    model, limits, requests = MockStepper(), Limits(new_tokens=9), [Prompt((1, 2, 1)), Prompt((3,))]
    decoder = SpeculativeDecoder(NgramDraft(), 3, window=window)
    before, _ = answer_with_records(decoder, model, requests, limits)
    costs = decoder.costs(model, requests, limits)
    assert list(costs) == known
    assert min(costs.values()) > 0
    assert answer_with_records(decoder, model, requests, limits)[0] == before


def test_what_keeps_the_texts_as_they_are_is_no_part_of_a_cost(monkeypatch):
    held = Texts.held

    @contextmanager
    def slowly(texts):
        with held(texts):
            time.sleep(0.05)
            yield
            time.sleep(0.05)

    monkeypatch.setattr(Texts, "held", slowly)
    model, limits, requests = MockStepper(), Limits(new_tokens=9), [Prompt((1, 2, 1))]
    for decoder in (StandardDecoder(), SpeculativeDecoder(NgramDraft(), 2, window=2)):
        assert all(0 < seconds < 0.05 for seconds in decoder.costs(model, requests, limits).values())


def test_rounds_are_timed_on_the_gpu_that_has_the_model(monkeypatch):
    """Which need not be the current one."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            told.append(stream)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 6.0

    model = MockStepper()
    rounds = StandardDecoder().rounds(model, [Prompt((1, 2, 1))], Limits(new_tokens=9))
    rounds.prefill()
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device=None: f"stream of {device}")
    model.device = "cuda:1"
    assert rounds.seconds(0, 3) == 2e-3
    assert told == ["stream of cuda:1"] * 2


def test_a_plain_step_has_a_cost_unless_the_model_has_a_loop_of_its_own():
    class Own(MockStepper):
        traits = frozenset({"generate"})

    request = [Prompt((1, 2))], Limits(new_tokens=4)
    (k,) = StandardDecoder().costs(MockStepper(), *request)
    assert k == 0
    assert StandardDecoder().costs(Own(), *request) == {}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=9), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_text_is_the_same_with_a_k_that_changes(prompts, k, window, look, seed):
    model, limits = MockStepper(seed=seed), Limits(new_tokens=25, stop_tokens=(0,))
    requests = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    wanted, _ = answer_with_records(SpeculativeDecoder(NgramDraft(), k), model, requests, limits)
    decoder = SpeculativeDecoder(NgramDraft(), k, window=window, look=look)
    answers, records = answer_with_records(decoder, model, requests, limits)
    assert answers == wanted
    check_records(records, answers)
    assert all(r["drafted"] <= k for r in records if r["kind"] == "round")


def test_an_adaptive_decoder_conforms():
    check_decoder(SpeculativeDecoder(NgramDraft(), 2, window=2))
