"""MT-Bench, single grading: two turns of 80 questions in eight categories, rated 1 to 10 by a judge, after FastChat.

Questions, the judge's prompts and the reference answers for math, reasoning and coding come from a folder of the
user's, since fschat is installed without them. A verdict without a rating is no score: it is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..documents import Message
from ..interfaces import Bench, MambabenchError
from ..judges import Request, ask, check
from .answering import (
    Answerer,
    Question,
    answers_of,
    item_of,
    read_records,
    recorded,
    recorded_name,
    with_fields,
)
from .chat_configs import MtBenchConfig

TASK = "mt_bench"
WHERE = "they are in FastChat's repository: fastchat/llm_judge/data"
RATINGS = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")
"""What is asked for, and what is taken where it is missing."""
LEAST, MOST = 1, 10
REFERENCED = ("math", "reasoning", "coding")
"""Categories whose answers the judge sees beside a reference."""
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Answers of the other categories that the benchmark has are greedy."""
GREEDY = ("extraction", "math", "coding", "reasoning")
OTHERS = 0.7
"""The temperature of categories that somebody adds."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of one or two turns."""

    number: int
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]
    """The reference's answers, one a turn; empty where the judge needs none."""

    @property
    def temperature(self) -> float:
        return 0.0 if self.category in GREEDY else TEMPERATURES.get(self.category, OTHERS)

    def item(self, turn: int) -> str:
        return item_of(str(turn), *self.turns)


class Prompt(NamedTuple):
    system: str
    template: str


class Folder(NamedTuple):
    questions: list[Asked]
    prompts: dict[str, Prompt]


