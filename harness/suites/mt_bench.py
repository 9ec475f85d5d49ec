"""MT-Bench, single grading: two turns of 80 questions in eight categories, rated 1 to 10 by a judge, after FastChat.

Questions, the judge's prompts and the reference answers for math, reasoning and coding come from a folder of the
user's, since fschat is installed without them. A verdict without a rating is no score: it is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

from ..answering import (
    Answerer,
    Question,
    answers_file,
    answers_of,
    by_name,
    item_of,
    read_records,
    recorded,
    recorded_name,
    with_fields,
)
from ..documents import Message
from ..interfaces import Bench, MambabenchError, Review, Unsupported
from ..judges import Request, ask
from ..judges.reading import on_scale
from ..templates import check_template
from .chat_configs import MtBenchConfig, MtBenchQuestionsConfig

T = TypeVar("T")
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


class MtBenchQuestions:
    """Has a model answer in two turns; the second sees the first with its answer."""

    def __init__(self, config: MtBenchQuestionsConfig) -> None:
        self.config = config

    def answer(self, bench: Bench) -> None:
        questions = read_questions(bench.data[self.config.data])[: self.config.limit or None]
        answerer = Answerer(bench, self.config, TASK)
        answers: dict[str, str] = {}
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


class MtBench:
    def __init__(self, config: MtBenchConfig) -> None:
        self.config = config

    def judge(self, review: Review) -> None:
        config, model = self.config, recorded_name(review, self.config)
        folder = read_folder(review.data[config.data], config.reference)
        questions = folder.questions[: config.limit or None]
        ratings: dict[str, float | None]
        if config.judgments:
            file = recorded(review.data[config.judgments], model)
            texts = complete(read_judgments(file, model), questions, file, f"judgments of {model!r}")
            ratings = {name: _rating_or_none(text) for name, text in texts.items()}
        else:
            assert config.judge is not None
            file = answers_file(review, config)
            answers = complete(read_answers(file), questions, file, "answers")
            verdicts = ask(config.judge, requests(questions, answers, folder.prompts), review)
            ratings = {
                verdict.id: on_scale(verdict.value, LEAST, MOST) if verdict.state == "ok" else None
                for verdict in verdicts
            }
        emit_scores(review, questions, ratings)


def complete(texts: dict[str, T], questions: Sequence[Asked], file: Path, what: str) -> dict[str, T]:
    """The texts by `name`. Raises `MambabenchError` where there is none for a turn of a question."""
    left = [each for question in questions for each in _names(question) if each not in texts]
    if left:
        raise MambabenchError(f"{file}: {len(left)} {what} are missing, the first of {left[0]}")
    return texts


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
            prompt = prompts[prompt_name(bool(question.references), turn)]
            text = prompt.template.format_map(_fields(question, answers, turn))
            messages = (*([Message("system", prompt.system)] if prompt.system else []), Message("user", text))
            asked.append(
                Request(id=name(question.number, turn), messages=messages, read=lambda reply: rate(reply.text))
            )
    return asked


def prompt_name(referenced: bool, turn: int) -> str:
    """How FastChat calls the judge's prompt for a turn.

    >>> prompt_name(True, 2)
    'single-math-v1-multi-turn'
    """
    return "single" + "-math" * referenced + "-v1" + "-multi-turn" * (turn - 1)


def places_of(referenced: bool, turn: int) -> list[str]:
    """What the prompt for a turn may have places for."""
    if turn == 1:
        return ["question", "answer", *["ref_answer_1"] * referenced]
    names = ["question", "answer", *["ref_answer"] * referenced]
    return [f"{name}_{place}" for place in range(1, turn + 1) for name in names]


PROMPTS = {prompt_name(of, turn): places_of(of, turn) for of in (False, True) for turn in (1, 2)}
"""The prompts that a judge needs, with what they may have places for."""


def rate(text: str) -> float:
    """The rating in a judgment, as FastChat reads it. Raises ValueError where there is none on the scale.

    >>> rate("Good. Rating: [[7.5]]"), rate("Rating: [8]"), rate("See [1] and [2]")
    (7.5, 8.0, 1.0)
    """
    match = next((match for form in RATINGS if (match := form.search(text))), None)
    if match is None:
        raise ValueError("no rating like [[5]]")
    rating = float(match.group(1))
    if not LEAST <= rating <= MOST:
        raise ValueError(f"the rating {rating:g} is not from {LEAST} to {MOST}")
    return rating


def emit_scores(review: Review, questions: Sequence[Asked], ratings: Mapping[str, float | None]) -> None:
    """Emits ratings: all together, those of each turn and of each category. The turns of a question are one cluster.
    Raises `MambabenchError` where there is no rating at all."""
    turns = [(question, turn) for question in questions for turn in range(1, len(question.turns) + 1)]
    if all(ratings[name(question.number, turn)] is None for question, turn in turns):
        raise MambabenchError(f"{TASK}: the judge gave no verdict on any of {len(turns)} answers")
    metrics = ["score", "turn 1", "turn 2", *dict.fromkeys(question.category for question in questions)]
    for metric in metrics:
        for question, turn in turns:
            rating = ratings[name(question.number, turn)]
            if rating is not None and metric in ("score", f"turn {turn}", question.category):
                emit_sample(review, question, turn, metric=metric, value=rating, unit="points")
    for question, turn in turns:
        missing = float(ratings[name(question.number, turn)] is None)
        emit_sample(review, question, turn, metric="no_verdict", value=missing, better="lower")


def emit_sample(review: Review, question: Asked, turn: int, **fields: Any) -> None:
    review.emit("sample", task=TASK, item=question.item(turn), cluster=question.item(1), **fields)


def read_questions(file: Path) -> list[Asked]:
    """Questions without their references."""
    records = read_records(file, ("question_id", "turns"), texts=("category",))
    by_name(((f"question {record['question_id']}", None) for record in records), file)
    for record in records:
        if not _are_texts(record["turns"]) or not 1 <= len(record["turns"]) <= 2:
            raise MambabenchError(f"{file}: `turns` of question {record['question_id']} must be a list of 1 or 2 texts")
    return [Asked(record["question_id"], record["category"], tuple(record["turns"]), ()) for record in records]


def read_folder(folder: Path, reference: str) -> Folder:
    """Questions with their references, and the judge's prompts. Raises `Unsupported` naming what is missing, and
    `MambabenchError` for what is not as it should be."""
    for needed in ("question.jsonl", "judge_prompts.jsonl"):
        if not (folder / needed).is_file():
            raise Unsupported(f"{folder}: has no {needed}, which MT-Bench needs; {WHERE}")
    prompts = _read_prompts(folder / "judge_prompts.jsonl")
    questions = read_questions(folder / "question.jsonl")
    if any(question.category in REFERENCED for question in questions):
        file = folder / "reference_answer" / f"{reference}.jsonl"
        if not file.is_file():
            raise Unsupported(f"{file}: no such file; the judge needs reference answers for math; {WHERE}/mt_bench")
        known = read_answers(file)
        for place, question in enumerate(questions):
            shown = _names(question) if question.category in REFERENCED else []
            if left := [each for each in shown if each not in known]:
                raise MambabenchError(f"{file.parent}: {file.name} has no answer to {left[0]}")
            questions[place] = replace(question, references=tuple(known[each] for each in shown))
    return Folder(questions, prompts)


def _read_prompts(file: Path) -> dict[str, Prompt]:
    records = read_records(file, texts=("name", "system_prompt", "prompt_template"))
    prompts = by_name(
        ((record["name"], Prompt(record["system_prompt"], record["prompt_template"])) for record in records), file
    )
    for name, places in PROMPTS.items():
        if name not in prompts:
            raise MambabenchError(f"{file}: lacks the prompt {name!r}; {WHERE}")
        try:
            check_template(prompts[name].template, known=places)
        except ValueError as error:
            raise MambabenchError(f"{file}: the prompt {name!r}: {error}") from None
    return prompts


def read_answers(file: Path) -> dict[str, str]:
    """Recorded answers by `name`: FastChat's, of which the first choice counts, or a step's records."""
    records = read_records(file)
    answers = answers_of(records, file)
    if answers:
        return answers
    found = []
    for record in with_fields(records, file, ("question_id", "choices")):
        turns = _first_turns(record["choices"])
        if turns is None:
            raise MambabenchError(
                f"{file}: `choices` of question {record['question_id']} must begin with an object whose `turns` is a "
                "list of texts"
            )
        found += [(name(record["question_id"], turn), text) for turn, text in enumerate(turns, 1)]
    return by_name(found, file)


def _first_turns(choices: Any) -> list[str] | None:
    first = choices[0] if isinstance(choices, list) and choices else None
    turns = first.get("turns") if isinstance(first, dict) else None
    return turns if _are_texts(turns) else None


def _are_texts(turns: Any) -> TypeGuard[list[str]]:
    return isinstance(turns, list) and all(isinstance(text, str) for text in turns)


def read_judgments(file: Path, model: str) -> dict[str, Any]:
    """Recorded judgments by `name`: FastChat's of one model, the only one or the one of that name."""
    records = read_records(file, ("question_id", "turn", "judgment"), texts=("model",))
    models = sorted({record["model"] for record in records})
    if len(models) > 1 and model not in models:
        raise MambabenchError(f"{file}: has judgments of {', '.join(models)}; the model is called {model!r}")
    mine = [record for record in records if len(models) == 1 or record["model"] == model]
    return by_name(((name(record["question_id"], record["turn"]), record["judgment"]) for record in mine), file)


def _names(question: Asked) -> list[str]:
    return [name(question.number, turn + 1) for turn in range(len(question.turns))]


def _rating_or_none(text: Any) -> float | None:
    """Of a recorded judgment, which may be empty."""
    if not isinstance(text, str):
        return None
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
