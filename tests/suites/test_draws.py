"""Sampled text is held against plain decoding by its distribution."""

import dataclasses

import pytest
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.harness.interfaces import Answer, MambabenchError
from mambabench.harness.suites.configs import LosslessnessConfig
from mambabench.harness.suites.draws import in_batches, of_likelihoods, of_tokens, requests
from mambabench.harness.suites.losslessness import Losslessness
from scipy.special import gammaincc

TEXTS = ["abcabcabc", "gggfgggf", "edcba"]
CONFIG = LosslessnessConfig(
    data="text", prompts=3, prompt_tokens=4, new_tokens=5, batch=(4, 32), temperature=1.0, draws=400
)


def probability(records, metric):
    drawn = [r for r in records if r["kind"] == "sample" and r["metric"] == f"chi_square_{metric}"]
    assert {r["task"] for r in drawn} == {"temperature 1"}
    assert len(drawn) == 3
    return gammaincc(sum(r["weight"] for r in drawn) / 2, sum(r["value"] for r in drawn) / 2)


def test_draws_that_leave_no_token_to_compare_are_refused():
    with pytest.raises(ValueError, match="draws is 256; texts of 64 new_tokens need at least 630"):
        LosslessnessConfig(data="text", temperature=1.0)
    assert LosslessnessConfig(data="text", temperature=1.0, draws=630).draws == 630


def test_speculation_draws_from_the_distribution_of_plain_decoding(measure, lookup, plain):
    records = measure(Losslessness(CONFIG), TEXTS, lookup, plain)
    assert min(probability(records, metric) for metric in ("tokens", "likelihood")) > 1e-3
    rounds = [r for r in records if r["kind"] == "round"]
    assert {r["temperature"] for r in rounds} == {1.0}
    assert {r["batch"] for r in rounds} == {4, 32, 200 % 32}


def test_with_another_seed_both_arms_draw_by_other_numbers_and_no_two_by_the_same(measure, plain):
    seeds = set()

    class Seen:
        def generate(self, model, prompts, limits, emit):
            seeds.add(limits.seed)
            return plain.generate(model, prompts, limits, emit)

    for seed in range(3):
        measure(Losslessness(dataclasses.replace(CONFIG, prompts=1, seed=seed)), TEXTS, Seen(), Seen())
    assert seeds == {0, 1, 2, 3, 4, 5}


def test_a_decoder_that_stops_early_is_an_error(measure, plain):
    class Short:
        def generate(self, model, prompts, limits, emit):
            return [Answer((1,), "a", "length") for _ in prompts]

    with pytest.raises(MambabenchError, match="yielded 1 tokens, not the 5"):
        measure(Losslessness(CONFIG), TEXTS, Short(), plain)


def test_a_decoder_that_draws_from_another_distribution_shows(measure, plain):
    class Cool:
        def generate(self, model, prompts, limits, emit):
            return plain.generate(model, prompts, dataclasses.replace(limits, temperature=0.7), emit)

    assert probability(measure(Losslessness(CONFIG), TEXTS, Cool(), plain), "likelihood") < 1e-6


def test_drafts_that_always_stand_show(measure, lookup, plain):
    always = SpeculativeDecoder(lookup.draft, 3, script=0.999)
    records = measure(Losslessness(CONFIG), TEXTS, always, plain)
    assert max(probability(records, metric) for metric in ("tokens", "likelihood")) < 1e-6


def test_each_draw_has_random_numbers_of_its_own_and_each_batch_size_a_part():
    prompts = requests((1, 2), 3, 10)
    assert [prompt.sequence for prompt in prompts] == list(range(30, 40))
    sizes = []

    def ask(chosen):
        sizes.append(len(chosen))
        return [Answer((prompt.sequence,), "", "length") for prompt in chosen]

    assert [a.ids[0] for a in in_batches(ask, prompts, (2, 4))] == list(range(30, 40))
    assert sizes == [2, 2, 1, 4, 1]


@pytest.mark.parametrize(("other", "value"), [(1, 0.0), (2, 200.0)])
def test_each_text_gives_one_token_and_never_its_first(other, value):
    one, two = ([Answer((0, token, token), "", "length")] * 100 for token in (1, other))
    assert of_tokens(one, two, 3)[0] == value


def test_texts_as_likely_are_alike_and_likelier_ones_are_not():
    values = [number / 7 for number in range(160)]
    assert of_likelihoods(values, values) == (0.0, 7)
    value, freedom = of_likelihoods(values, [value + 23 for value in values])
    assert (value, freedom) == (320.0, 7)
