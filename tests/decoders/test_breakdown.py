"""A round taken apart: every part is counted, and nothing twice."""

import time

import pytest
import torch
from mambabench.decoders import breakdown as module
from mambabench.decoders.breakdown import DRAFT, REST, TARGET, apart, breakdown, section
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import LayersConfig
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.stepping import LayersDraft
from mambabench.harness.cli.generate import shares
from mambabench.harness.interfaces import Limits, Prompt, silent
from mambabench.harness.mockmodel import MockStepper
from mambabench.kernels.rounds import MARK

from .hybrids import hybrid

TIMES = ("draft kernels", "target kernels", "picks and bookkeeping", "between kernels", "waiting for the host")


class Slow(MockStepper):
    """Takes its time."""

    def advance(self, ids, start, state, settle=True):
        time.sleep(0.004)
        return super().advance(ids, start, state, settle)


class SlowDraft(NgramDraft):
    def follow_into(self, state, texts, k):
        time.sleep(0.002)
        with section(REST):
            time.sleep(0.001)
        return super().follow_into(state, texts, k)


def test_each_part_of_a_round_has_its_time():
    decoder, limits = SpeculativeDecoder(SlowDraft(), 3, look=2), Limits(new_tokens=12)
    figures = decoder.profile(Slow(), [Prompt((1, 2, 1))], limits, 5)
    times = {name: value for name, (value, unit) in figures.items() if unit == "s"}
    assert set(times) == {*TIMES, "whole"}
    assert times["target kernels"] > 0.004
    assert times["draft kernels"] > 0.002
    assert times["picks and bookkeeping"] > 0.001
    assert sum(times[name] for name in TIMES) == pytest.approx(times["whole"])
    share = figures["not in draft or target, share"][0]
    assert share == pytest.approx(1 - (times["target kernels"] + times["draft kernels"]) / times["whole"])
    assert not module._watches


def test_the_parts_are_shown_beside_the_whole():
    figures = {"whole": (0.002, "s"), "target kernels": (0.0015, "s"), "a share": (0.25, ""), "kernels": (411.0, "")}
    figures |= {"kernels beside the models": (2.0, "")}
    assert shares(figures) == [
        "[whole              2.0000 ms  100.0%]",
        "[target kernels     1.5000 ms   75.0%]",
        "[kernels               411, 2 beside the models]",
    ]
    assert shares({"kernels": (3.0, "")}) == ["[kernels          3]"], "as a plug-in may tell it"
    assert shares({}) == []


def test_a_round_without_a_draft_has_none():
    figures = StandardDecoder().profile(MockStepper(), [Prompt((1,)), Prompt((2, 3))], Limits(new_tokens=5), 3)
    assert figures["draft kernels"] == (0.0, "s")
    assert 0 < figures["target kernels"][0] < figures["whole"][0]


def test_of_a_models_own_loop_nothing_is_known():
    class Own(MockStepper):
        traits = frozenset({"generate"})

    assert StandardDecoder().profile(Own(), [Prompt((1,))], Limits(new_tokens=5), 3) == {}


def test_taking_rounds_apart_changes_no_text():
    model, limits = MockStepper(), Limits(new_tokens=9, temperature=0.7)
    decoder = SpeculativeDecoder(NgramDraft(), 2)
    before = decoder.generate(model, [Prompt((1, 2))], limits, silent)
    breakdown(decoder, model, [Prompt((1, 2))], limits, 4)
    assert decoder.generate(model, [Prompt((1, 2))], limits, silent) == before


def test_kernels_are_sorted_by_the_last_mark():
    ran, at = [], 0.0
    for name, took in (
        *(("copy", 1.0), (MARK + DRAFT, 9.0), ("a", 2.0), (MARK + REST, 9.0), ("pick", 0.5), (MARK + DRAFT, 9.0)),
        *(("a", 3.0), (MARK + TARGET, 9.0), ("b", 4.0), ("b", 4.0), (MARK + REST, 9.0), ("end", 0.25)),
    ):
        ran.append((at, at + took, name))
        at += took + 1
    assert apart(ran[::-1]) == ({DRAFT: 2, TARGET: 2, REST: 3}, {DRAFT: 5.0, TARGET: 8.0, REST: 1.75})


def test_time_in_which_kernels_overlap_is_counted_once():
    ran = [(0.0, 4.0, "a"), (3.0, 7.0, "b"), (3.5, 6.0, "c"), (8.0, 9.0, MARK + TARGET), (8.5, 10.0, "d")]
    assert apart(ran) == ({DRAFT: 0, TARGET: 1, REST: 3}, {DRAFT: 0.0, TARGET: 1.5, REST: 7.0})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "ngram", "layers"])
def test_on_a_gpu_the_profiler_sees_the_parts_of_a_recorded_round(name):
    of = {"plain": None, "ngram": NgramDraft(), "layers": LayersDraft(LayersConfig())}[name]
    decoder = StandardDecoder() if of is None else SpeculativeDecoder(of, 3)
    prompts = [Prompt((1, 2, 3)), Prompt((2, 1))]
    figures = decoder.profile(
        hybrid("a2a2", "cuda", torch.bfloat16, hidden_size=64, intermediate_size=96, chunk=64),
        prompts,
        Limits(new_tokens=30),
        10,
    )
    print(name, {what: f"{value:.3g} {unit}" for what, (value, unit) in figures.items()})
    assert figures["kernels"][0] == round(figures["kernels"][0]) > 10
    # The end of the round alone: the vocabulary is small.
    assert figures["kernels beside the models"][0] == 1
    assert (figures["draft kernels"][0] > 0) == (of is not None)
    assert figures["target kernels"][0] > 0
    assert 0 < figures["picks and bookkeeping"][0] < figures["whole"][0]
