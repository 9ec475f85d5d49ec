import dataclasses

import pytest
import torch
from mambabench.harness import metrics
from mambabench.harness.interfaces import MambabenchError, Unsupported
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites import near_ties
from mambabench.harness.suites.configs import LosslessnessConfig
from mambabench.harness.suites.losslessness import Losslessness

TEXTS = ["abcabcabc", "gggfgggf", "edcba", "abababab", "fedfedfed"]
CONFIG = LosslessnessConfig(data="text", prompts=7, prompt_tokens=6, new_tokens=20, batch=(1, 3))


LOW = dataclasses.replace(CONFIG, dtype="bfloat16")


def values(records, metric, tasks=("batch 1", "batch 3")):
    samples = [r for r in records if r["kind"] == "sample" and r["metric"] == metric and r["task"] in tasks]
    return [(r["value"], r["weight"]) for r in samples]


def total(records, metric, **of):
    return sum(value for value, _ in values(records, metric, **of))


class Rounded(MockStepper):
    """Logits are off by up to `error`, in calls of each shape by something else."""

    error = 0.05

    def __init__(self):
        super().__init__(habit=0.9, levels=8)

    def prefill(self, ids, lengths, state, start=None):
        return self._off(super().prefill(ids, lengths, state, start), len(ids))

    def advance(self, ids, start, state, settle=True):
        return self._off(super().advance(ids, start, state, settle), *ids.shape)

    def score(self, ids, lengths):
        exact = super().score(ids, lengths)
        off = self._off(torch.zeros(exact.gap.shape), *exact.gap.shape)
        return exact._replace(gap=exact.gap + (off - self.error / 4).clamp(min=0))

    def _off(self, logits, *shape):
        generator = torch.Generator().manual_seed(hash(shape))
        return logits + self.error * (torch.rand(logits.shape, generator=generator) - 0.5)


def test_speculative_text_equals_plain_text_at_every_batch_size(measure, lookup, plain):
    records = measure(Losslessness(CONFIG), TEXTS, lookup, plain)
    assert values(records, "equal") == [(1.0, 1)] * 14
    assert {r["task"] for r in records if r["kind"] == "sample"} == {"plain", "batch 1", "batch 3"}
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


def test_below_float64_near_ties_are_excused_and_counted_in_the_plain_text_too(measure, lookup, plain):
    records = measure(Losslessness(LOW), TEXTS, lookup, plain, make=Rounded)
    assert any(value == 0.0 for value, _ in values(records, "equal"))
    (noise,) = [r["value"] for r in records if r["kind"] == "fact" and r["name"] == "noise"]
    assert Rounded.error / 4 < noise < 2 * Rounded.error
    assert total(records, "beyond_noise") == total(records, "beyond_noise", tasks=("plain",)) == 0
    assert total(records, "excused") > 0
    assert total(records, "excused", tasks=("plain",)) > 0
    weights = [weight for _, weight in values(records, "excused")]
    assert weights == [weight for _, weight in values(records, "beyond_noise")]
    assert len(weights) == 14


def test_noise_is_the_largest_of_all_texts_however_many_are_stepped_at_once(monkeypatch):
    model, texts = Rounded(), [(1, 2, 3, 4, 5), (2, 3, 1, 4, 1), (3, 1, 1, 2, 2), (4, 4, 2, 1, 3), (2, 2, 2, 5, 1)]
    parts = [near_ties.noise(model, part, [2] * len(part)) for part in (texts[:2], texts[2:4], texts[4:])]
    assert len(set(parts)) == 3
    monkeypatch.setattr(near_ties, "ROWS", 2)
    assert near_ties.noise(model, texts, [2] * 5) == max(parts)


def test_below_float64_a_decoder_that_changes_the_text_shows(measure, plain):
    class Warm:
        def generate(self, model, prompts, limits, emit):
            return plain.generate(model, prompts, dataclasses.replace(limits, temperature=1.0), emit)

    records = measure(Losslessness(LOW), TEXTS, Warm(), plain, make=Rounded)
    assert total(records, "beyond_noise") > 0


def test_in_float64_nothing_is_excused(measure, lookup, plain):
    records = measure(Losslessness(CONFIG), TEXTS, lookup, plain)
    assert not values(records, "excused", tasks=("plain", "batch 1", "batch 3"))


def test_a_model_whose_score_tells_no_gaps_is_only_checked_in_float64(measure, lookup, plain):
    class Silent(MockStepper):
        def score(self, ids, lengths):
            return super().score(ids, lengths)._replace(gap=None)

    with pytest.raises(Unsupported, match="gap"):
        measure(Losslessness(LOW), TEXTS, lookup, plain, make=Silent)
    assert measure(Losslessness(CONFIG), TEXTS, lookup, plain, make=Silent)


def test_text_that_loops_has_few_different_runs_of_four_tokens(measure, lookup, plain):
    records = measure(Losslessness(CONFIG), TEXTS, lookup, plain, make=lambda: MockStepper(habit=1.0))
    looping = values(records, "distinct_4grams", tasks=("plain",))
    assert looping == values(records, "distinct_4grams", tasks=("batch 1",))
    assert all(0 < distinct < 12 and runs <= 17 for distinct, runs in looping if runs > 12)
