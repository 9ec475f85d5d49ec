import dataclasses

import pytest
from mambabench.harness import metrics
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.configs import LosslessnessConfig
from mambabench.harness.suites.losslessness import Losslessness

TEXTS = ["abcabcabc", "gggfgggf", "edcba", "abababab", "fedfedfed"]
CONFIG = LosslessnessConfig(data="text", prompts=7, prompt_tokens=6, new_tokens=20, batch=(1, 3))


def values(records, metric):
    return [(r["value"], r["weight"]) for r in records if r["kind"] == "sample" and r["metric"] == metric]


def test_speculative_text_equals_plain_text_at_every_batch_size(measure, lookup, plain):
    records = measure(Losslessness(CONFIG), TEXTS, lookup, plain)
    assert values(records, "equal") == [(1.0, 1)] * 14
    assert {r["task"] for r in records if r["kind"] == "sample"} == {"batch 1", "batch 3"}
    parallel = values(records, "parallel_argmax")
    assert len(parallel) == 7
    assert all(value == weight for value, weight in parallel)


def test_facts_are_those_of_the_rounds(measure, lookup, plain):
    records = measure(Losslessness(CONFIG), TEXTS, lookup, plain)
    rounds = [r for r in records if r["kind"] == "round"]
    facts = {r["name"]: r["value"] for r in records if r["kind"] == "fact"}
    assert facts["mean accepted length"] == metrics.mean_accepted_length([r["accepted"] for r in rounds])
    assert 0 < facts["rounds that accept a draft token"] < 1
    assert 0 < facts["rounds that reject a draft token"] < 1
    keys = [(r["arm"], r["block"], r["row"], r["round"]) for r in rounds]
    assert len(set(keys)) == len(keys)


def test_a_decoder_that_changes_the_text_shows(measure, lookup, plain):
    class Warm:
        def generate(self, model, prompts, limits, emit):
            return plain.generate(model, prompts, dataclasses.replace(limits, temperature=1.0), emit)

    records = measure(Losslessness(CONFIG), TEXTS, Warm(), plain)
    assert any(value == 0.0 for value, _ in values(records, "equal"))
    assert any(value < weight for value, weight in values(records, "parallel_argmax"))


def test_plain_decoding_is_held_against_itself_and_loads_float64(measure, plain):
    loaded = []

    class Counted(MockStepper):
        def __init__(self):
            super().__init__()
            loaded.append(self)

    records = measure(Losslessness(CONFIG), TEXTS, plain, make=Counted)
    assert values(records, "equal") == [(1.0, 1)] * 14
    assert not [r for r in records if r["kind"] in ("round", "fact")]
    assert len(loaded) == 1


def test_prompts_cannot_be_had_from_nothing(measure, plain):
    with pytest.raises(MambabenchError, match="no documents"):
        measure(Losslessness(CONFIG), [], plain)
    with pytest.raises(MambabenchError, match="without a decoder"):
        measure(Losslessness(CONFIG), TEXTS, None)
