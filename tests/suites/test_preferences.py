"""Pairs of answers by the log-probabilities that a model gives them, from their definition."""

import math

import numpy as np
import pytest
from mambabench.harness.documents import encode_ended, read_preferences
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.configs import PreferencesConfig
from mambabench.harness.suites.preferences import Preferences

PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "gfa"},
    {"prompt": "g", "chosen": "abcabc", "rejected": "a", "cut": True},
    {"prompt": "cc", "chosen": "d", "rejected": "e", "cut": True},
]


def logprob(model, ids, begin):
    total = 0.0
    for place in range(begin, len(ids)):
        logits = model.logits(ids[:place])
        total += logits[ids[place]] - math.log(np.exp(logits).sum())
    return total


@pytest.mark.parametrize("batch", [1, 2])
def test_values_are_those_of_the_definition(measure, tmp_path, batch):
    records = measure(Preferences(PreferencesConfig(data="text", batch=batch)), PAIRS)
    model, expected = MockStepper(), {}
    for pair in read_preferences(tmp_path / "text.jsonl"):
        encoded = [encode_ended(document, model.tokenizer) for document in pair.documents()]
        sums = [logprob(model, ids, begin) for ids, begin in encoded]
        means = [value / (len(ids) - begin) for value, (ids, begin) in zip(sums, encoded, strict=True)]
        expected[pair.item] = {
            "prefers_chosen": float(sums[0] > sums[1]),
            "prefers_chosen_per_token": float(means[0] > means[1]),
            "margin": sums[0] - sums[1],
        }
    found = {}
    for record in records:
        if record["kind"] == "sample":
            found.setdefault(record["item"], {})[record["metric"]] = record["value"]
    assert found.keys() == expected.keys()
    for item, values in expected.items():
        assert found[item] == pytest.approx(values, abs=1e-4)


def test_an_answer_that_was_cut_has_no_end(tmp_path, measure):
    measure(Preferences(PreferencesConfig(data="text")), PAIRS)
    ended, cut, _ = read_preferences(tmp_path / "text.jsonl")
    tokenizer = MockStepper().tokenizer
    for pair, ends in ((ended, True), (cut, False)):
        for document in pair.documents():
            ids, _ = encode_ended(document, tokenizer)
            assert (ids[-1] == tokenizer.eos_token_id) == ends


def test_pairs_beyond_the_context_are_counted(measure):
    long = {"prompt": "abcdefg", "chosen": "a", "rejected": "b"}
    suite = Preferences(PreferencesConfig(data="text", context=7))
    records = measure(suite, [*PAIRS, long])
    assert [record["value"] for record in records if record["kind"] == "fact"] == [1]
    with pytest.raises(MambabenchError, match="no pair whose answers begin within context = 7"):
        measure(suite, [long])
