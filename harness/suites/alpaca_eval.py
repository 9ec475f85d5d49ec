"""AlpacaEval 2: how often a judge prefers the model's answers to those of a reference system, by alpaca-eval.

Prompts, the order in which the judge sees two answers, the reading of its verdict and the length-controlled win rate
are alpaca-eval's; the judge is asked by ours. An item's difficulty is looked up by its row, so every item keeps its
row: one without a verdict is counted, and in neither the win rate nor the fit.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..answering import (
    Answerer,
    Question,
    answers_file,
    answers_of,
    item_of,
    read_records,
    recorded,
    recorded_name,
    with_fields,
)
from ..documents import Message
from ..interfaces import Bench, Choice, MambabenchError, Review, Unsupported
from ..judges import Reply, Request, ask
from ..judges.reading import on_scale
from ..plugins import suggest
from .alpaca_fit import gamed_file, length_controlled
from .chat_configs import AlpacaEvalConfig, AlpacaEvalQuestionsConfig

T = TypeVar("T")
TASK = "alpaca_eval"
PLACEHOLDER = re.compile(r"{(instruction|output_1|output_2)}")
REFERENCE, DRAW, MODEL = 1.0, 1.5, 2.0
SEED = 0
"""That of the leaderboard; who stands first depends on it and the instruction."""
TOOLS = ("function_call", "functions", "tool_choice", "tools")
Preference = float | None
"""Whose answer is preferred, from `REFERENCE` to `MODEL`; None: no verdict."""


@dataclass(frozen=True, slots=True)
class Row:
    """An instruction, with the answer of the system to beat."""

    number: int
    instruction: str
    occurrence: int
    """How often the same instruction stands before it."""
    output: str

    @property
    def id(self) -> str:
        return f"alpaca-{self.number}"

    @property
    def item(self) -> str:
        return item_of(str(self.number), self.instruction)

    @property
    def asks(self) -> tuple[str, int]:
        return self.instruction, self.occurrence


class AlpacaEvalQuestions:
    """Has a model follow the instructions, each in a chat of one turn."""

    def __init__(self, config: AlpacaEvalQuestionsConfig) -> None:
        self.config = config

    def answer(self, bench: Bench) -> None:
        rows = read_rows(bench.data[self.config.data])[: self.config.limit or None]
        answerer = Answerer(bench, self.config, TASK)
        answerer.answer([Question(id=row.id, messages=(Message("user", row.instruction),)) for row in rows])
        answerer.emit_facts()


class AlpacaEval:
    def __init__(self, config: AlpacaEvalConfig) -> None:
        self.config = config

    def judge(self, review: Review) -> None:
        config, model = self.config, recorded_name(review, self.config)
        rows = read_rows(review.data[config.data])[: config.limit or None]
        # Looked for before anybody is asked.
        gamed = gamed_file(review, config, len(rows)) if config.length_controlled else None
        if config.judgments:
            answers, preferences = read_annotations(recorded(review.data[config.judgments], model), rows)
        else:
            assert config.judge is not None
            answers = read_outputs(answers_file(review, config), rows)
            preferences = judged(Evaluator(config.annotator), config.judge, rows, answers, review)
        emit_preferences(review, rows, answers, preferences, gamed, model)


class Evaluator:
    """One of alpaca-eval's evaluators: its prompt, the order of answers, and how a reply is read."""

    def __init__(self, name: str) -> None:
        from alpaca_eval import utils
        from alpaca_eval.annotators import SinglePairwiseAnnotator

        config = read_evaluator(name)
        self.settings: Mapping[str, Any] = config.pop("completions_kwargs", {})
        self._all = config.get("completion_key") == "completions_all"
        self._annotator = SinglePairwiseAnnotator(
            **{**config, "fn_completions": _unused, "is_shuffle": False, "seed": SEED}
        )
        template = self._annotator.prompt_template.strip()
        turns = [{"role": "user", "content": template}]
        if template.startswith("<|im_start|>"):
            turns = utils.prompt_to_chatml(template)
        self._messages = [Message(turn["role"], turn["content"]) for turn in turns]

    def switched(self, rows: Sequence[Row]) -> list[bool]:
        """Whether the judge sees the model's answer first."""
        import pandas

        frame = pandas.DataFrame(
            {"instruction": [row.instruction for row in rows], "output_1": "reference", "output_2": "model"}
        )
        for processor in self._annotator.processors:
            frame = processor.preprocess(frame)
        return list(frame["output_1"] == "model")

    def request(self, row: Row, answer: str, switched: bool) -> Request:
        outputs = (answer, row.output) if switched else (row.output, answer)
        texts = {"instruction": row.instruction, "output_1": outputs[0], "output_2": outputs[1]}
        # All at once, and into messages: what an answer holds can neither end a message nor take another's place.
        messages = tuple(
            Message(role, PLACEHOLDER.sub(lambda match: texts[match.group(1)], content))
            for role, content in self._messages
        )
        return Request(
            id=row.id,
            messages=messages,
            read=lambda reply: self.read(reply, switched),
            temperature=float(self.settings.get("temperature", 0.0)),
            max_tokens=int(self.settings.get("max_tokens", 2048)),
            top_logprobs=int(self.settings.get("top_logprobs", 0)) if self.settings.get("logprobs") else 0,
        )

    def read(self, reply: Reply, switched: bool) -> float:
        """The preference in a reply. Raises ValueError where there is none."""
        return self.read_completion(_completion(reply) if self._all else reply.text, switched)

    def read_completion(self, completion: Any, switched: bool) -> float:
        """The same of what alpaca-eval records as `raw_completion`."""
        try:
            (preference,) = self._annotator.fn_completion_parser(completion)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no verdict in {str(completion)[:80]!r}: {error}") from None
        preference = preference_by_alpaca_eval(preference)
        if preference is None:
            raise ValueError(f"no verdict in {str(completion)[:80]!r}")
        return REFERENCE + MODEL - preference if switched else preference


