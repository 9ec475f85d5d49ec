"""Does a decoder keep its contract? `check_decoder(decoder)` is the one line that a third party's test needs.

It runs the decoder on a toy model that recomputes its logits from the whole text at every call, so that a token that is
fed twice, left out or put in the wrong place shows. Needs torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .interfaces import Answer, Decoder, Limits, Prompt, Stepper, Tokenizer, Unsupported, silent
from .mockmodel import MockStepper

PROMPTS = ("abcabcab", "g", "fedf", "aaaaa")


STOPS = (((), ()), ((0, 3), ()), ((), ("ab", "dd")), ((), ("fg", "$")))
"""Stop tokens and stop strings; `$` is how the toy model's end of text is written."""
SAMPLING = (
    Limits(new_tokens=3, temperature=0.7, top_k=3, top_p=0.8, seed=5),
    Limits(new_tokens=3, temperature=1.3, seed=5),
)
SAMPLES = 2000
FEW = 60


def check_decoder(decoder: Decoder, *, lossless: bool = True) -> None:
    """Raises AssertionError where the decoder breaks its contract.

    Checks limits, the decoded text, stop tokens and stop strings, ragged batches, well-formed bursts and rounds, that
    the same call gives the same answer, and that sampled answers depend on the seed and on the prompt's sequence number
    but not on the batch. With `lossless`, greedy text must be the model's own, token for token, and sampled text must
    have the model's distribution behind the filters of the limits (chi-square tests; each fails by chance once in a
    million). A decoder may refuse limits that it does not serve (`Unsupported`).
    """
    for seed, (stop_tokens, stop_strings) in itertools.product(range(6), STOPS):
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
    for limits in SAMPLING:
        try:
            check_sampling(decoder, limits, lossless)
        except Unsupported:
            continue


def check_sampling(decoder: Decoder, limits: Limits, lossless: bool) -> None:
    """Checks the answers to one prompt that is asked many times, under different sequence numbers."""
    model = MockStepper(seed=1, letters="abc", habit=0.3)
    prompts = [Prompt((1, 2, 1), 3 * number + 1) for number in range(SAMPLES)]
    answers, records = answer_with_records(decoder, model, prompts, limits)
    check_answers(answers, prompts, limits, model)
    check_records(records, answers)
    assert answers == decoder.generate(model, prompts, limits, silent), "the same request gave another answer"
    backwards = decoder.generate(model, prompts[::-1], limits, silent)
    assert answers == backwards[::-1], "the answer to a prompt depends on its place in the batch"
    few, first = prompts[:FEW], answers[:FEW]
    parts = (few[:1], few[1:8], few[8:])
    apart = [answer for part in parts for answer in decoder.generate(model, part, limits, silent)]
    assert first == apart, "the answer to a prompt depends on the other prompts of its batch"
    other = decoder.generate(model, few, dataclasses.replace(limits, seed=limits.seed + 1), silent)
    assert first != other, "another seed gave the same answers"
    if lossless:
        p = distribution_p(model, prompts[0].ids, limits, [answer.ids for answer in answers])
        assert p > 1e-6, f"sampled text does not have the model's distribution (chi-square: p = {p:.1e}, {limits})"


