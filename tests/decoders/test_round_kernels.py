"""Whole rounds by kernels, in Triton's interpreter: the text is that of the plain forms, and nothing else is launched
beside the models."""

from contextlib import contextmanager, nullcontext

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.play import Rounds
from mambabench.decoders.plugin import ModelConfig
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.stepping import ModelDraft
from mambabench.harness.conformance_decoders import answer_with_records
from mambabench.harness.interfaces import Limits, Prompt
from mambabench.harness.mockmodel import MockStepper
from mambabench.kernels.rounds import fused
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty"}


class Launches(TorchDispatchMode):
    """Counts what would be kernels of a GPU: ours, and operations of PyTorch that are more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.held = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.held and not func.is_view and name not in ALLOCATES:
            self.names.append(name)
        return func(*args, **kwargs or {})

    @contextmanager
    def hold(self):
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1


class Quiet(MockStepper):
    """Its own operations do not count."""

    launches: Launches | None = None

    def advance(self, *args, **named):
        if self.launches is None:
            return super().advance(*args, **named)
        with self.launches.hold():
            return super().advance(*args, **named).clone()


class Picking(Quiet):
    """Picks the last draft itself, as part of its call."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.traits = self.traits | {"picks"}

    def advance(self, ids, start, state, settle=True, last=None):
        if last is not None:
            with self.launches.hold() if self.launches else nullcontext():
                ids[:, -1] = last.argmax(1)
        return super().advance(ids, start, state, settle)


class Small(ModelDraft):
    """A toy model of the same vocabulary as the draft of any toy model."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(model="small"))
        self.made: Quiet | None = None

    def model(self, target):
        self.made = self.made or type(target)(seed=9, letters=target.tokenizer.letters, habit=0.5)
        return self.made


@pytest.fixture
def launched(interpret, monkeypatch):
    """Rounds run by kernels, but for filters, which take the interpreter long; the list has the names of those that
    ran."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    modules = {name: interpret(name) for name in (fused.MODULE, fused.DRAWING)}
    monkeypatch.setattr("mambabench.kernels.rounds.chosen", lambda name, support: name != "keep")
    monkeypatch.setattr("mambabench.kernels.rounds.kernel", lambda module, name: getattr(modules[module], name))
    launches, run = Launches(), interpreter.GridExecutor.__call__

    def call(self, *args, **named):
        launches.names.append(self.fn.__name__)
        with launches.hold():
            return run(self, *args, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    return launches


DRAFTS = {"plain": None, "ngram": NgramDraft, "model": Small}
prompts = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts,
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([(), (2,)]),
    st.sampled_from([{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 3, "top_p": 0.9}]),
    st.sampled_from([{}, {"look": 2}, {"steady": False}, {"window": 1}, {"script": 0.6}]),
)
@pytest.mark.parametrize("draft", [*DRAFTS, "picks"])
def test_the_text_is_that_of_the_plain_forms(
    launched, monkeypatch, draft, prompts, k, new_tokens, stops, sampling, options
):
    limits = Limits(new_tokens=new_tokens, stop_tokens=stops, seed=k, **sampling)
    asked = [Prompt(tuple(ids), 3 * row) for row, ids in enumerate(prompts)]

    def answers():
        of, kind = (Small, Picking) if draft == "picks" else (DRAFTS[draft], Quiet)
        decoder = StandardDecoder() if of is None else SpeculativeDecoder(of(), k, **options)
        given, records = answer_with_records(decoder, kind(seed=1, letters="abc"), asked, limits)
        # Adaptive K goes by the clock: of its rounds only the text is sure.
        return given, [] if options.get("window") else [record for record in records if record["kind"] == "round"]

    ours = answers()
    with monkeypatch.context() as plain:
        plain.setattr("mambabench.kernels.rounds.chosen", lambda *given: False)
        assert ours == answers()


GREEDY, SAMPLED = {}, {"temperature": 0.9}
DRAW = ["_mass", "_draw"]


@pytest.mark.parametrize(
    ("draft", "sampling", "options", "names"),
    [
        ("picks", GREEDY, {}, ["_finish_greedy"]),
        ("picks", GREEDY, {"script": 0.5}, ["_finish_greedy"]),
        ("plain", GREEDY, {}, ["_finish_greedy"]),
        ("plain", SAMPLED, {}, [*DRAW, "_finish"]),
        ("ngram", GREEDY, {}, ["_match", "_finish_greedy"]),
        ("ngram", GREEDY, {"script": 0.5}, ["_match", "_finish_greedy"]),
        ("ngram", SAMPLED, {}, ["_match", *DRAW, "_finish"]),
        ("model", GREEDY, {}, [*["_largest"] * 4, "_finish_greedy"]),
        ("model", GREEDY, {"script": 0.5}, [*["_largest"] * 4, "_finish_greedy"]),
        ("model", SAMPLED, {"steady": False}, [*DRAW * 4, "_mass", "_judge", "_after"]),
        ("model", SAMPLED, {}, [*DRAW * 5, "_mass", "_judge", "_after"]),
        ("model", SAMPLED, {"script": 0.5}, [*DRAW * 5, "_mass", "_judge", "_after"]),
    ],
)
def test_so_many_kernels_run_beside_the_models(launched, draft, sampling, options, names):
    of, kind = (Small, Picking) if draft == "picks" else (DRAFTS[draft], Quiet)
    given = {} if of is None else {"draft": of(), **options}
    model, asked = kind(seed=1, letters="abc"), [Prompt((1, 2, 1)), Prompt((2,), 1)]
    rounds = Rounds(model, asked, Limits(new_tokens=40, **sampling), 1 if of is None else 5, **given)
    rounds.prefill()
    if of is not None:
        rounds.open_draft()
    for stepper in (model, getattr(rounds.draft, "made", None)):
        if stepper is not None:
            stepper.launches = launched
    launched.names.clear()
    with launched:
        rounds.play(rounds.k)
    assert launched.names == names