def read_evaluator(name: str) -> dict[str, Any]:
    """An evaluator of alpaca-eval as it has it, without importing it. Raises `MambabenchError` for one that it does not
    have, or that needs more than a prompt with a text for a reply."""
    import yaml

    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or spec.origin is None:
        raise Unsupported("alpaca-eval is not installed (mambabench[eval])")
    folder = Path(spec.origin).parent / "evaluators_configs"
    file = folder / name / "configs.yaml"
    if not file.is_file():
        hint = suggest(name, [each.parent.name for each in folder.glob("*/configs.yaml")])
        raise MambabenchError(f"annotator {name!r} is none of alpaca-eval's evaluators{hint}")
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))[name]
    if any(tool in config.get("completions_kwargs", {}) for tool in TOOLS) or config.get("batch_size", 1) != 1:
        raise MambabenchError(f"annotator {name!r} needs more than one prompt with a text for a reply")
    return config


def judged(
    evaluator: Evaluator, judge: Choice, rows: Sequence[Row], answers: Sequence[str], review: Review
) -> list[Preference]:
    """What the judge prefers, row by row. Two equal answers are a draw, about which nobody is asked."""
    switched = evaluator.switched(rows)
    asked = [each for each in zip(rows, answers, switched, strict=True) if each[0].output != each[1]]
    verdicts = ask(judge, [evaluator.request(*each) for each in asked], review)
    known = {verdict.id: preference_of(verdict.value) if verdict.state == "ok" else None for verdict in verdicts}
    return [DRAW if row.output == answer else known[row.id] for row, answer in zip(rows, answers, strict=True)]


def preference_of(value: Any) -> Preference:
    """What a judge or a recording says, if it is on the scale."""
    return on_scale(value, REFERENCE, MODEL)


def preference_by_alpaca_eval(value: Any) -> Preference:
    """The same of what alpaca-eval says, which has 0 as an old way to write a draw."""
    return preference_of(DRAW if value == 0 else value)


