"""Does a decoder keep its contract? `check_decoder(decoder)` is the one line that a third party's test needs.

It runs the decoder on a toy model that recomputes its logits from the whole text at every call, so that a token that is
fed twice, left out or put in the wrong place shows. Needs torch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .interfaces import Answer, Decoder, Limits, Prompt, Stepper, silent
from .mockmodel import MockStepper

PROMPTS = ("abcabcab", "g", "fedf", "aaaaa")


def check_decoder(decoder: Decoder, *, lossless: bool = True) -> None:
    """Raises AssertionError where the decoder breaks its contract.

    Checks limits, stop tokens and stop strings, ragged batches, well-formed bursts and rounds, and that the same call
    gives the same answer. With `lossless`, greedy text must be the model's own, token for token, and sampled text must
    have the model's distribution (chi-square test, fails by chance once in a million).
    """
    stops = (((), ()), ((0, 3), ()), ((), ("ab", "dd")))
    for seed, (stop_tokens, stop_strings) in itertools.product(range(6), stops):
        model = MockStepper(seed=seed, levels=3 if seed % 2 else 0)
        limits = Limits(new_tokens=5 + 4 * seed, stop_tokens=stop_tokens, stop_strings=stop_strings)
        for count in (1, len(PROMPTS)):
            prompts = [Prompt(tuple(model.tokenizer.encode(text)), row) for row, text in enumerate(PROMPTS[:count])]
            answers, records = answer_with_records(decoder, model, prompts, limits)
            check_answers(answers, prompts, limits, model)
            check_records(records, answers)
            if lossless:
                for prompt, answer in zip(prompts, answers, strict=True):
                    wanted = greedy_ids(model, prompt, limits)
                    assert answer.ids == wanted, f"greedy text differs from the model's: {answer.ids} is not {wanted}"
    model = MockStepper(seed=1, letters="abc", habit=0.3)
    limits = Limits(new_tokens=3, temperature=1.0, seed=5)
    prompts = [Prompt((1, 2, 1), row) for row in range(2000)]
    answers, records = answer_with_records(decoder, model, prompts, limits)
    check_records(records, answers)
    assert answers == decoder.generate(model, prompts, limits, silent), "the same request gave another answer"
    if lossless:
        p = distribution_p(model, prompts[0].ids, limits, [answer.ids for answer in answers])
        assert p > 1e-6, f"sampled text does not have the model's distribution (chi-square: p = {p:.1e})"


def answer_with_records(
    decoder: Decoder, model: Stepper, prompts: Sequence[Prompt], limits: Limits
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Runs a decoder and keeps what it emits, each record with its `kind`."""
    records: list[dict[str, Any]] = []

    def emit(kind: str, /, **fields: Any) -> None:
        records.append({"kind": kind, **fields})

    return decoder.generate(model, prompts, limits, emit), records


def check_answers(answers: Sequence[Answer], prompts: Sequence[Prompt], limits: Limits, model: Stepper) -> None:
    """Checks that every answer keeps the limits."""
    assert len(answers) == len(prompts), f"{len(prompts)} prompts, {len(answers)} answers"
    for answer in answers:
        stops = [token in limits.stop_tokens for token in answer.ids]
        assert 1 <= len(answer.ids) <= limits.new_tokens, f"{len(answer.ids)} tokens; the limit is {limits.new_tokens}"
        assert not any(stops[:-1]), f"text goes on after a stop token: {answer.ids}"
        assert not any(string in answer.text for string in limits.stop_strings), f"stop string in {answer.text!r}"
        whole = model.tokenizer.decode(answer.ids[:-1] if stops[-1] else answer.ids)
        assert whole.startswith(answer.text), f"text {answer.text!r} is not that of the tokens, {whole!r}"
        if answer.finish == "stop":
            assert stops[-1] or answer.text != whole, f"finished by a stop, but there is none: {answer}"
        else:
            assert answer.finish == "length", f"unknown finish {answer.finish!r}"
            assert len(answer.ids) == limits.new_tokens, f"finished by length after {len(answer.ids)} tokens"
            assert not stops[-1], f"finished by length, but the last token is a stop token: {answer}"


def check_records(records: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> None:
    """Checks that bursts add up to the answers, and rounds (where there are any) to the bursts."""
    for row, answer in enumerate(answers):
        bursts = [r for r in records if r["kind"] == "burst" and r["row"] == row]
        rounds = [r for r in records if r["kind"] == "round" and r["row"] == row]
        times = [0.0, *(r["at_s"] for r in bursts)]
        assert [r["burst"] for r in bursts] == list(range(len(bursts))), "bursts of a row are numbered from 0"
        assert times == sorted(times), "times of bursts do not decrease"
        assert all(r["tokens"] >= 1 for r in bursts), "a burst has at least one token"
        total = sum(r["tokens"] for r in bursts)
        assert total == len(answer.ids), f"bursts hold {total} tokens, the answer {len(answer.ids)}"
        if rounds:
            assert [r["round"] for r in rounds] == list(range(len(rounds))), "rounds of a row are numbered from 0"
            assert len(rounds) == len(bursts) - 1, "one burst for the prompt and one for each round"
            assert all(0 <= r["accepted"] <= r["drafted"] for r in rounds), "0 <= accepted <= drafted"
            made = [r["accepted"] + 1 for r in rounds]
            taken = [r["tokens"] for r in bursts[1:]]
            assert made[:-1] == taken[:-1], "a round makes its accepted tokens and one more"
            assert made[-1] >= taken[-1], "only the text's end cuts a round, and it cannot add to it"


def greedy_ids(model: MockStepper, prompt: Prompt, limits: Limits) -> tuple[int, ...]:
    """The model's own greedy continuation, by full recomputation."""
    text, new = list(prompt.ids), list[int]()
    while len(new) < limits.new_tokens:
        new.append(int(model.logits([*text, *new]).argmax()))
        tail = model.tokenizer.decode(new)
        if new[-1] in limits.stop_tokens or any(string in tail for string in limits.stop_strings):
            break
    return tuple(new)


def distribution_p(
    model: MockStepper, prompt: Sequence[int], limits: Limits, samples: Sequence[tuple[int, ...]]
) -> float:
    """p-value of a chi-square test of sampled texts (no stops) against the model's exact distribution; only the
    temperature is applied. Cells that expect fewer than five texts are counted together."""
    from scipy.stats import chi2

    counts = Counter(samples)
    cells: list[tuple[float, int]] = []
    rest_expected, rest_seen = 0.0, 0
    for text in itertools.product(range(model.vocab_size), repeat=limits.new_tokens):
        p = 1.0
        for place, token in enumerate(text):
            weights = np.exp(model.logits([*prompt, *text[:place]]) / limits.temperature)
            p *= weights[token] / weights.sum()
        if p * len(samples) >= 5:
            cells.append((p * len(samples), counts[text]))
        else:
            rest_expected += p * len(samples)
            rest_seen += counts[text]
    if rest_expected > 0:
        cells.append((rest_expected, rest_seen))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    return float(chi2.sf(statistic, len(cells) - 1))
