"""The conformance check of decoders must catch broken ones."""

import dataclasses

import pytest
import torch
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.conformance_decoders import check_decoder
from mambabench.harness.interfaces import Prompt


class Wrapped(StandardDecoder):
    """Spoils what a correct decoder does, in one way."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def generate(self, model, prompts, limits, emit):
        return self.spoil(super().generate, model, prompts, limits, emit)


def forgets_stop_tokens(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, stop_tokens=()), emit)


def ignores_the_limit(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, new_tokens=limits.new_tokens + 1), emit)


def emits_nothing(generate, model, prompts, limits, emit):
    return generate(model, prompts, limits, lambda kind, /, **fields: None)


def samples_too_hot(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, temperature=1.25 * limits.temperature), emit)


def samples_when_greedy(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, temperature=limits.temperature or 0.5), emit)


def gives_no_text(generate, model, prompts, limits, emit):
    return [dataclasses.replace(answer, text="") for answer in generate(model, prompts, limits, emit)]


def shows_special_tokens(generate, model, prompts, limits, emit):
    answers = generate(model, prompts, limits, emit)
    if limits.stop_tokens or limits.stop_strings:
        return answers
    return [dataclasses.replace(answer, text=model.tokenizer.decode(answer.ids)) for answer in answers]


def forgets_filters(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, top_k=0, top_p=1.0), emit)


def filters_without_top_p(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, top_p=1.0), emit)


def forgets_the_seed(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, seed=0), emit)


def draws_by_place(generate, model, prompts, limits, emit):
    return generate(model, [Prompt(prompt.ids, row) for row, prompt in enumerate(prompts)], limits, emit)


def draws_by_size(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, seed=limits.seed + len(prompts)), emit)


def knows_one_temperature(generate, model, prompts, limits, emit):
    return generate(model, prompts, dataclasses.replace(limits, temperature=float(limits.temperature > 0)), emit)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (forgets_stop_tokens, "stop token|finish"),
        (ignores_the_limit, "the limit is"),
        (emits_nothing, "bursts hold 0 tokens"),
        (samples_too_hot, "distribution"),
        (samples_when_greedy, "differs from the model's"),
        (gives_no_text, "the text is ''"),
        (shows_special_tokens, r"the text is '.*\$"),
        (forgets_filters, "distribution"),
        (filters_without_top_p, "distribution"),
        (forgets_the_seed, "another seed"),
        (draws_by_place, "place in the batch"),
        (draws_by_size, "other prompts of its batch"),
        (knows_one_temperature, "distribution"),
    ],
)
def test_a_broken_decoder_is_caught(spoil, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_decoder(Wrapped(spoil))


def test_positions_off_by_one_are_caught(monkeypatch):
    from mambabench.harness.mockmodel import MockStepper

    straight = MockStepper.advance

    def late(self, ids, start, state, settle=True):
        return straight(self, torch.cat([ids, ids], 1)[:, :1], start + 1, state, settle)

    monkeypatch.setattr(MockStepper, "advance", late)
    with pytest.raises(AssertionError, match="broke the stepping contract"):
        check_decoder(StandardDecoder())
