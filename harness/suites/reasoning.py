"""GSM8K and CRUXEval output prediction as ZeroEval has them: a chat that asks for reasoning and an answer in JSON.

Every question counts: one without an answer is wrong, and how many there are stands beside the accuracy. Answers are
read as text (`extraction`); nothing that a model wrote is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..answering import Answerer, Question, answers_file, answers_of, by_name, item_of, read_records, read_text
from ..documents import Message
from ..interfaces import Bench, MambabenchError, Review
from .chat_configs import ReasoningConfig, ReasoningQuestionsConfig
from .extraction import find_answer, has_number, same_number, same_text, same_text_revised

REPLY = (
    "Work it out step by step. Then write one JSON object and nothing behind it, with two texts: `reasoning`, how you "
    "got there, and `answer`, the result alone. The result of two plus two would be\n\n"
    '{"reasoning": "Two and two make four.", "answer": "4"}\n'
)
WORDINGS = {
    "gsm8k": "{question}\n\n" + REPLY,
    "crux": "A Python function, be it right or wrong, and an assertion about a call of it:\n\n"
    "```python\n{code}\nassert f({input}) == ??\n```\n\n"
    "Which literal makes the assertion true in place of the question marks?\n\n" + REPLY,
}
"""How a problem is put where no file says so: in words of our own."""
IDS = {"gsm8k": "gsm8k-main-test-#{}", "crux": "crux-test-#{}"}
FIELDS = {"gsm8k": ("question", "answer"), "crux": ("code", "input", "output")}
PLACES = {"gsm8k": ("question",), "crux": ("code", "input")}
"""Parts of a problem that its wording has a place for."""
RULES: Mapping[str, Mapping[str, Callable[[Any, str], bool]]] = {
    "gsm8k": {"exact_match": same_number},
    "crux": {"exact_match": same_text, "exact_match_revised": same_text_revised},
}


@dataclass(frozen=True, slots=True)
class Problem:
    id: str
    """As ZeroEval calls it."""
    question: str
    gold: str
    prompt: str = ""
    """What is asked; nothing of a problem whose answer is recorded."""


class ReasoningQuestions:
    """Has a model answer in a chat."""

    def __init__(self, config: ReasoningQuestionsConfig) -> None:
        self.config = config

    def answer(self, bench: Bench) -> None:
        config = self.config
        wording = read_wording(bench.data[config.prompt], config.task) if config.prompt else ""
        problems = read_problems(bench.data[config.data], config.task, wording)[: config.limit or None]
        answerer = Answerer(bench, config, config.task)
        answerer.answer([Question(id=each.id, messages=(Message("user", each.prompt),)) for each in problems])
        answerer.emit_facts()


class Reasoning:
    def __init__(self, config: ReasoningConfig) -> None:
        self.config = config

    def judge(self, review: Review) -> None:
        """Scores by rule: answers are matched, and nobody is asked."""
        config = self.config
        problems = read_problems(review.data[config.data], config.task) if config.data else None
        problems, answers, left = read_answers(answers_file(review, config), problems)
        if config.answers:
            review.emit("fact", name="questions without a recorded answer", value=left, unit="questions")
        for problem in problems[: config.limit or None]:
            for metric, value in score(config.task, answers[problem.id], problem.gold).items():
                better = "higher" if metric.startswith("exact_match") else "lower"
                item = item_of(problem.id, problem.question)
                review.emit("sample", task=config.task, item=item, metric=metric, value=float(value), better=better)


def score(task: str, text: str, gold: str) -> dict[str, bool]:
    """Whether an answer is right by the rules of a task, whether there is none, and whether it is not in the form that
    was asked for (which having none is a case of)."""
    found = find_answer(text)
    right = {name: found is not None and same(found.value, gold) for name, same in RULES[task].items()}
    return {**right, "no_answer": found is None, "malformed": found is None or not found.well_formed}


def read_wording(file: Path, task: str) -> str:
    """How a problem is put. Raises `MambabenchError` where a part of it has no place in the file."""
    wording = read_text(file)
    for name in PLACES[task]:
        if f"{{{name}}}" not in wording:
            raise MambabenchError(f"{file}: has no {{{name}}}, where that of a problem of {task} would stand")
    return wording


def read_problems(file: Path, task: str, wording: str = "") -> list[Problem]:
    """Problems as GSM8K and CRUXEval publish them, put in our words if in no others. Raises `MambabenchError` for a
    file of something else."""
    problems = []
    for number, record in enumerate(read_records(file)):
        if not all(isinstance(record.get(name), str) for name in FIELDS[task]):
            raise MambabenchError(f"{file}: item {number} lacks the texts {', '.join(FIELDS[task])} of {task}")
        problem = problem_of(record, task, number, wording or WORDINGS[task])
        if task == "gsm8k" and ("####" not in record["answer"] or not has_number(problem.gold)):
            raise MambabenchError(f"{file}: `answer` of item {number} must end with #### and a number, its result")
        problems.append(problem)
    return problems


def problem_of(record: Mapping[str, Any], task: str, number: int, wording: str) -> Problem:
    """A record of GSM8K or CRUXEval, as published, put in a wording."""
    if task == "gsm8k":
        question, gold = record["question"], record["answer"].rpartition("####")[2].strip()
    else:
        question, gold = f"{record['code']}\nassert f({record['input']}) == ??", record["output"]
    # In one pass, since a problem may have braces of its own.
    places = "|".join(PLACES[task])
    prompt = re.sub(rf"\{{({places})\}}", lambda place: str(record[place[1]]), wording)
    return Problem(IDS[task].format(number), question, gold, prompt)


def read_answers(file: Path, problems: Sequence[Problem] | None) -> tuple[list[Problem], dict[str, str], int]:
    """The problems that have a recorded answer, the answers, and how many problems have none. What ZeroEval recorded
    has its problems with it."""
    records = read_records(file)
    answers = answers_of(records, file)
    if not answers:
        wrong = next((number for number, record in enumerate(records) if not _by_zeroeval(record)), None)
        if wrong is not None or not records:
            raise MambabenchError(f"{file}: item {wrong or 0} is neither an answer by ZeroEval nor a record of one")
        answers = by_name(((record["id"], record["output"][0]) for record in records), file)
        problems = problems or [Problem(record["id"], record["question"], record["answer"]) for record in records]
    if problems is None:
        raise MambabenchError(f"{file}: answers without their questions, which the option `data` names")
    found = [problem for problem in problems if problem.id in answers]
    if not found:
        raise MambabenchError(f"{file}: has no answer to any of the questions; the first is {problems[0].id!r}")
    return found, answers, len(problems) - len(found)


def _by_zeroeval(record: Mapping[str, Any]) -> bool:
    texts = record.get("output")
    return all(isinstance(record.get(name), str) for name in ("id", "question", "answer")) and (
        isinstance(texts, list) and bool(texts) and isinstance(texts[0], str)
    )
