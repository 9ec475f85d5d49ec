"""Recorded rounds, and rounds that run while the host reads: the text is that of rounds one by one.

Without a GPU a stand-in plays the recorded work again, on the same memory, wherever a graph would be started.
"""

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mambabench.backends import graphs
from mambabench.backends.stepper import HybridStepper
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import LayersConfig, StandardConfig
from mambabench.decoders.results import Results
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.stepping import LayersDraft
from mambabench.harness.cli.generate import WARM_UPS
from mambabench.harness.conformance_decoders import answer_with_records, check_records
from mambabench.harness.interfaces import Limits, Prompt, silent
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.configs import SpeedConfig

from .hybrids import hybrid

MIXERS = "a2a"
PLAIN = hybrid(MIXERS, graphs=False)
READ = graphs.Graphs.read


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which recording each start was of. As with graphs, nothing holds what a request had beside the memory itself."""
    found: list[int] = []

    def capture(self: graphs.Recorder, work: Callable[[], None]) -> Callable[[], None]:
        number, self.count = self.count, self.count + 1
        function, (model, state, *others) = work.func, work.args
        held = replace(state)

        def start() -> None:
            found.append(number)
            with held.graphs.unrecorded():
                function(model, held, *others)

        return start

    monkeypatch.setattr(graphs.Recorder, "capture", capture)
    monkeypatch.setattr(graphs.Graphs, "read", lambda _, work, ids, lengths: work(ids, lengths))
    for module in ("backends.stepper", "decoders.play", "decoders.stepping"):
        monkeypatch.setattr(f"mambabench.{module}.BLOCK", 16)
    return found


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host plays ahead of what it has read."""
    monkeypatch.setattr(Results, "apart", True)


def decoders() -> dict[str, Callable[[], StandardDecoder | SpeculativeDecoder]]:
    return {
        "plain": lambda: StandardDecoder(),
        "looks rarely": lambda: StandardDecoder(StandardConfig(look=3)),
        "ngram": lambda: SpeculativeDecoder(NgramDraft(), 3),
        "layers": lambda: SpeculativeDecoder(LayersDraft(LayersConfig(layers=(0, 2))), 3, look=2),
        "adaptive": lambda: SpeculativeDecoder(LayersDraft(LayersConfig(layers=(0, 2))), 3, window=2),
    }


