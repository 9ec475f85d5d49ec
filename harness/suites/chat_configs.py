"""Options of the suites that have models answer questions in chats: plain data, as in `configs`.

What decides the answers stands in a config of its own, that of the step in which a model answers: who judges them, and
how they are scored, is up to the suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ..interfaces import Choice, ChoiceOf, FileRef
from .configs import _at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweringConfig:
    """How a model answers. All of it is without meaning where recorded answers are scored."""

    template: str = ""
    """How chats are written: one of fschat's conversation templates, or the tokenizer's chat template if empty."""
    batch: int = 8
    """Answers written side by side."""
    limit: int = 0
    """Questions; 0 takes all."""
    new_tokens: int = 2048
    """Longest answer; an answer has less where the model's context ends before."""

    def __post_init__(self) -> None:
        _at_least(self, batch=1, limit=0, new_tokens=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredConfig(AnsweringConfig):
    answers: FileRef | None = None
    """Recorded answers, scored in place of the model's: a file, or a folder that has one named after each model.
    Formats: the benchmark's own, or `events.jsonl` of an earlier step."""
    recorded_as: str = ""
    """What recordings call the model; if empty, its name in the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningQuestionsConfig(AnsweringConfig):
    task: Literal["gsm8k", "crux"]
    data: FileRef
    """The questions, JSON lines as published: `question` and `answer` (GSM8K), `code`, `input`, `output` (CRUXEval)."""
    prompt: FileRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningConfig(AnsweredConfig):
    task: Literal["gsm8k", "crux"]
    data: FileRef | None = None
    """The questions, JSON lines as published: `question` and `answer` (GSM8K), `code`, `input`, `output` (CRUXEval).
    Recorded answers in ZeroEval's form have their questions with them."""
    prompt: FileRef | None = None
    """A text file with the words of the prompt, in which {question} (CRUXEval: {code} and {input}) stand for a
    problem's. Figures beside those of ZeroEval's leaderboard need its words; without a file the suite has its own."""

    def __post_init__(self) -> None:
        AnsweringConfig.__post_init__(self)
        if self.data is None and self.answers is None:
            raise ValueError(f"data is missing: the file of the questions of {self.task}")

    def questions(self) -> Choice | None:
        return None if self.answers else Choice("questions", "reasoning", _part(ReasoningQuestionsConfig, self))

    def check_files(self, files: Mapping[str, Path]) -> None:
        """Before models are trained, what they are asked."""
        from .reasoning import read_problems, read_wording

        if prompt := files.get(self.prompt or ""):
            read_wording(prompt, self.task)
        if data := files.get(self.data or ""):
            read_problems(data, self.task)


@dataclass(frozen=True, slots=True, kw_only=True)
class MtBenchQuestionsConfig(AnsweringConfig):
    data: FileRef
    """FastChat's question.jsonl."""
    new_tokens: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MtBenchConfig(AnsweredConfig):
    data: FileRef
    """A folder with FastChat's question.jsonl, judge_prompts.jsonl and reference_answer/."""
    judge: Annotated[Choice, ChoiceOf("judge")] | None = None
    judgments: FileRef | None = None
    """Judgments that FastChat recorded by single grading, in place of a judge's: a file, or a folder that has one named
    after each model. What was recorded here is read by the judge `recorded`."""
    reference: str = "gpt-4"
    """Whose reference answers the judge is shown: the name of a file in reference_answer/."""
    new_tokens: int = 1024

    def __post_init__(self) -> None:
        AnsweringConfig.__post_init__(self)
        check_judged(self.judge, self.judgments)

    def questions(self) -> Choice | None:
        if self.answers or self.judgments:
            return None
        # Of the folder the questions alone: other words for the judge have nothing answered again.
        config = _part(MtBenchQuestionsConfig, self, data=f"{self.data}/question.jsonl")
        return Choice("questions", "mt-bench", config)

    def check_files(self, files: Mapping[str, Path]) -> None:
        """Before models answer, what is only read when their answers are judged."""
        from .mt_bench import read_folder

        if self.data in files:
            read_folder(files[self.data], self.reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpacaEvalQuestionsConfig(AnsweringConfig):
    data: FileRef
    """The instructions: AlpacaEval's JSON of model outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpacaEvalConfig(AnsweredConfig):
    data: FileRef
    """The instructions with the answers of the system to beat, in the order of the leaderboard: AlpacaEval's JSON of
    model outputs."""
    judge: Annotated[Choice, ChoiceOf("judge")] | None = None
    judgments: FileRef | None = None
    """Judgments that AlpacaEval recorded (annotations.json), in place of a judge's: a file, or a folder that has one
    named after each model. What was recorded here is read by the judge `recorded`."""
    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    """One of alpaca-eval's evaluators: its prompt, and how its verdict is read. The judge model is that of `judge`."""
    length_controlled: bool = True
    gamed: FileRef | None = None
    """df_gamed.csv of the hub's data set tatsu-lab/alpaca_eval, for the length-controlled win rate; without it, that
    of the hub or its cache."""
    difficulty: FileRef | None = None
    """instruction_difficulty.csv of the same; without it, the difficulties in df_gamed.csv."""

    def __post_init__(self) -> None:
        AnsweringConfig.__post_init__(self)
        check_judged(self.judge, self.judgments)

    def questions(self) -> Choice | None:
        if self.answers or self.judgments:
            return None
        return Choice("questions", "alpaca-eval", _part(AlpacaEvalQuestionsConfig, self))

    def check_files(self, files: Mapping[str, Path]) -> None:
        """Before models answer, what is only read when their answers are judged."""
        from .alpaca_eval import read_evaluator, read_rows
        from .alpaca_fit import check_gamed

        if self.judge:
            read_evaluator(self.annotator)
        if self.data not in files:
            return
        items = len(read_rows(files[self.data])[: self.limit or None])
        if self.length_controlled and (gamed := files.get(self.gamed or "")):
            check_gamed(gamed, files.get(self.difficulty or ""), items)


def check_judged(judge: Choice | None, judgments: str | None) -> None:
    """Raises ValueError unless one of both says where judgments come from."""
    if (judge is None) == (judgments is None):
        raise ValueError("one of `judge` and `judgments` must be given: who judges, or what was recorded")


def _part(part: type, config: Any, **changed: Any) -> Any:
    """Those of a config's options that another one has."""
    return part(**{item.name: getattr(config, item.name) for item in fields(part)} | changed)
