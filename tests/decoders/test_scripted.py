import pytest
from mambabench.decoders import rounds
from mambabench.decoders.plugin import ModelConfig, ScriptedConfig
from mambabench.decoders.scripted import acceptance, scripted
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.stepping import ModelDraft
from mambabench.harness.conformance_decoders import answer_with_records, check_decoder, check_records
from mambabench.harness.interfaces import Limits, Prompt, Unsupported
from mambabench.harness.metrics import mean_accepted_length
from mambabench.harness.mockmodel import MockStepper

from .hybrids import hybrid


@pytest.mark.parametrize(("k", "tokens"), [(4, 3.0), (4, 3.9), (1, 1.5), (8, 2.0)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_have_the_tokens_that_were_asked_for(k, tokens, temperature):
    decoder = scripted(ScriptedConfig(k=k, tokens=tokens, look=3))
    prompts = [Prompt((1, 2), row) for row in range(40)]
    limits = Limits(new_tokens=200, temperature=temperature)
    answers, records = answer_with_records(decoder, MockStepper(), prompts, limits)
    check_records(records, answers)
    accepted = [r["accepted"] for r in records if r["kind"] == "round"]
    assert mean_accepted_length(accepted) == pytest.approx(tokens, rel=0.05)
    assert {r["drafted"] for r in records if r["kind"] == "round"} == {k}
    assert {r["scripted"] for r in records if r["kind"] == "round"} == {acceptance(tokens, k)}


def test_limits_and_records_are_kept_though_the_text_means_nothing():
    check_decoder(scripted(ScriptedConfig()), lossless=False)


def test_rounds_by_chance_are_the_same_whatever_takes_tokens_back():
    target, prompts, limits = hybrid("a2a1"), [Prompt((1, 2)), Prompt((3,), 1)], Limits(new_tokens=20)
    ways = [scripted(ScriptedConfig(k=3, tokens=2.5, rollback=rollback)) for rollback in ("replay", "snapshot")]
    one, two = (answer_with_records(way, target, prompts, limits) for way in ways)
    assert one[0] == two[0]
    assert [r for r in one[1] if r["kind"] == "round"] == [r for r in two[1] if r["kind"] == "round"]
    with pytest.raises(Unsupported, match="rollback = 'snapshot'"):
        answer_with_records(ways[1], MockStepper(), prompts, limits)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_rate_gives_the_tokens(k):
    for tokens in (1.01, (k + 2) / 2, k + 0.99):
        rate = acceptance(tokens, k)
        assert sum(rate**place for place in range(k + 1)) == pytest.approx(tokens)


class Small(ModelDraft):
    """A toy model as the draft of any toy model."""

    def __init__(self):
        super().__init__(ModelConfig(model="small"))

    def model(self, target):
        return MockStepper(seed=9, letters=target.tokenizer.letters)


def test_sampled_drafts_are_judged_as_ever_and_then_stand_by_chance(monkeypatch):
    judged = []

    def finish(*given):
        judged.append((given[2].shape[1], given[6]))
        finish_rejected(*given)

    finish_rejected = rounds.finish_rejected
    monkeypatch.setattr(rounds, "finish_rejected", finish)
    prompts = [Prompt((1, 2), row) for row in range(40)]
    decoder = SpeculativeDecoder(Small(), 3, script=acceptance(2.5, 3))
    answers, records = answer_with_records(decoder, MockStepper(), prompts, Limits(new_tokens=100, temperature=1.0))
    check_records(records, answers)
    accepted = [r["accepted"] for r in records if r["kind"] == "round"]
    assert mean_accepted_length(accepted) == pytest.approx(2.5, rel=0.05)
    assert set(judged) == {(3 + 1, acceptance(2.5, 3))}, "one draft more, to be judged in the bonus token's place"
