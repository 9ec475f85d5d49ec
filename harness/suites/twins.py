"""The generative twin of a multiple-choice task: the model writes its answer, which is then matched with the choices.

Distilled models keep likelihoods better than what they write, so both are shown side by side. A twin asks with the very
prompts of the likelihood form, few-shot examples and chat template included.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance

WORD = re.compile(r"(?<!\w)[-+]?\d+(?:[.,]\d+)*\w*|\w+")
"""A number has its sign and its point."""
GOES_ON = re.compile(r"\w|(?<=\d)[.,]\d")
"""What stands where a word or number does not end yet."""
BEHIND = r"(?=\s*$|[^\w\s]+(?:\s|$)|\s+[-–—:=(]|\s+(?:is|because|since)\b)"
"""What may stand behind a letter that is a label."""
NAMING = r"\b(?:answer|option|choice|letter|is|be|choose|pick|select)|'s"
"""Words that a label may follow."""
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
    """The choice that an answer gives: the longest that it begins with, or else the only one that it holds outside of
    longer ones. Space does not count; case and punctuation do where choices differ in nothing else. Choices that are
    single letters are labels (`label_of`). None where there is no such choice.

    >>> match(" Red wine, I think", ["red", "red wine", "white wine"])
    1
    >>> match("cats or dogs", ["dogs", "cats and dogs", "cats"])
    2
    >>> match("either dogs or cats", ["dogs", "cats"]) is None
    True
    >>> match("It is C++.", ["C", "C#", "C++"]), match("-5", ["5", "-5"]), match("The answer is B.", ["A", "B", "C"])
    (2, 1, 1)
    """
    forms = [" ".join(choice.split()) for choice in choices]
    if forms and all(len(form) == 1 and form.isalpha() for form in forms):
        return label_of(answer, forms)
    said, held = _Text.of(answer), set[int]()
    wanted = [_Text.of(form) for form in forms]
    at = 0
    while at < len(said.text):
        found, end = _begun(said, at, wanted)
        if found and at == 0:
            return found[0] if len(found) == 1 else None
        held.update(found)
        at = end if found else said.behind_word(at)
    return held.pop() if len(held) == 1 else None


def label_of(answer: str, labels: Sequence[str]) -> int | None:
    """The label that an answer begins with, else the only one that it names (`the answer is B`, `option B`), else the
    only one in brackets. Case counts, and a letter with a word behind it is no label, since `A dog` has an article:
    lm-eval's generative MMLU takes nothing but the letter, its MMLU-Pro and chain-of-thought tasks those two forms.
    An answer of nothing but several labels gives none.

    >>> [label_of(text, "ABCD") for text in ("B", "B. Paris", "(B) Paris", "B is right", "I'd say the answer is B!")]
    [1, 1, 1, 1, 1]
    >>> [label_of(text, "ABCD") for text in ("It is a dog", "A dog", "b", "Vitamin C", "A. B. C.", "not (A) but (B)")]
    [None, None, None, None, None, None]
    """
    letter = f"([{re.escape(''.join(labels))}])"
    if re.fullmatch(rf"(?:[\W_]|\b(?:and|or)\b|\b{letter}\b)*", answer):
        alone = set(re.findall(rf"\b{letter}\b", answer))
        return labels.index(alone.pop()) if len(alone) == 1 else None
    for form in (rf"^[^\w\s]*\s?{letter}{BEHIND}", rf"(?i:{NAMING})\b\W*?{letter}{BEHIND}", rf"\({letter}\)"):
        found = set(re.findall(form, answer.strip()))
        if found:
            return labels.index(found.pop()) if len(found) == 1 else None
    return None


def twin_metrics(sample: Mapping[str, Any], answer: str, choices: Sequence[str], metric: str) -> dict[str, float]:
    """What an item's written answer is worth, beside the likelihood form's `metric` of the same item."""
    chosen = match(answer, choices)
    value = float(chosen in right_choices(sample["target"], choices))
    found = {"generated": value, "no_answer": float(chosen is None)}
    if metric in sample["metrics"]:
        found["gap"] = float(sample[metric]) - value
    return found


class _Text(NamedTuple):
    text: str
    folded: str
    """Without case, letter by letter, so that places stay the same."""
    words: list[str]
    ends: list[tuple[int, int]]
    """Where the words begin and end."""

    @classmethod
    def of(cls, raw: str) -> _Text:
        text = " ".join(raw.split())
        folded = "".join(low if len(low := letter.casefold()) == 1 else letter for letter in text)
        words = list(WORD.finditer(folded))
        return cls(text, folded, [word.group() for word in words], [word.span() for word in words])

    def behind_word(self, at: int) -> int:
        """Where the next word ends; the text's end where there is none."""
        number = self.word_from(at)
        return self.ends[number][1] if number < len(self.words) else len(self.text)

    def word_from(self, at: int) -> int:
        """The number of the first word that begins at a place or behind it."""
        return bisect_left(self.ends, (at, 0))


def _begun(said: _Text, at: int, choices: Sequence[_Text]) -> tuple[list[int], int]:
    """Which choices begin at a place of a text, punctuation before its next word aside, and where they end. The one
    that begins first counts, of these the longest, and of these one that agrees in punctuation, then in case."""
    number = said.word_from(at)
    first = said.ends[number][0] if number < len(said.words) else len(said.text)
    fits = []
    for place, choice in enumerate(choices):
        fits += [
            ((-begin, end, len(choice.text), said.text.startswith(choice.text, begin)), place)
            for begin in range(at, first + 1)
            if choice.text and said.folded.startswith(choice.folded, begin)
            if not GOES_ON.match(said.folded, end := begin + len(choice.text))
        ]
        behind = number + len(choice.words)
        if choice.words and said.words[number:behind] == choice.words:
            fits.append(((-first, said.ends[behind - 1][1], 0, False), place))
    best = max((fit for fit, _ in fits), default=(0, at, 0, False))
    return sorted({place for fit, place in fits if fit == best}), best[1]
