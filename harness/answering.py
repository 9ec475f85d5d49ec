"""How suites have a model answer questions: chats become prompts, and answers are kept before the next batch begins.

An answer is a record of the step in which the model answers. Other steps score it, without the model. What a model
wrote is data: it is matched, parsed as JSON and shown to judges, never executed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .documents import Message
from .events import EVENTS, counted
from .interfaces import Bench, Limits, MambabenchError, Prompt, Review, Stepper, Unsupported, silent
from .keys import digest
from .locks import Lock
from .plugins import decoder_or_plain

if TYPE_CHECKING:
    from .suites.chat_configs import AnsweredConfig, AnsweringConfig

T = TypeVar("T")
SUFFIXES = (".jsonl", ".json", ".jsonl.xz", ".json.xz")
FOLDER = "answers"
NO_ROOM = "no room"
"""How an answer ended whose question fills the model's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    id: str
    """Unique within a step."""
    messages: tuple[Message, ...]
    temperature: float = 0.0

    @property
    def key(self) -> str:
        """Stands for what is asked; the id too, since it decides what is drawn."""
        return digest([self.id, self.messages, self.temperature])


class Written(NamedTuple):
    """A chat as a model reads it, and what ends the answer."""

    ids: tuple[int, ...]
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]


class Answerer:
    """Answers questions with the subject's decoder; loads the model when the first one is to be answered. Answers are
    kept in the store's cache, so that neither a killed step nor one with more questions has them written again."""

    def __init__(self, bench: Bench, config: AnsweringConfig, task: str) -> None:
        self.bench, self.config, self.task = bench, config, task
        self._model: Stepper | None = None
        folder = bench.cache / FOLDER if bench.cache and bench.answers else bench.scratch
        self._file = folder / f"{digest([bench.answers, task, config.template, config.new_tokens])}.jsonl"
        self._kept: dict[str, dict[str, Any]] = {}
        self._ends: Counter[str] = Counter()
        self._tokens = 0

    def answer(self, questions: Sequence[Question]) -> dict[str, str]:
        """The answers' texts by the questions' ids."""
        # Another step that wants them waits here, and then finds them.
        lock = Lock.take(self._file.with_suffix(".lock"), wait=True)
        assert lock is not None
        try:
            self._answer(questions)
        finally:
            lock.release()
        for question in questions:
            answer = self._kept[question.key]
            self.bench.emit("answer", task=self.task, id=question.id, **answer)
            self._ends[answer["finish"]] += 1
            self._tokens += answer["tokens"]
        return {question.id: self._kept[question.key]["text"] for question in questions}

    def _answer(self, questions: Sequence[Question]) -> None:
        if self._file.exists():
            self._kept = {answer.pop("key"): answer for answer in _whole_lines(self._file)}
        missing = [question for question in questions if question.key not in self._kept]
        done = len(questions) - len(missing)
        for batch, limits in self._batches(missing):
            self.bench.emit("progress", done=done, total=len(questions), unit="answers")
            self._write(batch, limits)
            done += len(batch)
        self.bench.emit("progress", done=done, total=len(questions), unit="answers")

    def emit_facts(self) -> None:
        """Tells how many answers there are, how many the limit of tokens, or of the model's context, cut short, and
        how long they are."""
        for name, value, unit in (
            ("answers", self._ends.total(), "answers"),
            ("answers cut short", self._ends["length"] + self._ends[NO_ROOM], "answers"),
            ("tokens of answers", self._tokens, "tokens"),
        ):
            self.bench.emit("fact", name=name, value=value, unit=unit)

    @property
    def model(self) -> Stepper:
        if self._model is None:
            self._model = self.bench.subject.load()
        return self._model

    def _batches(self, questions: Sequence[Question]) -> Iterator[tuple[list[tuple[Question, Written]], Limits]]:
        """Questions with the same limits, of similar length, the longest first."""
        groups: dict[Limits, list[tuple[Question, Written]]] = {}
        for question in questions:
            written = write(question.messages, self.model.tokenizer, self.config.template)
            limits = Limits(
                new_tokens=min(self.config.new_tokens, max(0, self.model.max_context - len(written.ids))),
                stop_tokens=written.stop_tokens,
                stop_strings=written.stop_strings,
                temperature=question.temperature,
                seed=self.bench.seed,
            )
            groups.setdefault(limits, []).append((question, written))
        for limits, members in groups.items():
            members.sort(key=lambda member: -len(member[1].ids))
            for first in range(0, len(members), self.config.batch):
                yield members[first : first + self.config.batch], limits

    def _write(self, batch: Sequence[tuple[Question, Written]], limits: Limits) -> None:
        if limits.new_tokens:
            decoder = decoder_or_plain(self.bench.subject.decoder, self.model.device)
            prompts = [Prompt(written.ids, _stream(question.id)) for question, written in batch]
            given = decoder.generate(self.model, prompts, limits, silent)
            answers: list[tuple[str, str, int]] = [
                (answer.text.strip(), answer.finish, len(answer.ids)) for answer in given
            ]
        else:
            answers = [("", NO_ROOM, 0)] * len(batch)
        with self._file.open("a", encoding="utf-8") as file:
            for (question, _), (text, finish, tokens) in zip(batch, answers, strict=True):
                answer = {"text": text, "finish": finish, "tokens": tokens}
                self._kept[question.key] = answer
                file.write(json.dumps({"key": question.key, **answer}) + "\n")