pairs = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=9), min_size=2, max_size=2)
requests = st.lists(st.tuples(pairs, st.integers(1, 12)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests, st.sampled_from([(), (0, 3)]), st.sampled_from([(), ("ab",)]), st.sampled_from([0.0, 0.8]))
@pytest.mark.parametrize("name", decoders())
def test_texts_are_those_of_rounds_one_by_one(starts, apart, name, requests, stops, strings, temperature):
    decoder, model = decoders()[name](), hybrid(MIXERS, graphs=True)
    for number, (prompts, new_tokens) in enumerate(requests):
        limits = Limits(
            new_tokens=new_tokens, stop_tokens=stops, stop_strings=strings, temperature=temperature, seed=number
        )
        asked = [Prompt(tuple(ids), 5 * number + row) for row, ids in enumerate(prompts)]
        wanted = decoders()[name]().generate(PLAIN, asked, limits, silent)
        answers, records = answer_with_records(decoder, model, asked, limits)
        assert answers == wanted
        check_records(records, answers)


def ask(decoder, model, new_tokens=20, **limits):
    prompts = [Prompt((1, 2, 3)), Prompt((2, 1))]
    return decoder.generate(model, prompts, Limits(new_tokens=new_tokens, **limits), silent)


@pytest.mark.parametrize("name", ["plain", "ngram", "layers"])
def test_a_round_is_recorded_once_for_all_requests(starts, name):
    model, decoder = hybrid(MIXERS, graphs=True), decoders()[name]()
    for seed, stop in ((0, ()), (1, ()), (2, ())):
        ask(decoder, model, seed=seed, temperature=0.5, stop_tokens=stop)
        gc.collect()
    assert model.facts()["graphs"] == (1, "")
    assert set(starts) == {0}
    ask(decoder, model, temperature=0.6)
    assert model.facts()["graphs"] == (2, "")


def test_of_many_kinds_of_rounds_those_used_last_are_kept(starts):
    model, decoder = hybrid(MIXERS, graphs=True), decoders()["plain"]()
    for temperature in (0.1, 0.2, 0.3, 0.4, 0.1, 0.5, 0.1):
        ask(decoder, model, temperature=temperature)
        gc.collect()
    assert model.facts()["graphs"] == (5, "")


@pytest.mark.parametrize("name", ["plain", "layers"])
@pytest.mark.parametrize("warmup", [SpeedConfig(data="text").warmup, WARM_UPS])
def test_what_is_timed_records_nothing_any_more(starts, name, warmup, monkeypatch):
    recorded = []

    def record(self, work, ids, lengths):
        recorded.append(ids.shape)
        # What is read is not looked at here, so that starting it again may do nothing.
        return lambda: None, work(ids, lengths)

    monkeypatch.setattr(graphs.Graphs, "read", READ)
    monkeypatch.setattr(graphs.Recorder, "record", record)
    model, decoder = hybrid(MIXERS, graphs=True), decoders()[name]()
    for _ in range(warmup):
        decoder.generate(model, [Prompt((1, 2, 3, 2))], Limits(new_tokens=12), silent)
    before = len(recorded), model.facts()["graphs"]
    assert before[0] == 1 + (name == "layers")
    decoder.generate(model, [Prompt((2, 3, 1, 2))], Limits(new_tokens=12), silent)
    assert (len(recorded), model.facts()["graphs"]) == before


@pytest.mark.parametrize("name", ["plain", "layers"])
def test_models_are_told_the_lengths_of_prompts(name, monkeypatch):
    """So that a draft's prompt is on its way while the target's is still being read."""
    found, run = [], HybridStepper.prefill

    def prefill(self, ids, lengths, state, start=None, counts=None):
        found.append((counts, lengths.tolist()))
        return run(self, ids, lengths, state, start, counts)

    monkeypatch.setattr(HybridStepper, "prefill", prefill)
    prompts = [Prompt((1, 2, 3, 2)), Prompt((2, 1))]
    decoders()[name]().generate(PLAIN, prompts, Limits(new_tokens=3), silent)
    assert found == [([4, 2], [4, 2]), ([3, 1], [3, 1])][: 1 + (name == "layers")]


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait_before_a_drafts_prompt():
    model, decoder = hybrid(MIXERS, "cuda"), decoders()["layers"]()
    prompts, limits = [Prompt((1, 2, 3, 2) * 9), Prompt((2, 1, 1))], Limits(new_tokens=9)
    wanted = [decoder.generate(model, prompts, limits, silent) for _ in range(3)]
    rounds = decoder.rounds(model, prompts, limits)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rounds.prefill()
        rounds.open_draft()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rounds.first() is not None
    assert wanted[0] == wanted[1] == wanted[2]


@pytest.mark.parametrize("name", decoders())
def test_costs_are_those_of_the_rounds_that_answers_are_made_of(starts, apart, name):
    model, decoder = hybrid(MIXERS, graphs=True), decoders()[name]()
    before, graphs = ask(decoder, model, temperature=0.5), model.facts()["graphs"]
    starts.clear()
    later = [Prompt((1, 2, 3) * 4), Prompt((2, 1, 2) * 4)]
    costs = decoder.costs(model, later, Limits(new_tokens=11, temperature=0.5))
    assert all(0 < seconds < 1 for seconds in costs.values())
    assert name == "adaptive" or set(starts) == {0}
    assert model.facts()["graphs"] == graphs
    assert ask(decoder, model, temperature=0.5) == before


def test_each_k_is_recorded(starts):
    model, decoder = hybrid(MIXERS, graphs=True), decoders()["adaptive"]()
    ask(decoder, model)
    ask(decoder, model)
    assert model.facts()["graphs"] == (3, "")


def test_a_draft_that_asks_on_the_host_is_not_recorded(starts):
    class Asking:
        def open(self, target, prompts, limits, k):
            return k

        def propose(self, k, texts):
            ids = torch.tensor([[text[-1]] * k for text in texts])
            return ids, torch.full((len(texts),), k, dtype=torch.int32), None

    model, limits = hybrid(MIXERS, graphs=True), Limits(new_tokens=9)
    model._recorder.record = None  # calls of their own are not what is asked here
    state_graphs = graphs.Graphs.run
    graphs.Graphs.run = lambda self, work, ids, start, settle: work(ids, start)
    try:
        answers = SpeculativeDecoder(Asking(), 2).generate(model, [Prompt((1, 2))], limits, silent)
    finally:
        graphs.Graphs.run = state_graphs
    assert answers == StandardDecoder().generate(PLAIN, [Prompt((1, 2))], limits, silent)
    assert not starts


def test_no_round_is_played_that_cannot_be_needed(apart):
    for look in (1, 3):
        model = MockStepper()
        (answer,) = StandardDecoder(StandardConfig(look=look)).generate(
            model, [Prompt((1, 2))], Limits(new_tokens=10), silent
        )
        assert len(answer.ids) == model.calls == 10
        model, decoder = MockStepper(seed=3), SpeculativeDecoder(NgramDraft(), 2, look=look)
        _, records = answer_with_records(decoder, model, [Prompt((1, 2, 1, 2))], Limits(new_tokens=40))
        assert 0 <= model.calls - 1 - sum(record["kind"] == "round" for record in records) < look


@pytest.mark.gpu
@pytest.mark.parametrize("name", decoders())
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_on_a_gpu_the_text_is_that_of_the_cpu(name, temperature):
    model, decoder = hybrid(MIXERS, "cuda"), decoders()[name]()
    for seed in range(3):
        limits = Limits(new_tokens=40, stop_tokens=(3,) if seed == 2 else (), temperature=temperature, seed=seed)
        prompts = [Prompt(tuple(range(1, 4 + 2 * row)), 7 * row + seed) for row in range(3)]
        wanted = decoders()[name]().generate(PLAIN, prompts, limits, silent)
        assert decoder.generate(model, prompts, limits, silent) == wanted
    # Stop tokens make it another round, of which a K that is hardly chosen is not recorded.
    assert model.facts()["graphs"][0] in ((3, 4, 5, 6) if name == "adaptive" else (2,))