def answer_with_records(
    decoder: Decoder, model: Stepper, prompts: Sequence[Prompt], limits: Limits
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Runs a decoder and keeps what it emits, each record with its `kind`."""
    records: list[dict[str, Any]] = []

    def emit(kind: str, /, **fields: Any) -> None:
        records.append({"kind": kind, **fields})

    return decoder.generate(model, prompts, limits, emit), records


def check_answers(answers: Sequence[Answer], prompts: Sequence[Prompt], limits: Limits, model: MockStepper) -> None:
    """Checks that every answer keeps the limits, and that its text is that of its tokens."""
    assert len(answers) == len(prompts), f"{len(prompts)} prompts, {len(answers)} answers"
    for answer in answers:
        stops = [token in limits.stop_tokens for token in answer.ids]
        assert 1 <= len(answer.ids) <= limits.new_tokens, f"{len(answer.ids)} tokens; the limit is {limits.new_tokens}"
        assert not any(stops[:-1]), f"text goes on after a stop token: {answer.ids}"
        shown = answer.ids[:-1] if stops[-1] else answer.ids
        begin, end = stop_string(shown, limits, model.tokenizer)
        assert end == len(shown), f"text goes on after a stop string: {answer.ids}"
        text = model.tokenizer.decode(shown[:begin], skip_special_tokens=True)
        assert answer.text == text, f"the text is {answer.text!r}, that of the tokens is {text!r}"
        stopped = stops[-1] or begin < end
        if answer.finish == "stop":
            assert stopped, f"finished by a stop, but there is none: {answer}"
        else:
            assert answer.finish == "length", f"unknown finish {answer.finish!r}"
            assert len(answer.ids) == limits.new_tokens, f"finished by length after {len(answer.ids)} tokens"
            assert not stopped, f"finished by length, but there is a stop: {answer}"


def stop_string(ids: Sequence[int], limits: Limits, tokenizer: Tokenizer) -> tuple[int, int]:
    """Where the stop string that comes first begins and ends, of a tokenizer with one token a character; without one
    both are the number of tokens."""

    def within(part: Sequence[int], string: str) -> bool:
        return any(string in tokenizer.decode(part, skip_special_tokens=skip) for skip in (False, True))

    for end in range(1, len(ids) + 1):
        found = [string for string in limits.stop_strings if within(ids[:end], string)]
        begins = [max(begin for begin in range(end) if within(ids[begin:end], string)) for string in found]
        if begins:
            return min(begins), end
    return len(ids), len(ids)


def check_records(records: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> None:
    """Checks that bursts add up to the answers, and rounds (where there are any) to the bursts."""
    kept: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] in ("burst", "round"):
            kept.setdefault((record["kind"], record["row"]), []).append(record)
    for row, answer in enumerate(answers):
        bursts, rounds = kept.get(("burst", row), []), kept.get(("round", row), [])
        times = [0.0, *(r["at_s"] for r in bursts)]
        assert [r["burst"] for r in bursts] == list(range(len(bursts))), "bursts of a row are numbered from 0"
        assert times == sorted(times), "times of bursts do not decrease"
        assert all(r["tokens"] >= 1 for r in bursts), "a burst has at least one token"
        total = sum(r["tokens"] for r in bursts)
        assert total == len(answer.ids), f"bursts hold {total} tokens, the answer {len(answer.ids)}"
        if rounds:
            assert [r["round"] for r in rounds] == list(range(len(rounds))), "rounds of a row are numbered from 0"
            assert all(0 <= r["accepted"] <= r["drafted"] for r in rounds), "0 <= accepted <= drafted"
            made = [r["accepted"] + 1 for r in rounds]
            sums = list(itertools.accumulate(made, initial=0))
            ends = list(itertools.accumulate(r["tokens"] for r in bursts[1:]))
            assert set(ends[:-1]) <= set(sums), "a burst holds the tokens of whole rounds"
            assert len(bursts) > 1, "one burst for the prompt and one for the rounds that become known at once"
            assert sums[-2] < ends[-1] <= sums[-1], "only the text's end cuts a round, and it cannot add to it"


def greedy_ids(model: MockStepper, prompt: Prompt, limits: Limits) -> tuple[int, ...]:
    """The model's own greedy continuation, by full recomputation."""
    text, new = list(prompt.ids), list[int]()
    while len(new) < limits.new_tokens:
        new.append(int(model.logits([*text, *new]).argmax()))
        if new[-1] in limits.stop_tokens or stop_string(new, limits, model.tokenizer)[0] < len(new):
            break
    return tuple(new)


def distribution_p(
    model: MockStepper, prompt: Sequence[int], limits: Limits, samples: Sequence[tuple[int, ...]]
) -> float:
    """p-value of a chi-square test of sampled texts (no stops) against the model's exact distribution behind the
    filters of the limits; 0 if one of them is impossible. Cells that expect fewer than five texts are counted together.
    """
    from scipy.stats import chi2

    counts = Counter(samples)
    cells: list[tuple[float, int]] = []
    rest_expected, rest_seen = 0.0, 0
    for text in itertools.product(range(model.vocab_size), repeat=limits.new_tokens):
        p = 1.0
        for place, token in enumerate(text):
            p *= filtered(model.logits([*prompt, *text[:place]]), limits)[token]
        if p == 0 and counts[text]:
            return 0.0
        if p * len(samples) >= 5:
            cells.append((p * len(samples), counts[text]))
        else:
            rest_expected += p * len(samples)
            rest_seen += counts[text]
    if rest_expected > 0:
        cells.append((rest_expected, rest_seen))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def filtered(logits: np.ndarray, limits: Limits) -> np.ndarray:
    """What a token is drawn from, [V]: of softmax(logits / temperature) the `top_k` most probable tokens, and of these
    the fewest whose share reaches `top_p`."""
    weights = np.exp(logits / limits.temperature)
    order = np.argsort(-logits, kind="stable")[: limits.top_k or None]
    shares = weights[order] / weights[order].sum()
    kept = order[np.r_[0.0, shares.cumsum()[:-1]] < limits.top_p]
    out = np.zeros_like(weights)
    out[kept] = weights[kept] / weights[kept].sum()
    return out
