r"""What a model gives as its answer to a reasoning question, and whether it is the right one, after ZeroEval.

ZeroEval asks for a JSON object with the fields `reasoning` and `answer`. It takes the first complete object, and where
that is no JSON or has no answer, what stands behind the word in the text. A fraction is read here rather than evaluated
as Python is, and no model is read in a way of its own.

>>> find_answer('{"reasoning": "6 * 7", "answer": "42 miles"}')
Found(value='42 miles', well_formed=True)
>>> find_answer('So { "answer": "4"2" }')
Found(value='4', well_formed=False)
>>> find_answer('I do not know.') is None
True
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

NUMBER = re.compile(r"-?\d+(\.\d+)?")
QUOTIENT = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*/\s*(-?\d+(?:\.\d+)?)\s*")
FORMS = (
    re.compile(r'"answer"\s*:\s*"([^"]*?)"'),
    re.compile(r'"answer"\s*:\s*"(.*?)"', re.DOTALL),
    re.compile(r'"answer"\s*:\s*([^,\s]*)'),
    re.compile(r"answer\s*:\s*([^,\s]*)"),
)
"""How an answer may stand in text that is no JSON, by preference."""
QUOTES = "'\""


class Found(NamedTuple):
    value: Any
    """As JSON has it, or the text behind the word."""
    well_formed: bool
    """It is the field `answer` of the first JSON object."""


def find_answer(text: str) -> Found | None:
    """The answer in a text, or None where there is none."""
    whole = first_object(text)
    if whole is not None and "answer" in whole:
        return Found(whole["answer"], True)
    match = next((match for form in FORMS if (match := form.search(text))), None)
    return Found(match.group(1), False) if match else None


def first_object(text: str) -> dict[str, Any] | None:
    """The first text within matching braces, if it is JSON once its line breaks are gone. Braces that close nothing do
    not count, and neither do quotes.

    >>> first_object('a } {"b": {"c": 1}} {')
    {'b': {'c': 1}}
    """
    begin, depth = -1, 0
    for place, letter in enumerate(text):
        if letter == "{":
            begin, depth = (place, 1) if depth == 0 else (begin, depth + 1)
        elif letter == "}" and depth:
            depth -= 1
            if depth == 0:
                try:
                    return dict(json.loads(text[begin : place + 1].replace("\n", "")))
                except (ValueError, RecursionError):
                    return None
    return None


def same_number(answer: Any, gold: str) -> bool:
    """Whether the first numbers of both are equal; `$` and the commas of thousands do not count.

    >>> same_number("$1,080.00 a year", "# 1080"), same_number("3/4", "0.75"), same_number("none", "0")
    (True, True, False)
    """
    own, right = _number(str(answer)), _number(gold.replace("#", ""))
    return own is not None and own == right


def has_number(gold: str) -> bool:
    """Whether there is a number for an answer to be equal to."""
    return _number(gold.replace("#", "")) is not None


def same_text(answer: Any, gold: str) -> bool:
    """Whether the answer is the literal as Python writes it. Quotes around either do not count, and nothing within them
    is no answer: so the recorded runs were scored.

    >>> same_text("abc", "'abc'"), same_text([1, 2], "[1, 2]"), same_text("[1,2]", "[1, 2]")
    (True, True, False)
    >>> same_text("''", "''"), same_text_revised("''", "''")
    (False, True)
    """
    own = str(answer).strip(QUOTES)
    return bool(own) and own == gold.strip(QUOTES)


def same_text_revised(answer: Any, gold: str) -> bool:
    """The same as ZeroEval does it since: empty texts are equal too, and a line break may be written as one."""
    return str(answer).strip(QUOTES).replace("\n", "\\n") == gold.strip(QUOTES)


def _number(text: str) -> float | None:
    text = text.replace("$", "").strip().replace(",", "")
    quotient = QUOTIENT.fullmatch(text)
    if quotient and float(quotient.group(2)):
        return float(quotient.group(1)) / float(quotient.group(2))
    match = NUMBER.search(text)
    return float(match.group()) if match else None