class MtBench:
    def __init__(self, config: MtBenchConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        config, model = self.config, recorded_name(bench, self.config)
        folder = read_folder(bench.data[config.data], config.reference)
        questions = folder.questions[: config.limit or None]
        ratings: dict[str, float | None]
        if config.judgments:
            file = recorded(bench.data[config.judgments], model)
            texts = read_judgments(file, model)
            left = [name for question in questions for name in _names(question) if name not in texts]
            if left:
                raise MambabenchError(f"{file}: {len(left)} judgments of {model!r} are missing, the first of {left[0]}")
            ratings = {name: _rating_or_none(text) for name, text in texts.items()}
        else:
            assert config.judge is not None
            check(config.judge, bench)
            answers = self._answers(bench, questions)
            verdicts = ask(config.judge, requests(questions, answers, folder.prompts), bench)
            ratings = {verdict.id: verdict.value if verdict.state == "ok" else None for verdict in verdicts}
        emit_scores(bench, questions, ratings)

    def _answers(self, bench: Bench, questions: Sequence[Asked]) -> dict[str, str]:
        """Texts by `name`; the second turn sees the first with its answer."""
        config, model = self.config, recorded_name(bench, self.config)
        if config.answers:
            file = recorded(bench.data[config.answers], model)
            answers = read_answers(file)
            left = [name for question in questions for name in _names(question) if name not in answers]
            if left:
                raise MambabenchError(f"{file}: {len(left)} answers are missing, the first to {left[0]}")
            return answers
        answerer = Answerer(bench, config, TASK)
        answers = {}
        for turn in (1, 2):
            answers |= answerer.answer(
                [
                    Question(
                        id=name(question.number, turn),
                        messages=chat(question, answers, turn),
                        temperature=question.temperature,
                    )
                    for question in questions
                    if len(question.turns) >= turn
                ]
            )
        answerer.emit_facts()
        return answers


def name(number: int, turn: int) -> str:
    """How answers and judgments of a turn are called.

    >>> name(81, 2)
    '81/turn 2'
    """
    return f"{number}/turn {turn}"


def chat(question: Asked, answers: Mapping[str, str], turn: int) -> tuple[Message, ...]:
    """What the model sees when it answers a turn."""
    messages = [Message("user", question.turns[0])]
    for later in range(1, turn):
        messages += [
            Message("assistant", answers[name(question.number, later)]),
            Message("user", question.turns[later]),
        ]
    return tuple(messages)


def requests(questions: Iterable[Asked], answers: Mapping[str, str], prompts: Mapping[str, Prompt]) -> list[Request]:
    """What the judge is asked: a prompt for each turn, of which the second has the whole chat."""
    asked = []
    for question in questions:
        for turn in range(1, len(question.turns) + 1):
            prompt = prompts["single" + ("-math" if question.references else "") + "-v1" + "-multi-turn" * (turn - 1)]
            text = prompt.template.format_map(_fields(question, answers, turn))
            messages = (*([Message("system", prompt.system)] if prompt.system else []), Message("user", text))
            asked.append(
                Request(id=name(question.number, turn), messages=messages, read=lambda reply: rate(reply.text))
            )
    return asked


def rate(text: str) -> float:
    """The rating in a judgment. Raises ValueError where there is none on the scale.

    >>> rate("Good. Rating: [[7.5]]"), rate("Rating: [8]")
    (7.5, 8.0)
    """
    match = next((match for form in RATINGS if (match := form.search(text))), None)
    if match is None:
        raise ValueError("no rating like [[5]]")
    rating = float(match.group(1))
    if not LEAST <= rating <= MOST:
        raise ValueError(f"the rating {rating:g} is not from {LEAST} to {MOST}")
    return rating


def emit_scores(bench: Bench, questions: Sequence[Asked], ratings: Mapping[str, float | None]) -> None:
    """Emits ratings: all together, those of each turn and of each category. The turns of a question are one cluster."""
    turns = [(question, turn) for question in questions for turn in range(1, len(question.turns) + 1)]
    metrics = ["score", "turn 1", "turn 2", *dict.fromkeys(question.category for question in questions)]
    for metric in metrics:
        for question, turn in turns:
            rating = ratings[name(question.number, turn)]
            if rating is not None and metric in ("score", f"turn {turn}", question.category):
                emit_sample(bench, question, turn, metric=metric, value=rating, unit="points")
    for question, turn in turns:
        missing = float(ratings[name(question.number, turn)] is None)
        emit_sample(bench, question, turn, metric="no_verdict", value=missing, better="lower")


def emit_sample(bench: Bench, question: Asked, turn: int, **fields: Any) -> None:
    bench.emit("sample", task=TASK, item=question.item(turn), cluster=question.item(1), **fields)


def read_folder(folder: Path, reference: str) -> Folder:
    """Questions with their references, and the judge's prompts. Raises `MambabenchError` naming what is missing."""
    for needed in ("question.jsonl", "judge_prompts.jsonl"):
        if not (folder / needed).is_file():
            raise MambabenchError(f"{folder}: has no {needed}, which MT-Bench needs; {WHERE}")
    prompts = {
        record["name"]: Prompt(record["system_prompt"], record["prompt_template"])
        for record in read_records(folder / "judge_prompts.jsonl", ("name", "system_prompt", "prompt_template"))
    }
    records = read_records(folder / "question.jsonl", ("question_id", "category", "turns"))
    known: Mapping[str, str] = {}
    if any(record["category"] in REFERENCED for record in records):
        file = folder / "reference_answer" / f"{reference}.jsonl"
        if not file.is_file():
            raise MambabenchError(f"{file}: no such file; the judge needs reference answers for math; {WHERE}/mt_bench")
        known = read_answers(file)
    questions = []
    for record in records:
        number, turns = record["question_id"], tuple(record["turns"])
        if not 1 <= len(turns) <= 2:
            raise MambabenchError(f"{folder / 'question.jsonl'}: question {number} has {len(turns)} turns, not 1 or 2")
        shown = [name(number, turn + 1) for turn in range(len(turns))] if record["category"] in REFERENCED else []
        if left := [each for each in shown if each not in known]:
            raise MambabenchError(f"{folder / 'reference_answer'}: {reference}.jsonl has no answer to {left[0]}")
        questions.append(Asked(number, record["category"], turns, tuple(known[each] for each in shown)))
    wanted = {"single" + kind + "-v1" + turn for kind in ("", "-math") for turn in ("", "-multi-turn")}
    if lacking := sorted(wanted - prompts.keys()):
        raise MambabenchError(f"{folder / 'judge_prompts.jsonl'}: lacks the prompt {lacking[0]!r}; {WHERE}")
    return Folder(questions, prompts)


def read_answers(file: Path) -> dict[str, str]:
    """Recorded answers by `name`: FastChat's, of which the first choice counts, or a step's records."""
    records = read_records(file)
    answers = answers_of(records)
    if answers:
        return answers
    for record in with_fields(records, file, ("question_id", "choices")):
        for turn, text in enumerate(record["choices"][0]["turns"], 1):
            answers[name(record["question_id"], turn)] = text
    return answers


def read_judgments(file: Path, model: str) -> dict[str, str]:
    """Recorded judgments by `name`: FastChat's of one model, the only one or the one of that name."""
    records = read_records(file, ("question_id", "model", "turn", "judgment"))
    models = sorted({record["model"] for record in records})
    if len(models) > 1 and model not in models:
        raise MambabenchError(f"{file}: has judgments of {', '.join(models)}; the model is called {model!r}")
    return {
        name(record["question_id"], record["turn"]): record["judgment"]
        for record in records
        if len(models) == 1 or record["model"] == model
    }


def _names(question: Asked) -> list[str]:
    return [name(question.number, turn + 1) for turn in range(len(question.turns))]


def _rating_or_none(text: str) -> float | None:
    try:
        return rate(text)
    except ValueError:
        return None


def _fields(question: Asked, answers: Mapping[str, str], turn: int) -> dict[str, str]:
    """What the placeholders of a judge's prompt stand for."""
    given = [answers[name(question.number, each + 1)] for each in range(turn)]
    fields = {f"ref_answer_{place}": text for place, text in enumerate(question.references[:turn], 1)}
    if turn == 1:
        return {**fields, "question": question.turns[0], "answer": given[0]}
    for place, (text, answer) in enumerate(zip(question.turns, given, strict=True), 1):
        fields |= {f"question_{place}": text, f"answer_{place}": answer}
    return fields
