"""The judge `tiny`: knows the tiny world's instructions, and judges answers to them by rule, as MT-Bench and AlpacaEval
ask for it. No model, no endpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...harness.judges import Desk, Reply, Request, Verdict
from ...harness.judges.reading import Failure, resolve
from ..plugin import TinyJudgeConfig
from .instructions import read_chat, solve

NAME = "tiny rules"
SINGLE = re.compile(
    r"\[Question\]\n(.*?)\n\n\[The Start of Assistant's Answer\]\n(.*?)\n\[The End of Assistant's Answer\]", re.DOTALL
)
TURNS = re.compile(r"### User:\n(.*?)\n\n### Assistant A:\n(.*?)\n\n(?=###|<\|)", re.DOTALL)
"""FastChat's two layouts of a judge's prompt."""
INSTRUCTION = re.compile(r'"instruction": """(.*?)"""', re.DOTALL)
OUTPUT = re.compile(r'"output": """(.*?)"""', re.DOTALL)
"""AlpacaEval's."""
DOUBT = 0.02
"""How likely the worse answer is said to be the better one; AlpacaEval reads probabilities."""


class TinyJudge:
    def __init__(self, config: TinyJudgeConfig) -> None:
        self.config = config

    def judge(self, requests: Sequence[Request], desk: Desk) -> list[Verdict]:
        return [resolve(request, NAME, {}, 0, _answer) for request in requests]


def _answer(asked: Mapping[str, Any]) -> tuple[Reply, bool]:
    try:
        return reply(asked["body"]["messages"][-1]["content"]), True
    except ValueError as error:
        raise Failure(str(error)) from None


def reply(prompt: str) -> Reply:
    """A rating of the last answer in FastChat's prompts, a preference in AlpacaEval's. Raises ValueError for others.

    >>> reply("[Question]\\nlast of balomu kuzidi tirova\\n\\n[The Start of Assistant's Answer]\\ntirova\\n"
    ...       "[The End of Assistant's Answer]").text
    'Rating: [[10]]'
    """
    instruction, outputs = INSTRUCTION.search(prompt), OUTPUT.findall(prompt)
    if instruction and len(outputs) == 2:
        turns = [instruction[1]]
        first, second = (share_right(turns, output) for output in outputs)
        chance = 0.5 if first == second else 1 - DOUBT if first > second else DOUBT
        likeliest = {"m": math.log(chance), "M": math.log(1 - chance)}
        return Reply(text=max(likeliest, key=likeliest.__getitem__), top_logprobs=(likeliest,), model=NAME)
    found = SINGLE.findall(prompt) or TURNS.findall(prompt)
    if not found:
        raise ValueError("neither FastChat's prompt nor AlpacaEval's, which the rules know")
    rating = 1 + 9 * share_right([question for question, _ in found], found[-1][1])
    return Reply(text=f"Rating: [[{rating:.3g}]]", model=NAME)


def share_right(turns: Sequence[str], answer: str) -> float:
    """The share of words that are the right ones in their places, of the answer's or the right one's, whichever has
    more. Raises ValueError for turns that the language does not know."""
    right, given = solve(read_chat(turns)), answer.split()
    equal = sum(one == other for one, other in zip(right, given, strict=False))
    return equal / max(len(right), len(given))
