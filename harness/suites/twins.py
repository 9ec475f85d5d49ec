"""The generative twin of a multiple-choice task: the model writes its answer, which is then matched with the choices.

Distilled models keep likelihoods better than what they write, so both are shown side by side. A twin asks with the very
prompts of the likelihood form, few-shot examples and chat template included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

MOST_TOKENS = 256
SPARE_TOKENS = 8
"""Tokens that an answer may have beyond the longest choice: models write words around it."""


def twin_requests(task: Any, tokens: Any) -> dict[int, Instance]:
    """One request for each item of a multiple-choice task that was evaluated, by the item's number; none where the
    choices stand in the prompt's place, the task scores by rules of its own, or there is no prompt to answer.

    `tokens(text)` gives a text's tokens.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or callable(task.config.process_results):
        return {}
    prompts = {instance.doc_id: instance for instance in task.instances if instance.idx == 0}
    if not all(instance.args[0].strip() for instance in prompts.values()):
        return {}
    longest = max((len(tokens(choice)) for of in prompts.values() for choice in task.doc_to_choice(of.doc)), default=0)
    options = {"until": ["\n"], "max_gen_toks": min(longest + SPARE_TOKENS, MOST_TOKENS), "do_sample": False}
    return {
        number: Instance("generate_until", instance.doc, (instance.args[0], options), 0, (task.config.task, number, 1))
        for number, instance in prompts.items()
    }


def right_choices(target: Any, choices: Sequence[str]) -> set[int]:
    """The places of the right choices, from what lm-eval logs as the target: a place, a choice, or a list of them."""
    targets = target if isinstance(target, list) else [target]
    found = set()
    for each in targets:
        if isinstance(each, str):
            found |= {choices.index(each)} if each in choices else ({int(each)} if each.isdecimal() else set())
        else:
            found.add(int(each))
    return found


def match(answer: str, choices: Sequence[str]) -> int | None:
    """The choice that an answer gives: the longest that it begins with, or else the only one that it holds. Case, space
    and punctuation do not count. None where there is no such choice.

    >>> match(" Red wine, I think", ["red", "red wine", "white wine"])
    1
    >>> match("The answer is B.", ["A", "B", "C"])
    1
    >>> match("cats or dogs", ["dogs", "cats and dogs", "cats"])
    2
    >>> match("either dogs or cats", ["dogs", "cats"]) is None
    True
    """
    said = _words(answer)
    forms = [_words(choice) for choice in choices]
    begun = [at for at, form in enumerate(forms) if form and said[: len(form)] == form]
    if begun:
        most = max(len(forms[at]) for at in begun)
        longest = [at for at in begun if len(forms[at]) == most]
        return longest[0] if len(longest) == 1 else None
    held = [at for at, form in enumerate(forms) if form and _holds(said, form)]
    return held[0] if len(held) == 1 else None


def twin_metrics(sample: Mapping[str, Any], answer: str, choices: Sequence[str], metric: str) -> dict[str, float]:
    """What an item's written answer is worth, beside the likelihood form's `metric` of the same item."""
    chosen = match(answer, choices)
    value = float(chosen in right_choices(sample["target"], choices))
    found = {"generated": value, "no_answer": float(chosen is None)}
    if metric in sample["metrics"]:
        found["gap"] = float(sample[metric]) - value
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold()) or text.split()


def _holds(said: Sequence[str], form: Sequence[str]) -> bool:
    return any(list(said[at : at + len(form)]) == list(form) for at in range(len(said) - len(form) + 1))