def emit_preferences(
    review: Review,
    rows: Sequence[Row],
    answers: Sequence[str],
    preferences: Sequence[Preference],
    gamed: Path | None,
    model: str,
) -> None:
    """Emits each row's share of a win, and what it would be at equal lengths by alpaca-eval's fit. The standard error
    of the one is that of the other's own mean, over rows."""
    if all(preference is None for preference in preferences):
        raise MambabenchError(f"{TASK}: the judge gave no verdict on any of {len(rows)} answers")
    controlled: Sequence[float | None] = [None] * len(rows)
    if gamed:
        controlled = length_controlled([row.output for row in rows], answers, preferences, gamed, model)
    for row, preference, fitted in zip(rows, preferences, controlled, strict=True):
        figures = {
            "win_rate": None if preference is None else preference - REFERENCE,
            "lc_win_rate": fitted,
            "no_verdict": float(preference is None),
        }
        for metric, value in figures.items():
            better = "lower" if metric == "no_verdict" else "higher"
            if value is not None:
                review.emit("sample", task=TASK, item=row.item, metric=metric, value=value, better=better)
    mean = sum(map(len, answers)) / len(answers)
    review.emit("fact", name="mean length of answers", value=mean, unit="characters")


def read_rows(file: Path) -> list[Row]:
    """Instructions and reference answers, in the order of the file, or of a source's folder."""
    file = file / "data.jsonl" if file.is_dir() else file
    seen: Counter[str] = Counter()
    rows = []
    for number, record in enumerate(read_records(file, texts=("instruction", "output"))):
        instruction = record["instruction"]
        rows.append(Row(number, instruction, seen[instruction], record["output"]))
        seen[instruction] += 1
    return rows


def read_outputs(file: Path, rows: Sequence[Row]) -> list[str]:
    """A model's recorded answers in the order of the rows: AlpacaEval's model outputs, or a step's records."""
    records = read_records(file)
    by_id = answers_of(records, file)
    if by_id:
        found = [by_id.get(row.id) for row in rows]
    else:
        by_text = _by_instruction(with_fields(records, file, texts=("instruction", "output")))
        found = [by_text[row.asks]["output"] if row.asks in by_text else None for row in rows]
    return _complete(found, file, "answers")


def read_annotations(file: Path, rows: Sequence[Row]) -> tuple[list[str], list[Preference]]:
    """Recorded answers with their preferences, in the order of the rows. What is not on the scale, or missing, is no
    verdict."""
    known = _by_instruction(read_records(file, texts=("instruction", "output_1", "output_2")))
    found = _complete([known.get(row.asks) for row in rows], file, "judgments")
    for row, record in zip(rows, found, strict=True):
        if record["output_1"] != row.output:
            raise MambabenchError(f"{file}: item {row.number} was judged against another answer than the reference's")
    preferences = [preference_by_alpaca_eval(record.get("preference")) for record in found]
    return [record["output_2"] for record in found], preferences


def _by_instruction(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    seen: Counter[str] = Counter()
    known = {}
    for record in records:
        known[record["instruction"], seen[record["instruction"]]] = record
        seen[record["instruction"]] += 1
    return known


def _complete(found: Sequence[T | None], file: Path, what: str) -> list[T]:
    left = [number for number, each in enumerate(found) if each is None]
    if left:
        raise MambabenchError(f"{file}: {len(left)} of {len(found)} {what} are missing, the first of item {left[0]}")
    return [each for each in found if each is not None]


def _completion(reply: Reply) -> dict[str, Any]:
    """A reply as an OpenAI client's choice, of which alpaca-eval reads the first tokens."""
    content = [
        {"top_logprobs": [{"token": token, "logprob": value} for token, value in likeliest.items()]}
        for likeliest in reply.top_logprobs
    ]
    return {"text": reply.text, "logprobs": {"content": content}}


def _unused(*arguments: Any, **options: Any) -> None:
    """Stands where alpaca-eval would ask a judge itself."""
