"""GSM8K and CRUXEval output prediction as ZeroEval puts them: a chat that asks for reasoning and an answer in JSON.

Every question counts: one without an answer is wrong, and how many there are stands beside the accuracy. Answers are
read as text (`extraction`); nothing that a model wrote is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import Message
from ..interfaces import Bench, MambabenchError
from .answering import Answerer, Question, answers_of, item_of, read_records, recorded, recorded_name
from .chat_configs import ReasoningConfig
from .extraction import find_answer, same_number, same_text, same_text_revised

PROMPT = """
## Question: 

{question}


## Instruction 

Please answer this question by first reasoning and then providing your answer.
Present your reasoning and solution in the following json format. 
Please show your final answer in the `answer` field, e.g.,`"answer": "42"`.

```json
{
    "reasoning": "___",
    "answer": "___"
}
```
"""  # noqa: W291
"""ZeroEval's (Apache-2.0) to the letter, spaces at the ends of lines included: a prompt is part of a benchmark."""
CRUX = (
    "You are given a Python function and an assertion containing an input to the function. Complete the assertion with "
    "a literal (no unsimplified expressions, no function calls) containing the output when executing the provided code "
    "on the given input, even if the function is incorrect or incomplete. \n\n"
    "[PYTHON]\n"
)
IDS = {"gsm8k": "gsm8k-main-test-#{}", "crux": "crux-test-#{}"}
FIELDS = {"gsm8k": ("question", "answer"), "crux": ("code", "input", "output")}
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

    @property
    def prompt(self) -> str:
        return PROMPT.replace("{question}", self.question)


class Reasoning:
    def __init__(self, config: ReasoningConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        config = self.config
        problems = read_problems(bench.data[config.data], config.task) if config.data else None
        if config.answers:
            file = recorded(bench.data[config.answers], recorded_name(bench, config))
            problems, answers, left = read_answers(file, problems)
            bench.emit("fact", name="questions without a recorded answer", value=left, unit="questions")
        assert problems is not None
        problems = problems[: config.limit or None]
        if not config.answers:
            answerer = Answerer(bench, config, config.task)
            asked = [Question(id=problem.id, messages=(Message("user", problem.prompt),)) for problem in problems]
            answers = answerer.answer(asked)
            answerer.emit_facts()
        for problem in problems:
            for metric, value in score(config.task, answers[problem.id], problem.gold).items():
                better = "higher" if metric.startswith("exact_match") else "lower"
                item = item_of(problem.id, problem.question)
                bench.emit("sample", task=config.task, item=item, metric=metric, value=float(value), better=better)


def score(task: str, text: str, gold: str) -> dict[str, bool]:
    """Whether an answer is right by the rules of a task, whether there is none, and whether it is not in the form that
    was asked for (which having none is a case of)."""
    found = find_answer(text)
    right = {name: found is not None and same(found.value, gold) for name, same in RULES[task].items()}
    return {**right, "no_answer": found is None, "malformed": found is None or not found.well_formed}


def read_problems(file: Path, task: str) -> list[Problem]:
    """Problems as GSM8K and CRUXEval publish them. Raises `MambabenchError` for a file of something else."""
    problems = []
    for number, record in enumerate(read_records(file)):
        if not all(isinstance(record.get(name), str) for name in FIELDS[task]):
            raise MambabenchError(f"{file}: item {number} lacks the texts {', '.join(FIELDS[task])} of {task}")
        problems.append(problem_of(record, task, number))
    return problems


def problem_of(record: Mapping[str, Any], task: str, number: int) -> Problem:
    """A record of GSM8K or CRUXEval, as published, as ZeroEval puts it."""
    if task == "gsm8k":
        question, gold = record["question"], record["answer"].rpartition("####")[2].strip()
    else:
        question = f"{CRUX}{record['code']}\nassert f({record['input']}) == ??\n[/PYTHON]"
        gold = record["output"]
    return Problem(IDS[task].format(number), question, gold)


def read_answers(file: Path, problems: Sequence[Problem] | None) -> tuple[list[Problem], dict[str, str], int]:
    """The problems that have a recorded answer, the answers, and how many problems have none. What ZeroEval recorded
    has its problems with it."""
    records = read_records(file)
    answers = answers_of(records)
    if not answers:
        wrong = next((number for number, record in enumerate(records) if not _by_zeroeval(record)), None)
        if wrong is not None or not records:
            raise MambabenchError(f"{file}: item {wrong or 0} is neither an answer by ZeroEval nor a record of one")
        answers = {record["id"]: record["output"][0] for record in records}
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