def write(messages: Sequence[Message], tokenizer: Any, template: str = "") -> Written:
    """A chat up to where its next answer begins, by one of fschat's templates or else by the tokenizer's own.

    Raises `Unsupported` for a tokenizer without a chat template, `MambabenchError` for an unknown name.
    """
    text, stop_tokens, stop_strings = _by_name(messages, template) if template else _by_tokenizer(messages, tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    ends = dict.fromkeys([*stop_tokens, *([] if end is None else [end])])
    return Written(tuple(ids), tuple(ends), stop_strings)


def _by_name(messages: Sequence[Message], template: str) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    try:
        from fastchat.conversation import conv_templates, get_conv_template
    except ImportError as error:
        raise Unsupported(f"template {template!r} is fschat's, which is not installed (mambabench[eval])") from error
    if template not in conv_templates:
        raise MambabenchError(f"template {template!r} is none of fschat's; it has {', '.join(sorted(conv_templates))}")
    chat = get_conv_template(template)
    for message in messages:
        if message.role == "system":
            chat.set_system_message(message.content)
        else:
            chat.append_message(chat.roles[message.role == "assistant"], message.content)
    chat.append_message(chat.roles[1], None)
    stops = [chat.stop_str] if isinstance(chat.stop_str, str) else chat.stop_str or []
    return chat.get_prompt(), tuple(chat.stop_token_ids or ()), tuple(stop for stop in stops if stop)


def _by_tokenizer(messages: Sequence[Message], tokenizer: Any) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    if not getattr(tokenizer, "chat_template", None):
        raise Unsupported("the tokenizer has no chat template; the option `template` names one of fschat's")
    turns = [message._asdict() for message in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # What the template writes behind an answer ends it, whether or not it is the tokenizer's end of text.
    mark = "mambabench"
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": mark}], tokenize=False)
    ending = whole.rpartition(mark)[2].strip()
    return text, (), (ending,) if ending else ()


def with_fields(
    records: list[dict[str, Any]], file: Path, names: Sequence[str] = (), texts: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The records. Raises `MambabenchError` for one that lacks one of these fields, or whose `texts` are none."""
    for number, record in enumerate(records):
        if left := [name for name in (*names, *texts) if name not in record]:
            raise MambabenchError(f"{file}: item {number} lacks {left[0]!r}")
        if wrong := [name for name in texts if not isinstance(record[name], str)]:
            raise MambabenchError(f"{file}: {wrong[0]!r} of item {number} is no text")
    return records


def by_name(pairs: Iterable[tuple[str, T]], file: Path) -> dict[str, T]:
    """Raises `MambabenchError` for a name that stands there twice: it is not for the order of lines to decide."""
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise MambabenchError(f"{file}: {name} is in it twice")
        found[name] = value
    return found


def read_text(file: Path) -> str:
    """Raises `MambabenchError` for a file that cannot be read, or is no text."""
    try:
        with lzma.open(file) if file.suffix == ".xz" else file.open("rb") as stream:
            return stream.read().decode("utf-8")
    except FileNotFoundError:
        raise MambabenchError(f"{file}: no such file") from None
    except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError) as error:
        raise MambabenchError(f"{file}: cannot be read as text in UTF-8: {error}") from None


def read_records(file: Path, names: Sequence[str] = (), texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON array or of JSON lines, compressed with xz or not; of a step's events, those that count.
    Raises `MambabenchError` for anything else, and for objects that are not as `with_fields` wants them."""
    if file.name == EVENTS:
        return with_fields(counted(file), file, names, texts)
    text = read_text(file)
    try:
        if text.lstrip()[:1] == "[":
            records = json.loads(text)
        else:
            # `splitlines` also cuts at separators that JSON leaves as they are within texts, such as U+2028.
            records = [json.loads(line) for line in text.split("\n") if line and not line.isspace()]
    except (ValueError, RecursionError) as error:
        raise MambabenchError(f"{file}: neither a JSON array nor JSON lines: {error}") from None
    if not all(isinstance(record, dict) for record in records):
        raise MambabenchError(f"{file}: holds something that is no JSON object")
    return with_fields(records, file, names, texts)


def recorded_name(review: Review, config: AnsweredConfig) -> str:
    """What recordings call the model."""
    return config.recorded_as or review.model


def answers_file(review: Review, config: AnsweredConfig) -> Path:
    """Where the answers are: recorded ones, or the records of the step in which the model gave them."""
    if config.answers:
        return recorded(review.data[config.answers], recorded_name(review, config))
    assert review.answers is not None
    return review.answers


def recorded(path: Path, model: str) -> Path:
    """What was recorded of a model: a file, or in a folder the one that is named after it.
    Raises `Unsupported` for a folder without it."""
    if not path.is_dir():
        return path
    found = next((file for suffix in SUFFIXES if (file := path / f"{model}{suffix}").is_file()), None)
    if found is None:
        raise Unsupported(f"{path}: nothing was recorded of {model!r} (a file {model}.json or {model}.jsonl)")
    return found


def answers_of(records: Sequence[dict[str, Any]], file: Path) -> dict[str, str]:
    """Texts by id, of the `answer` records of a step."""
    answers = with_fields([record for record in records if record.get("kind") == "answer"], file, texts=("id", "text"))
    return by_name(((record["id"], record["text"]) for record in answers), file)


def item_of(*parts: str) -> str:
    """A hash of an item's content, by which two runs find the same one."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _stream(name: str) -> int:
    """Which random numbers an answer takes: those of its question, wherever it stands."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """A kill may have cut the last one short; what is appended then must not continue it."""
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        file.write_bytes(whole)
    for line in whole.splitlines():
        yield json.loads(line)
